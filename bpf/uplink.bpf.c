//go:build ignore

/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Watches WireGuard's UDP port from outside, for implementations without a
 * function to hook: which session's packets leave for which address.
 *
 * What leaves is the proof. Handshakes and data go to a peer's endpoint only, and
 * that is configured or taken from an authenticated packet. What comes in may be
 * forged: it makes no state, and no more than a hint, of which there is a bounded
 * number.
 *
 * Nothing is ever changed or held up: every path ends with TCX_NEXT.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "uplink.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define AF_INET 2
#define AF_INET6 10

/* The next program decides. The same as TC_ACT_UNSPEC of clsact. */
#define TCX_NEXT -1

/* A message begins with its type, and three bytes of zeroes (messages.h). Type
 * 3, the cookie, is no proof: it goes to whoever sent something, authenticated or
 * not (send.c, wg_packet_send_handshake_cookie). */
#define TYPE_INITIATION 1
#define TYPE_RESPONSE 2
#define TYPE_DATA 4
#define SIZE_INITIATION 148
#define SIZE_RESPONSE 92
#define SIZE_DATA_MIN 32 /* a keepalive */

#define MS 1000000ULL

/* The limits. A window is the time in which so many are let through. */
#define WINDOW (100 * MS)
#define HINTS_PER_SESSION 4
#define HINTS 100
#define MOVES_PER_SESSION 4
#define MOVES 400

/* User space is reminded of what comes from where it came before, after 250 ms, 4 s
 * and 64 s: a packet is here before WireGuard has looked at it, and a forged one may
 * be here before the genuine one. */
#define REMINDERS 3
#define REMIND (250 * MS)

/* A packet is seen again at the device below (a VLAN's, a bond's). */
#define SAME_PACKET (100 * MS)

/* The UDP ports that user space wants to hear of, a bit for each. */
__u64 ports[65536 / 64];

/* The ring buffer, and how many events found it full. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct uplink_event);
} events SEC(".maps");

__u64 events_lost;

/* How many hints the limits held back. */
__u64 hints_suppressed;

/* The sessions. Those that nobody has used for long make room; user space sizes
 * the maps to the number of peers. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct uplink_key);
	__type(value, struct uplink_local);
} locals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct uplink_key);
	__type(value, struct uplink_remote);
} remotes SEC(".maps");

/* The sessions whose last change was held back, or found the ring buffer full. User
 * space empties it when things have calmed down, and looks into remotes then: the
 * last address always gets there. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct uplink_key);
	__type(value, struct uplink_late);
} late SEC(".maps");

/* How many changes went there. */
__u64 moves_late;

/* The limits for all sessions together. */
struct uplink_window all_hints;
struct uplink_window all_moves;

/* What there is to know of a packet. */
struct packet {
	struct uplink_address peer; /* the far end */
	__u32 near; /* where our address begins, in what we send */
	__u32 port; /* ours, host byte order */
	__u32 message; /* where the UDP payload begins */
	__u32 size; /* of the UDP payload, GSO's or GRO's packets together */
	__u32 type;
	__u32 index[2]; /* the words behind the type */
};

/* The UDP header, and the beginning of each message. */
struct start {
	struct udphdr udp;
	__u32 type;
	__u32 index[2];
};

static __always_inline bool same_address(const struct uplink_address *a,
					 const struct uplink_address *b)
{
	const __u32 *x = (const __u32 *)a, *y = (const __u32 *)b;

	/* The first word is all of an IPv4 address, the last port and family. */
	return x[0] == y[0] && x[4] == y[4] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

/* Where something of the packet can be read: in its linear part, or else in buf, to
 * which a helper copies it. NULL if there is no such thing. */
static __always_inline const void *peek(struct __sk_buff *skb, __u32 off, void *buf, __u32 size)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	void *from;

	/* No header is that far away, and the verifier wants a bound. */
	if (off > 0x3ff)
		return NULL;
	from = data + off;
	if (from + size <= end)
		return from;
	return bpf_skb_load_bytes(skb, off, buf, size) ? NULL : buf;
}

static __always_inline bool followed(__u16 port)
{
	return ports[port / 64] & (1ULL << (port % 64));
}

/* Finds the UDP header in an IPv6 packet. */
static __always_inline bool skip_extensions(struct __sk_buff *skb, __u8 next, __u32 *off,
					    bool *whole)
{
	const struct {
		__u8 next, length;
		__be16 fragment;
	} *header;
	__u32 buf;

	for (int i = 0; i < 8; i++) {
		if (next == IPPROTO_UDP)
			return true;
		header = peek(skb, *off, &buf, sizeof(buf));
		if (!header)
			return false;
		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
			*off += (header->length + 1) * 8;
			break;
		case IPPROTO_AH:
			*off += (header->length + 2) * 4;
			break;
		case IPPROTO_FRAGMENT:
			/* Not the first fragment: there is no header in it. */
			if (header->fragment & bpf_htons(0xfff8))
				return false;
			if (header->fragment & bpf_htons(1))
				*whole = false;
			*off += 8;
			break;
		default:
			/* Not UDP. */
			return false;
		}
		next = header->next;
	}
	/* More headers than anybody sends. */
	return false;
}

/* Finds the message in an IP packet. */
static __always_inline bool parse_ip(struct __sk_buff *skb, __u32 off, __u16 protocol, bool egress,
				     struct packet *p)
{
	__u32 *addr = (__u32 *)p->peer.addr;
	__u32 buf[sizeof(struct ipv6hdr) / 4];
	const struct start *start;
	bool whole = true;
	__u16 near, far;

	if (protocol == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = peek(skb, off, buf, sizeof(*ip));

		if (!ip || ip->version != 4 || ip->ihl < 5)
			return false;
		/* Not UDP, or not the first fragment. */
		if (ip->protocol != IPPROTO_UDP || ip->frag_off & bpf_htons(0x1fff))
			return false;
		whole = !(ip->frag_off & bpf_htons(0x2000));
		p->near = off + offsetof(struct iphdr, saddr);
		off += ip->ihl * 4;
		p->peer.family = AF_INET;
		addr[0] = egress ? ip->daddr : ip->saddr;
	} else if (protocol == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = peek(skb, off, buf, sizeof(*ip));
		const __u32 *from;

		if (!ip || ip->version != 6)
			return false;
		p->near = off + offsetof(struct ipv6hdr, saddr);
		off += sizeof(*ip);
		p->peer.family = AF_INET6;
		from = egress ? ip->daddr.in6_u.u6_addr32 : ip->saddr.in6_u.u6_addr32;
		addr[0] = from[0];
		addr[1] = from[1];
		addr[2] = from[2];
		addr[3] = from[3];
		if (ip->nexthdr != IPPROTO_UDP && !skip_extensions(skb, ip->nexthdr, &off, &whole))
			return false;
	} else {
		/* Not IP. */
		return false;
	}

	/* A message as short as that is none of WireGuard's. */
	start = peek(skb, off, buf, sizeof(*start));
	if (!start)
		return false;
	near = egress ? start->udp.source : start->udp.dest;
	far = egress ? start->udp.dest : start->udp.source;
	/* Foreign traffic. */
	if (!followed(bpf_ntohs(near)))
		return false;
	p->port = bpf_ntohs(near);
	p->peer.port = far;
	p->message = off + sizeof(start->udp);
	p->size = bpf_ntohs(start->udp.len) - sizeof(start->udp);
	p->type = start->type;
	p->index[0] = start->index[0];
	p->index[1] = start->index[1];
	/* A length that is less than the header's own, or more than there is, is a lie
	 * that UDP drops; but of a first fragment it is that of all together. */
	return p->size <= 0xffff && (!whole || p->message + p->size <= skb->len);
}

/* Finds the message in a packet of a link with or without Ethernet headers. */
static __always_inline bool parse(struct __sk_buff *skb, bool ethernet, bool egress,
				  struct packet *p)
{
	__u32 off = offsetof(struct ethhdr, h_proto);
	const __be16 *protocol;
	const __u8 *first;
	__be16 buf;

	if (!ethernet) {
		/* The version says it, for skb->protocol is what somebody wrote
		 * to a TUN device. */
		first = peek(skb, 0, &buf, sizeof(*first));
		if (!first)
			return false;
		return parse_ip(skb, 0, bpf_htons(*first >> 4 == 4 ? ETH_P_IP : ETH_P_IPV6), egress,
				p);
	}

	protocol = peek(skb, off, &buf, sizeof(*protocol));
	/* The kernel keeps an outer tag beside the packet. Those in it are left
	 * over, or a VLAN device without offload put them there. */
	for (int i = 0; i < 2; i++) {
		if (!protocol ||
		    (*protocol != bpf_htons(ETH_P_8021Q) && *protocol != bpf_htons(ETH_P_8021AD)))
			break;
		off += 4;
		protocol = peek(skb, off, &buf, sizeof(*protocol));
	}
	return protocol && parse_ip(skb, off + sizeof(*protocol), *protocol, egress, p);
}

static __always_inline bool within(struct uplink_window *w, __u64 now, __u32 limit)
{
	/* Two that begin a window at once may let twice as many through. */
	if (now - w->began >= WINDOW) {
		w->began = now;
		w->used = 0;
	}
	/* Bounded, so that it does not wrap. */
	return w->used < limit && __sync_fetch_and_add(&w->used, 1) < limit;
}

/* Our address, which is no part of what is compared, and read of what is news only.
 * A guest on a macvlan can send what looks like ours, from another address. */
static __always_inline bool read_near(struct __sk_buff *skb, const struct packet *p, __u8 *to)
{
	if (p->peer.family == AF_INET)
		return !bpf_skb_load_bytes(skb, p->near, to, 4);
	return !bpf_skb_load_bytes(skb, p->near, to, 16);
}

static __always_inline void begin_event(struct uplink_event *event, const struct packet *p,
					__u8 kind)
{
	event->boot_ns = bpf_ktime_get_boot_ns();
	event->addr = p->peer;
	event->port = p->port;
	event->kind = kind;
}

static __always_inline bool send_event(struct uplink_event *event, __u32 message)
{
	if (!bpf_ringbuf_output(&events, event, offsetof(struct uplink_event, message) + message,
				0))
		return true;
	__sync_fetch_and_add(&events_lost, 1);
	return false;
}

/* Our handshakes: the only source of local indexes. */
static __always_inline void send_handshake(struct __sk_buff *skb, const struct packet *p)
{
	struct uplink_event event = {};
	struct uplink_key key = { .index = p->index[0], .port = p->port };
	struct uplink_local local = { .born = bpf_ktime_get_coarse_ns() };
	struct uplink_local *known = bpf_map_lookup_elem(&locals, &key);

	/* A handshake has an index of its own; boringtun's come again after 256. */
	if (known && local.born - known->born < SAME_PACKET)
		return;
	if (!read_near(skb, p, event.near))
		return;

	if (p->type == TYPE_RESPONSE) {
		struct uplink_key peer = { .index = p->index[1], .port = p->port };
		struct uplink_remote remote = { .addr = p->peer, .fresh = true };

		/* Cannot happen: it does not fit into the packet. */
		if (bpf_skb_load_bytes(skb, p->message, event.message, RESPONSE_MAC1))
			return;
		__builtin_memcpy(remote.near, event.near, sizeof(remote.near));
		/* The index is what the initiation says, which may be a recording, with
		 * the index of a live session written into it: data under that proves
		 * nothing of this response. An index that comes again (boringtun's do,
		 * after 256 handshakes) is proven by a dump. */
		if (!bpf_map_update_elem(&remotes, &peer, &remote, BPF_NOEXIST))
			/* What an older session under it had to say, which was forgotten. */
			bpf_map_delete_elem(&late, &peer);
		begin_event(&event, p, UPLINK_RESPONSE);
		event.remote = peer.index;
	} else {
		if (bpf_skb_load_bytes(skb, p->message, event.message, INITIATION_MAC1))
			return;
		begin_event(&event, p, UPLINK_INITIATION);
	}
	event.local = key.index;
	/* The map first: the answer may be here before this returns. */
	bpf_map_update_elem(&locals, &key, &local, BPF_ANY);
	send_event(&event, p->type == TYPE_RESPONSE ? RESPONSE_MAC1 : INITIATION_MAC1);
}

static __always_inline void report_move(const struct packet *p, struct uplink_key *key,
					struct uplink_remote *remote, const __u8 *near, __u8 kind,
					const struct uplink_address *old)
{
	struct uplink_event event = {};
	struct uplink_late delayed = { .kind = kind };
	__u64 now = bpf_ktime_get_coarse_ns();

	/* A peer that changes its address with every packet makes us answer to each,
	 * and many may move at once. */
	if (within(&remote->moves, now, MOVES_PER_SESSION) && within(&all_moves, now, MOVES)) {
		begin_event(&event, p, kind);
		event.remote = key->index;
		__builtin_memcpy(event.near, near, sizeof(event.near));
		if (old)
			event.old = *old;
		if (send_event(&event, 0))
			return;
	}
	if (old)
		delayed.old = *old;
	/* That it is there already is as good. That there is no memory is a loss. */
	if (bpf_map_update_elem(&late, key, &delayed, BPF_NOEXIST) &&
	    !bpf_map_lookup_elem(&late, key))
		__sync_fetch_and_add(&events_lost, 1);
	__sync_fetch_and_add(&moves_late, 1);
}

static __always_inline void send_data(struct __sk_buff *skb, const struct packet *p)
{
	struct uplink_key key = { .index = p->index[0], .port = p->port };
	struct uplink_remote *known = bpf_map_lookup_elem(&remotes, &key);
	struct uplink_remote remote = { .addr = p->peer };

	if (known) {
		struct uplink_address old = known->addr;

		/* Nothing new: what nearly all packets come to. */
		if (!known->fresh && same_address(&old, &p->peer))
			return;
		if (!read_near(skb, p, remote.near))
			return;
		known->fresh = false;
		__builtin_memcpy(known->near, remote.near, sizeof(known->near));
		if (same_address(&old, &p->peer)) {
			report_move(p, &key, known, remote.near, UPLINK_CONFIRMED, NULL);
			return;
		}
		known->addr = p->peer;
		report_move(p, &key, known, remote.near, UPLINK_MOVED, &old);
		return;
	}
	/* Older than this program, or the peer has answered our initiation, or
	 * forgotten. */
	if (!read_near(skb, p, remote.near))
		return;
	bpf_map_update_elem(&remotes, &key, &remote, BPF_ANY);
	report_move(p, &key, &remote, remote.near, UPLINK_UNKNOWN, NULL);
}

static __always_inline void receive_data(const struct packet *p)
{
	struct uplink_event event = {};
	struct uplink_key key = { .index = p->index[0], .port = p->port };
	struct uplink_local *local = bpf_map_lookup_elem(&locals, &key);
	__u32 reminders;
	bool known;
	__u64 now;

	/* Forged, or older than this program. */
	if (!local)
		return;
	known = same_address(&local->told, &p->peer);
	/* Once, for another processor may count it down meanwhile. */
	reminders = *(volatile __u32 *)&local->reminders;
	/* Nothing new: what nearly all packets come to. */
	if (known && !reminders)
		return;
	now = bpf_ktime_get_coarse_ns();
	/* Not yet. */
	if (known && now < local->remind)
		return;

	/* Somebody who has seen the index can send what he likes, but not make us look
	 * more often than so. */
	if (!within(&local->hints, now, HINTS_PER_SESSION) || !within(&all_hints, now, HINTS)) {
		__sync_fetch_and_add(&hints_suppressed, 1);
		return;
	}
	begin_event(&event, p, UPLINK_HINT);
	event.local = key.index;
	/* Lost: the next packet is news again. */
	if (!send_event(&event, 0))
		return;
	if (known) {
		reminders--;
	} else {
		local->told = p->peer;
		reminders = REMINDERS;
	}
	local->reminders = reminders;
	local->remind = now + (REMIND << 4 * (REMINDERS - reminders));
}

static __always_inline void egress(struct __sk_buff *skb, bool ethernet)
{
	struct packet p = {};

	/* Forwarded: another host has the same port. What kernel WireGuard has made of
	 * a forwarded packet is its own (queueing.h, wg_reset_packet, skb_scrub_packet). */
	if (skb->ingress_ifindex)
		return;
	if (!parse(skb, ethernet, true, &p))
		return;
	if (p.type == TYPE_DATA && p.size >= SIZE_DATA_MIN)
		send_data(skb, &p);
	else if ((p.type == TYPE_RESPONSE && p.size == SIZE_RESPONSE) ||
		 (p.type == TYPE_INITIATION && p.size == SIZE_INITIATION))
		send_handshake(skb, &p);
}

static __always_inline void ingress(struct __sk_buff *skb, bool ethernet)
{
	struct packet p = {};

	if (!parse(skb, ethernet, false, &p))
		return;
	/* Handshakes are nothing to go by: everybody can make one. */
	if (p.type == TYPE_DATA && p.size >= SIZE_DATA_MIN)
		receive_data(&p);
}

SEC("tc")
int uplink_ingress(struct __sk_buff *skb)
{
	ingress(skb, true);
	return TCX_NEXT;
}

SEC("tc")
int uplink_egress(struct __sk_buff *skb)
{
	egress(skb, true);
	return TCX_NEXT;
}

/* For links whose packets begin with the IP header: TUN devices, PPP, tunnels. */
SEC("tc")
int uplink_ingress_ip(struct __sk_buff *skb)
{
	ingress(skb, false);
	return TCX_NEXT;
}

SEC("tc")
int uplink_egress_ip(struct __sk_buff *skb)
{
	egress(skb, false);
	return TCX_NEXT;
}
