/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * The event ABI between uplink.bpf.c and uplink.go. Fields have a fixed width
 * and sit at their natural alignment; padding is explicit.
 */
#ifndef WGROAM_UPLINK_H
#define WGROAM_UPLINK_H

/* The values of UplinkKind. */
enum uplink_kind {
	UPLINK_INITIATION = 1, /* out: a handshake initiation */
	UPLINK_RESPONSE = 2, /* out: a handshake response */
	UPLINK_MOVED = 3, /* out: data goes to another address than before */
	UPLINK_UNKNOWN = 4, /* out: data under an index that was not known */
	UPLINK_HINT = 5, /* in: data under an index of ours, which may be forged */
	UPLINK_CONFIRMED = 6, /* out: the first data after a response, to the same address */
};

/* The far end's address, as it is in the packet. */
struct uplink_address {
	__u8 addr[16]; /* network byte order; IPv4 in the first four bytes, zeroes behind */
	__u16 port; /* network byte order */
	__u16 family; /* AF_INET, AF_INET6, or 0: none */
};

/* Of a handshake message, what mac1 is over, and mac1. */
#define INITIATION_MAC1 132
#define RESPONSE_MAC1 76

/* The ring buffer's record. Only handshakes come with a message; the others end
 * before it. */
struct uplink_event {
	__u64 boot_ns; /* CLOCK_BOOTTIME */
	struct uplink_address addr; /* where to; of a hint, where from */
	struct uplink_address old; /* UPLINK_MOVED: where to before */
	__u8 near[16]; /* our address, as addr.addr; of a hint zeroes */
	__u32 local; /* our index; 0: not in the message */
	__u32 remote; /* the peer's index; 0: not in the message */
	__u16 port; /* the device's UDP port, host byte order */
	__u8 kind; /* enum uplink_kind */
	__u8 pad;
	__u8 message[INITIATION_MAC1];
};

/* An index of ours is unique within one device. The peers choose theirs, and may
 * choose one that another has. */
struct uplink_key {
	__u32 index; /* as on the wire, read as little endian */
	__u16 port; /* the device's UDP port, host byte order */
	__u16 pad;
};

/* So many in a while. */
struct uplink_window {
	__u64 began; /* CLOCK_MONOTONIC_COARSE */
	__u32 used;
	__u32 pad;
};

/* A session by our index, which is in what we receive. */
struct uplink_local {
	struct uplink_address told; /* the source that user space has heard of last */
	__u32 reminders; /* how often it will hear of the same again */
	__u64 remind; /* when, CLOCK_MONOTONIC_COARSE */
	__u64 born;
	struct uplink_window hints;
};

/* A session by the peer's index, which is in what we send. */
struct uplink_remote {
	struct uplink_address addr; /* where the newest packet went */
	__u32 fresh; /* unknown before a response went there, and no data yet */
	__u8 near[16]; /* our address in the packet that brought addr */
	struct uplink_window moves;
};

/* A change that user space has yet to hear of: it is to look up where the session
 * is by then. */
struct uplink_late {
	struct uplink_address old; /* the last that user space has heard of */
	__u32 kind; /* enum uplink_kind */
};

#endif
