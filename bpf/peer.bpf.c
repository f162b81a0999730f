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
 *
 * This file is compiled twice. With KPROBE, it is for kernels that cannot attach
 * fentry programs to functions of modules: arm64 before 6.4.
 */
#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "peer.h"
#include "wireguard.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* The verifier knows the types of a fentry program's arguments and lets it load
 * through them. A kprobe program has the registers only, and needs a helper for
 * every load. It is also skipped while any other kprobe program runs on the same
 * CPU (kernel/trace/bpf_trace.c, trace_call_bpf: bpf_prog_active), that of a
 * tracer that the administrator runs included. User space looks at the count of
 * that (Linux 6.7), and at gaps between events. */
#ifdef KPROBE
#define ENTER(function) SEC("kprobe/" function)
#define LEAVE(function) SEC("kretprobe/" function)
#define PROG BPF_KPROBE
#define READ(field)                                                                                \
	({                                                                                         \
		__typeof_unqual__(field) value;                                                    \
		bpf_core_read(&value, sizeof(value), &(field));                                    \
		value;                                                                             \
	})
#else
#define ENTER(function) SEC("fentry/" function)
#define LEAVE(function) SEC("fexit/" function)
#define PROG BPF_PROG
#define READ(field) (field)
#endif

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
	__type(value, struct peer_state);
} latest SEC(".maps");

/* The ring buffer, and how many events found it, or the map, full. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__type(value, struct peer_event);
} events SEC(".maps");

__u64 events_lost;

/* How many events were held back: by the limit for their peer, and by that for
 * all. After the latter, user space looks at all peers. */
__u64 events_limited;
__u64 events_limited_all;

/* LIMIT_ALL, which a test can lower. */
const volatile __u32 limit_all = LIMIT_ALL;

/* The window of the newest event in the upper half, and in the lower how many
 * events of all peers there were in it. */
__u64 sent_by_all;

/* A handshake message that this task is just now taking an endpoint from. A probe
 * at the function's return can be missed, and then the entry stays: after a while it
 * means nothing. */
#define HANDSHAKE_NS 10000000000ULL

struct handshake {
	__u64 peer;
	__u64 boot_ns;
	__u32 type;
	__u32 pad;
};

/* Not LRU, which makes room before it is full, and not of what is left over. There is a
 * worker for each device and processor. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64); /* pid_tgid of the worker */
	__type(value, struct handshake);
} handshakes SEC(".maps");

/* CLOCK_BOOTTIME of the newest handshake message that found no room there. */
__u64 unnoted;

/* How often a device was given a peer or another private key. They make no event, and
 * are reason for a dump. */
__u64 configured;

static __always_inline bool same_address(const struct endpoint *a, const struct endpoint *b)
{
	__u16 family = READ(a->addr.sa_family);

	if (family != READ(b->addr.sa_family))
		return false;

	/* The common case first: one port and one word of address to compare.
	 * sin_port and sin6_port share their place. */
	if (READ(a->addr4.sin_port) != READ(b->addr4.sin_port))
		return false;
	if (family == AF_INET)
		return READ(a->addr4.sin_addr.s_addr) == READ(b->addr4.sin_addr.s_addr);

	return READ(a->addr6.sin6_addr.in6_u.u6_addr32[3]) ==
		       READ(b->addr6.sin6_addr.in6_u.u6_addr32[3]) &&
	       READ(a->addr6.sin6_addr.in6_u.u6_addr32[2]) ==
		       READ(b->addr6.sin6_addr.in6_u.u6_addr32[2]) &&
	       READ(a->addr6.sin6_addr.in6_u.u6_addr32[1]) ==
		       READ(b->addr6.sin6_addr.in6_u.u6_addr32[1]) &&
	       READ(a->addr6.sin6_addr.in6_u.u6_addr32[0]) ==
		       READ(b->addr6.sin6_addr.in6_u.u6_addr32[0]) &&
	       READ(a->addr6.sin6_scope_id) == READ(b->addr6.sin6_scope_id);
}

static __always_inline void copy_endpoint(struct peer_endpoint *to, const struct endpoint *from)
{
	__u32 *addr = (__u32 *)to->addr;

	to->family = READ(from->addr.sa_family);
	if (to->family == AF_INET) {
		to->port = READ(from->addr4.sin_port);
		addr[0] = READ(from->addr4.sin_addr.s_addr);
	} else if (to->family == AF_INET6) {
		to->port = READ(from->addr6.sin6_port);
		to->scope = READ(from->addr6.sin6_scope_id);
		addr[0] = READ(from->addr6.sin6_addr.in6_u.u6_addr32[0]);
		addr[1] = READ(from->addr6.sin6_addr.in6_u.u6_addr32[1]);
		addr[2] = READ(from->addr6.sin6_addr.in6_u.u6_addr32[2]);
		addr[3] = READ(from->addr6.sin6_addr.in6_u.u6_addr32[3]);
	}
}

/* An endpoint from a packet carries the local address that the packet came to;
 * set_peer() in netlink.c builds one from the sockaddr alone (socket.c:235
 * wg_socket_endpoint_from_skb, netlink.c:435). So a source of all zeroes is
 * the mark of configuration, and the guard against our own applier's echo. */
static __always_inline bool is_configured(const struct endpoint *ep)
{
	if (READ(ep->addr.sa_family) == AF_INET)
		return !READ(ep->src4.s_addr) && !READ(ep->src_if4);
	return !READ(ep->src6.in6_u.u6_addr32[0]) && !READ(ep->src6.in6_u.u6_addr32[1]) &&
	       !READ(ep->src6.in6_u.u6_addr32[2]) && !READ(ep->src6.in6_u.u6_addr32[3]);
}

/* Signed, for the clock may step back a little (timekeeping.c,
 * ktime_get_mono_fast_ns). */
static __always_inline bool is_over(__u64 boot_ns)
{
	return (__s64)(bpf_ktime_get_boot_ns() - boot_ns) > (__s64)HANDSHAKE_NS;
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
	if (hs && hs->peer == (__u64)peer && !is_over(hs->boot_ns))
		return hs->type == MESSAGE_HANDSHAKE_RESPONSE ? CAUSE_RESPONSE : CAUSE_INITIATION;
	/* A handshake, maybe: the weaker evidence. */
	if (unnoted && !is_over(unnoted))
		return CAUSE_INITIATION;
	return CAUSE_DATA;
}

/* False: nobody asked for the device, which is another namespace's or another
 * daemon's. */
static __always_inline bool is_followed(struct wg_device *wg, struct device_id *id)
{
	struct net_device *dev = READ(wg->dev);
	struct net *net = READ(dev->nd_net.net);

	id->ifindex = READ(dev->ifindex);
	id->netns = READ(net->ns.inum);
	return bpf_map_lookup_elem(&devices, id);
}

/* Fills in what all events of a peer have in common. False: not our device. */
static __always_inline bool begin_event(struct peer_event *event, struct wg_peer *peer)
{
	struct device_id id;
	const __u64 *key;

	if (!is_followed(READ(peer->device), &id))
		return false;

	event->internal_id = READ(peer->internal_id);
	event->boot_ns = bpf_ktime_get_boot_ns();
	event->ifindex = id.ifindex;
	event->netns = id.netns;
	key = (const __u64 *)peer->handshake.remote_static;
	((__u64 *)event->public_key)[0] = READ(key[0]);
	((__u64 *)event->public_key)[1] = READ(key[1]);
	((__u64 *)event->public_key)[2] = READ(key[2]);
	((__u64 *)event->public_key)[3] = READ(key[3]);
	return true;
}

static __always_inline void send_event(struct peer_event *event)
{
	if (bpf_ringbuf_output(&events, event, sizeof(*event), 0))
		__sync_fetch_and_add(&events_lost, 1);
}

/* Whether the limit for all peers leaves room for one more event. */
static __always_inline bool room_for_all(__u64 window)
{
	__u64 fresh = window << 32;
	__u64 seen = *(volatile __u64 *)&sent_by_all;

	/* The first in its window starts to count anew, unless another CPU just has. */
	if (seen < fresh && __sync_val_compare_and_swap(&sent_by_all, seen, fresh + 1) == seen)
		return true;
	return (__u32)__sync_fetch_and_add(&sent_by_all, 1) < limit_all;
}

static __always_inline void report_change(struct wg_peer *peer, const struct endpoint *endpoint)
{
	struct peer_state state = {}, *last;

	/* Not our device. */
	if (!begin_event(&state.event, peer))
		return;
	state.event.cause = cause_of(peer, endpoint);
	copy_endpoint(&state.event.old_endpoint, &peer->endpoint);
	copy_endpoint(&state.event.new_endpoint, endpoint);
	state.peer = (__u64)peer;
	state.window = state.event.boot_ns / LIMIT_WINDOW_NS;

	/* Two CPUs can both take what they find for theirs to count on: then there
	 * are a few events more. */
	last = bpf_map_lookup_elem(&latest, &state.event.internal_id);
	if (last && last->window == state.window)
		state.sent = last->sent;
	if (state.sent <= LIMIT_PEER)
		state.sent++;

	/* The map first: whoever is told of a lost event must find it there. */
	if (bpf_map_update_elem(&latest, &state.event.internal_id, &state, BPF_ANY))
		__sync_fetch_and_add(&events_lost, 1);
	if (state.sent > LIMIT_PEER)
		__sync_fetch_and_add(&events_limited, 1);
	else if (!room_for_all(state.window))
		__sync_fetch_and_add(&events_limited_all, 1);
	else
		send_event(&state.event);
}

ENTER("wg_socket_set_peer_endpoint")
int PROG(set_peer_endpoint, struct wg_peer *peer, const struct endpoint *endpoint)
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
 * wg_packet_consume_data_done, and 172). No limit: a handshake costs both sides
 * more than its event, and there is none within 20 ms of another (noise.c:633,
 * INITIATIONS_PER_SECOND). */
ENTER("wg_timers_handshake_complete")
int PROG(handshake_complete, struct wg_peer *peer)
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
ENTER("wg_socket_set_peer_endpoint_from_skb")
int PROG(handshake_enter, struct wg_peer *peer, const struct sk_buff *skb)
{
	__u64 task = bpf_get_current_pid_tgid();
	struct handshake hs = { .peer = (__u64)peer, .boot_ns = bpf_ktime_get_boot_ns() };

	/* An unreadable packet leaves the type 0 and counts as an initiation, the
	 * weaker evidence. */
	bpf_probe_read_kernel(&hs.type, sizeof(hs.type), READ(skb->data));
	/* Full of what is left over: the event will lack its cause, as good as lost. */
	if (bpf_map_update_elem(&handshakes, &task, &hs, BPF_ANY)) {
		unnoted = hs.boot_ns;
		__sync_fetch_and_add(&events_lost, 1);
	}
	return 0;
}

LEAVE("wg_socket_set_peer_endpoint_from_skb")
int PROG(handshake_exit)
{
	__u64 task = bpf_get_current_pid_tgid();

	bpf_map_delete_elem(&handshakes, &task);
	return 0;
}

static __always_inline void count_configured(struct wg_device *wg)
{
	struct device_id id;

	if (is_followed(wg, &id))
		__sync_fetch_and_add(&configured, 1);
}

/* A new peer has no endpoint, which set_peer() gives it afterwards, if at all
 * (netlink.c). */
ENTER("wg_peer_create")
int PROG(peer_created, struct wg_device *wg)
{
	count_configured(wg);
	return 0;
}

/* Called for another private key only (netlink.c, wg_set_device). */
ENTER("wg_cookie_checker_precompute_device_keys")
int PROG(key_changed, struct cookie_checker *checker)
{
	count_configured(READ(checker->device));
	return 0;
}

/* Where the device has a peer now, in the bytes of a sockaddr. */
struct outer {
	__u16 family;
	__be16 port;
	__u32 word[6];
};

struct peer_endpoint looked;

/* What user space runs, one at a time, to see where the device has the peer
 * that args[0] is the internal_id of, into looked. 0: the peer has not changed
 * yet, or is gone.
 *
 * This closes the gap that set_peer_endpoint leaves, which decides before the
 * kernel does: a packet that it sees as no change is one when another CPU writes
 * in between. */
SEC("raw_tp/look")
int look(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 id = ctx->args[0], found = 0;
	struct peer_state *state = bpf_map_lookup_elem(&latest, &id);
	__u32 *addr = (__u32 *)looked.addr;
	struct outer outer = {};
	struct wg_peer *peer;

	if (!state)
		return 0;
	/* The kernel may have freed it. No two peers have the same internal_id
	 * (peer.c, wg_peer_create), and what is freed is zeroed (peer.c, rcu_release). */
	peer = (struct wg_peer *)state->peer;
	/* The number last: whose it still is then, it was all the time. */
	if (bpf_core_read(&outer, sizeof(outer), &peer->endpoint.addr) ||
	    bpf_core_read(&found, sizeof(found), &peer->internal_id) || found != id)
		return 0;
	looked.family = outer.family;
	looked.port = outer.port;
	if (outer.family == AF_INET) {
		addr[0] = outer.word[0];
	} else {
		/* Behind sin6_flowinfo. */
		addr[0] = outer.word[1];
		addr[1] = outer.word[2];
		addr[2] = outer.word[3];
		addr[3] = outer.word[4];
	}
	return 1;
}
