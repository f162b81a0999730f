//go:build ignore

/* SPDX-License-Identifier: (MIT OR GPL-2.0-only) */
/*
 * Reports every change of a WireGuard peer's endpoint, at the one function that
 * all of them go through: wg_socket_set_peer_endpoint().
 *
 * The kernel calls it after a packet has been authenticated (receive.c: data
 * packets past the replay counter, handshake initiations and responses past
 * the decryption), and from set_peer() in netlink.c. It is called for every
 * authenticated data packet, and compares inside; so do we, first of all.
 */
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "peer.h"
#include "wireguard.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define MESSAGE_HANDSHAKE_RESPONSE 2 /* messages.h, enum message_type */

/* The devices that user space wants to hear of. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct device_id);
	__type(value, __u8);
} devices SEC(".maps");

/* The newest event of every peer that has changed: the truth to which user
 * space returns when the ring buffer was full. Least recently changed peers
 * make room; user space sizes it to the number of peers. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct peer_event);
} latest SEC(".maps");

/* The ring buffer, and how many events found it full. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct peer_event);
} events SEC(".maps");

__u64 events_lost;

/* A handshake message that this task is just now taking an endpoint from. */
struct handshake {
	__u64 peer;
	__u32 type;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64); /* pid_tgid of the worker */
	__type(value, struct handshake);
} handshakes SEC(".maps");

static __always_inline bool same_address(const struct endpoint *a, const struct endpoint *b)
{
	if (a->addr.sa_family != b->addr.sa_family)
		return false;

	/* The common case first: one port and one word of address to compare.
	 * sin_port and sin6_port share their place. */
	if (a->addr4.sin_port != b->addr4.sin_port)
		return false;
	if (a->addr.sa_family == AF_INET)
		return a->addr4.sin_addr.s_addr == b->addr4.sin_addr.s_addr;

	return a->addr6.sin6_addr.in6_u.u6_addr32[3] == b->addr6.sin6_addr.in6_u.u6_addr32[3] &&
	       a->addr6.sin6_addr.in6_u.u6_addr32[2] == b->addr6.sin6_addr.in6_u.u6_addr32[2] &&
	       a->addr6.sin6_addr.in6_u.u6_addr32[1] == b->addr6.sin6_addr.in6_u.u6_addr32[1] &&
	       a->addr6.sin6_addr.in6_u.u6_addr32[0] == b->addr6.sin6_addr.in6_u.u6_addr32[0] &&
	       a->addr6.sin6_scope_id == b->addr6.sin6_scope_id;
}

static __always_inline void copy_endpoint(struct peer_endpoint *to, const struct endpoint *from)
{
	__u32 *addr = (__u32 *)to->addr;

	to->family = from->addr.sa_family;
	if (to->family == AF_INET) {
		to->port = from->addr4.sin_port;
		addr[0] = from->addr4.sin_addr.s_addr;
	} else if (to->family == AF_INET6) {
		to->port = from->addr6.sin6_port;
		to->scope = from->addr6.sin6_scope_id;
		addr[0] = from->addr6.sin6_addr.in6_u.u6_addr32[0];
		addr[1] = from->addr6.sin6_addr.in6_u.u6_addr32[1];
		addr[2] = from->addr6.sin6_addr.in6_u.u6_addr32[2];
		addr[3] = from->addr6.sin6_addr.in6_u.u6_addr32[3];
	}
}

/* An endpoint from a packet carries the local address that the packet came to;
 * set_peer() in netlink.c builds one from the sockaddr alone (socket.c:235
 * wg_socket_endpoint_from_skb, netlink.c:435). So a source of all zeroes is
 * the mark of configuration, and the guard against our own applier's echo. */
static __always_inline bool is_configured(const struct endpoint *ep)
{
	if (ep->addr.sa_family == AF_INET)
		return !ep->src4.s_addr && !ep->src_if4;
	return !ep->src6.in6_u.u6_addr32[0] && !ep->src6.in6_u.u6_addr32[1] &&
	       !ep->src6.in6_u.u6_addr32[2] && !ep->src6.in6_u.u6_addr32[3];
}

static __always_inline __u8 cause_of(struct wg_peer *peer, const struct endpoint *endpoint)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct handshake *hs;

	if (is_configured(endpoint))
		return CAUSE_CONFIG;

	hs = bpf_map_lookup_elem(&handshakes, &task);
	/* The peer is compared because a softirq can run on top of the worker
	 * and bring another peer's data. */
	if (!hs || hs->peer != (__u64)peer)
		return CAUSE_DATA;
	return hs->type == MESSAGE_HANDSHAKE_RESPONSE ? CAUSE_RESPONSE : CAUSE_INITIATION;
}

/* Fills in what all events of a peer have in common. False: nobody asked for
 * its device, which is another namespace's or another daemon's. */
static __always_inline bool begin_event(struct peer_event *event, struct wg_peer *peer)
{
	struct net_device *dev = peer->device->dev;
	struct device_id id = {
		.ifindex = dev->ifindex,
		.netns = dev->nd_net.net->ns.inum,
	};
	const __u64 *key;

	if (!bpf_map_lookup_elem(&devices, &id))
		return false;

	event->internal_id = peer->internal_id;
	event->boot_ns = bpf_ktime_get_boot_ns();
	event->ifindex = id.ifindex;
	event->netns = id.netns;
	/* Plain loads instead of a helper: they work under lockdown as well. */
	key = (const __u64 *)peer->handshake.remote_static;
	((__u64 *)event->public_key)[0] = key[0];
	((__u64 *)event->public_key)[1] = key[1];
	((__u64 *)event->public_key)[2] = key[2];
	((__u64 *)event->public_key)[3] = key[3];
	return true;
}

static __always_inline void send_event(struct peer_event *event)
{
	if (bpf_ringbuf_output(&events, event, sizeof(*event), 0))
		__sync_fetch_and_add(&events_lost, 1);
}

static __always_inline void report_change(struct wg_peer *peer, const struct endpoint *endpoint)
{
	struct peer_event event = {};

	/* Not our device. */
	if (!begin_event(&event, peer))
		return;
	event.cause = cause_of(peer, endpoint);
	copy_endpoint(&event.old_endpoint, &peer->endpoint);
	copy_endpoint(&event.new_endpoint, endpoint);

	/* The map first: whoever is told of a lost event must find it there. */
	bpf_map_update_elem(&latest, &event.internal_id, &event, BPF_ANY);
	send_event(&event);
}

SEC("fentry/wg_socket_set_peer_endpoint")
int BPF_PROG(set_peer_endpoint, struct wg_peer *peer, const struct endpoint *endpoint)
{
	/* Not a roam. Every authenticated data packet of a peer that stays
	 * where it is ends here: no map, no helper. A change of our own local
	 * address ends here as well. */
	if (!same_address(&peer->endpoint, endpoint))
		report_change(peer, endpoint);
	return 0;
}

/* The end of a handshake, which proves that its beginning was not a replay. The
 * kernel takes the endpoint of the packet before it comes here (receive.c:343,
 * wg_packet_consume_data_done, and 172). */
SEC("fentry/wg_timers_handshake_complete")
int BPF_PROG(handshake_complete, struct wg_peer *peer)
{
	struct peer_event event = {};

	/* Not our device. */
	if (!begin_event(&event, peer))
		return 0;
	event.cause = CAUSE_CONFIRMED;
	copy_endpoint(&event.new_endpoint, &peer->endpoint);
	send_event(&event);
	return 0;
}

/* Both handshake messages take this way to wg_socket_set_peer_endpoint() (and
 * data packets do not: receive.c:150, 172), which does not see the packet. */
SEC("fentry/wg_socket_set_peer_endpoint_from_skb")
int BPF_PROG(handshake_enter, struct wg_peer *peer, const struct sk_buff *skb)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct handshake hs = { .peer = (__u64)peer };

	/* An unreadable packet leaves the type 0 and counts as an initiation, the
	 * weaker evidence. */
	bpf_probe_read_kernel(&hs.type, sizeof(hs.type), skb->data);
	bpf_map_update_elem(&handshakes, &task, &hs, BPF_ANY);
	return 0;
}

SEC("fexit/wg_socket_set_peer_endpoint_from_skb")
int BPF_PROG(handshake_exit, struct wg_peer *peer, const struct sk_buff *skb)
{
	__u64 task = bpf_get_current_pid_tgid();

	bpf_map_delete_elem(&handshakes, &task);
	return 0;
}
