/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The event ABI between peer.bpf.c and hook.go. Fields have a fixed width and
 * sit at their natural alignment; padding is explicit.
 */
#ifndef WGROAM_PEER_H
#define WGROAM_PEER_H

/* The values of wgroam.Cause. */
enum peer_cause {
	CAUSE_DATA = 1,
	CAUSE_RESPONSE = 2,
	CAUSE_INITIATION = 3,
	CAUSE_CONFIG = 4,
	/* Not a change: the peer's handshake has been completed at new_endpoint. */
	CAUSE_CONFIRMED = 0x80,
};

/* How many events a peer can cause, which may change its address with every
 * packet, and all peers together, whose addresses somebody on the path may
 * rewrite: so many in every LIMIT_WINDOW_NS of CLOCK_BOOTTIME. What is more is in
 * the map of the newest events only, where user space looks when the window of
 * an event is over. */
#define LIMIT_WINDOW_NS 100000000ULL
#define LIMIT_PEER 8
#define LIMIT_ALL 2000

/* An outer address as WireGuard keeps it. */
struct peer_endpoint {
	__u8 addr[16]; /* network byte order; IPv4 in the first four bytes */
	__u32 scope; /* sin6_scope_id, host byte order */
	__u16 port; /* network byte order */
	__u16 family; /* AF_INET, AF_INET6, or 0: no endpoint */
};

/* An endpoint change, as it is in the ring buffer. */
struct peer_event {
	__u64 internal_id; /* wg_peer.internal_id: unique until the module is reloaded */
	__u64 boot_ns; /* CLOCK_BOOTTIME, when the kernel accepted the endpoint */
	__u8 public_key[32];
	struct peer_endpoint old_endpoint;
	struct peer_endpoint new_endpoint;
	__u32 ifindex;
	__u32 netns; /* inode number of the device's network namespace */
	__u8 cause; /* enum peer_cause */
	__u8 pad[7];
};

/* The newest event of a peer, sent or not. */
struct peer_state {
	struct peer_event event;
	__u64 peer; /* address of the wg_peer */
	__u64 window; /* of the event: boot_ns / LIMIT_WINDOW_NS */
	__u32 sent; /* events in that window */
	__u32 pad;
};

/* A WireGuard device. An ifindex alone is unique within one namespace only. */
struct device_id {
	__u32 ifindex;
	__u32 netns;
};

#endif
