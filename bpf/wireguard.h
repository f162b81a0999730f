/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The few kernel fields that peer.bpf.c reads, found by name in the BTF of the
 * running kernel (CO-RE), so that offsets and other members do not matter.
 *
 * The WireGuard types are those of drivers/net/wireguard/{peer,device,noise,
 * cookie,socket}.h, the same from 6.1 to 6.12.
 */
#ifndef WGROAM_WIREGUARD_H
#define WGROAM_WIREGUARD_H

#define AF_INET 2
#define AF_INET6 10

/* The registers that a kprobe program gets, as linux/ptrace.h gives them to user
 * space. */
#if defined(__TARGET_ARCH_x86)
struct pt_regs {
	unsigned long r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
};
#elif defined(__TARGET_ARCH_arm64)
struct user_pt_regs {
	__u64 regs[31];
};
#endif

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct ns_common {
	unsigned int inum;
};

struct net {
	struct ns_common ns;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct net_device {
	int ifindex;
	possible_net_t nd_net;
};

struct sk_buff {
	unsigned char *data;
};

struct in_addr {
	__be32 s_addr;
};

struct in6_addr {
	union {
		__be32 u6_addr32[4];
	} in6_u;
};

struct sockaddr {
	__u16 sa_family;
};

struct sockaddr_in {
	__be16 sin_port;
	struct in_addr sin_addr;
};

struct sockaddr_in6 {
	__be16 sin6_port;
	struct in6_addr sin6_addr;
	__u32 sin6_scope_id;
};

struct endpoint {
	union {
		struct sockaddr addr;
		struct sockaddr_in addr4;
		struct sockaddr_in6 addr6;
	};
	union {
		struct {
			struct in_addr src4;
			int src_if4;
		};
		struct in6_addr src6;
	};
};

/* Only the public key: the private, preshared and ephemeral keys beside it are
 * not declared, so that the program cannot read them by mistake. */
struct noise_handshake {
	__u8 remote_static[32];
};

struct wg_device {
	struct net_device *dev;
};

struct cookie_checker {
	struct wg_device *device;
};

struct wg_peer {
	struct wg_device *device;
	struct endpoint endpoint;
	struct noise_handshake handshake;
	__u64 internal_id;
};

#pragma clang attribute pop

#endif
