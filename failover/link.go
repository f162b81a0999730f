// SPDX-License-Identifier: MIT

package failover

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A link that is set down loses its IPv6 addresses and its routes, in whatever
// table. What its owner made of them is kept as the kernel tells it, and given back
// as it is: the messages of a dump are good for making the same again, as ip route
// save and restore do it. IPv4 addresses and routing rules stay by themselves.

// settings are an interface's messages of RTM_NEWADDR, RTM_NEWNEXTHOP and
// RTM_NEWROUTE.
type settings struct {
	Addrs [][]byte `json:"addrs,omitempty"`
	// Nexthops are those of the interface, and the groups that have one of them.
	Nexthops [][]byte `json:"nexthops,omitempty"`
	Routes   [][]byte `json:"routes,omitempty"`
}

// add adds what is new in s.
func (s *settings) add(more settings) {
	s.Addrs, s.Nexthops, s.Routes = union(s.Addrs, more.Addrs), union(s.Nexthops, more.Nexthops), union(s.Routes, more.Routes)
}

// count returns how many things there are.
func (s *settings) count() int { return len(s.Addrs) + len(s.Nexthops) + len(s.Routes) }

func union(a, b [][]byte) [][]byte {
	has := index(a)
	for _, m := range b {
		if !has[string(m)] {
			a = append(a, m)
		}
	}
	return a
}

// index makes a set of messages: a device can have a route for each of its peers.
func index(all [][]byte) map[string]bool {
	out := make(map[string]bool, len(all))
	for _, m := range all {
		out[string(m)] = true
	}
	return out
}

// readSettings reads what an interface of this thread's network namespace would
// lose.
func readSettings(ifindex int) (s settings, err error) {
	of := nl.NewIfAddrmsg(unix.AF_INET6)
	of.Index = uint32(ifindex)
	err = dump(unix.RTM_GETADDR, unix.RTM_NEWADDR, func(m []byte) {
		if len(m) >= unix.SizeofIfAddrmsg && int(nl.DeserializeIfAddrmsg(m).Index) == ifindex {
			m = bytes.Clone(m)
			if info := attribute(m, unix.SizeofIfAddrmsg, unix.IFA_CACHEINFO); len(info) >= 16 {
				clear(info[8:16]) // when it was made and changed: nothing that can be given back
			}
			s.Addrs = append(s.Addrs, m)
		}
	}, of)
	var all [][]byte
	err = errors.Join(err, dump(unix.RTM_GETNEXTHOP, unix.RTM_NEWNEXTHOP, func(m []byte) {
		if len(m) >= unix.SizeofNhmsg {
			all = append(all, bareNexthop(m))
		}
	}, nhmsg))
	s.Nexthops = nexthopsOf(all, ifindex)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		err = errors.Join(err, dump(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, func(m []byte) {
			if s.hasRoute(m, ifindex) {
				s.Routes = append(s.Routes, bareRoute(m))
			}
		}, &nl.RtMsg{RtMsg: unix.RtMsg{Family: family}}, nl.NewRtAttr(unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(ifindex)))))
	}
	return s, err
}

// nhmsg asks for all nexthop objects: eight zeros, as struct ifaddrmsg has them, too.
var nhmsg = nl.NewIfAddrmsg(unix.AF_UNSPEC)

// rtaNHID is RTA_NH_ID of linux/rtnetlink.h: the route leads to a nexthop object.
const rtaNHID = 30

// left are the protocols of routes that somebody makes again: the kernel, or a
// daemon, which would be surprised by one of its routes that it has not made.
var left = []uint8{
	unix.RTPROT_REDIRECT, unix.RTPROT_KERNEL, unix.RTPROT_RA,
	unix.RTPROT_GATED, unix.RTPROT_MRT, unix.RTPROT_ZEBRA, unix.RTPROT_BIRD, unix.RTPROT_DNROUTED, unix.RTPROT_XORP,
	unix.RTPROT_NTK, unix.RTPROT_MROUTED, unix.RTPROT_KEEPALIVED, unix.RTPROT_BABEL, unix.RTPROT_OVN, unix.RTPROT_OPENR,
	unix.RTPROT_BGP, unix.RTPROT_ISIS, unix.RTPROT_OSPF, unix.RTPROT_RIP, unix.RTPROT_EIGRP,
}

// hasRoute reports whether a route leads to the interface of s and has to be kept.
func (s *settings) hasRoute(m []byte, ifindex int) bool {
	if len(m) < unix.SizeofRtMsg {
		return false
	}
	msg := nl.DeserializeRtMsg(m)
	if slices.Contains(left, msg.Protocol) || msg.Flags&unix.RTM_F_CLONED != 0 {
		return false
	}
	if id := attribute(m, unix.SizeofRtMsg, rtaNHID); id != nil {
		return slices.ContainsFunc(s.Nexthops, func(m []byte) bool { return bytes.Equal(attribute(m, unix.SizeofNhmsg, unix.NHA_ID), id) })
	}
	ours := isIndex(attribute(m, unix.SizeofRtMsg, unix.RTA_OIF), ifindex)
	hops(attribute(m, unix.SizeofRtMsg, unix.RTA_MULTIPATH), func(hop []byte) {
		ours = ours || isIndex(hop[4:8], ifindex)
	})
	return ours
}

func isIndex(b []byte, ifindex int) bool {
	return len(b) == 4 && int(binary.NativeEndian.Uint32(b)) == ifindex
}

// bareRoute returns a copy of a route without what the kernel says of its state,
// and does not accept for a new one (fib_semantics.c, fib_create_info).
func bareRoute(m []byte) []byte {
	m = without(m, unix.SizeofRtMsg, unix.RTA_CACHEINFO)
	if attribute(m, unix.SizeofRtMsg, rtaNHID) != nil {
		// It shows the object as well.
		m = without(m, unix.SizeofRtMsg, unix.RTA_OIF, unix.RTA_GATEWAY, unix.RTA_VIA, unix.RTA_MULTIPATH, unix.RTA_ENCAP, unix.RTA_ENCAP_TYPE)
	}
	flags := binary.NativeEndian.Uint32(m[8:]) & unix.RTNH_F_ONLINK
	binary.NativeEndian.PutUint32(m[8:], flags)
	hops(attribute(m, unix.SizeofRtMsg, unix.RTA_MULTIPATH), func(hop []byte) { hop[2] &= unix.RTNH_F_ONLINK })
	return m
}

// hops calls each for every struct rtnexthop of a route's RTA_MULTIPATH.
func hops(multipath []byte, each func([]byte)) {
	for len(multipath) >= unix.SizeofRtNexthop {
		size := int(binary.NativeEndian.Uint16(multipath))
		if size < unix.SizeofRtNexthop || size > len(multipath) {
			return
		}
		each(multipath[:size])
		multipath = multipath[min((size+3)&^3, len(multipath)):]
	}
}

// Of linux/nexthop.h: attributes of a dump that a new object cannot have.
const (
	nhaOpFlags     = 14
	nhaGroupStats  = 15
	nhaHWStatsUsed = 17
)

// bareNexthop is bareRoute for a nexthop object (nexthop.c, rtm_to_nh_config).
func bareNexthop(m []byte) []byte {
	m = without(m, unix.SizeofNhmsg, nhaOpFlags, nhaGroupStats, nhaHWStatsUsed)
	m[1] = 0 // the scope
	flags := binary.NativeEndian.Uint32(m[4:]) & unix.RTNH_F_ONLINK
	binary.NativeEndian.PutUint32(m[4:], flags)
	return m
}

// nexthopsOf returns those of all objects that lead to an interface, and then the
// groups with one of them.
func nexthopsOf(all [][]byte, ifindex int) (ours [][]byte) {
	var ids []uint32
	for _, m := range all {
		if isIndex(attribute(m, unix.SizeofNhmsg, unix.NHA_OIF), ifindex) {
			ours, ids = append(ours, m), append(ids, nexthopID(m))
		}
	}
	for _, m := range all {
		if slices.ContainsFunc(members(m), func(id uint32) bool { return slices.Contains(ids, id) }) {
			ours = append(ours, m)
		}
	}
	return ours
}

func nexthopID(m []byte) uint32 {
	if id := attribute(m, unix.SizeofNhmsg, unix.NHA_ID); len(id) == 4 {
		return binary.NativeEndian.Uint32(id)
	}
	return 0
}

// members returns the objects of a group; nil for a single one.
func members(m []byte) (ids []uint32) {
	const size = 8 // of struct nexthop_grp
	for g := attribute(m, unix.SizeofNhmsg, unix.NHA_GROUP); len(g) >= size; g = g[size:] {
		ids = append(ids, binary.NativeEndian.Uint32(g))
	}
	return ids
}

// give gives an interface those of its settings back that it does not have. What it
// cannot be given is an error, after all the others.
func (s settings) give(ifindex int) error {
	now, err := readSettings(ifindex)
	if err != nil {
		return err
	}
	conn, err := openSocket()
	if err != nil {
		return err
	}
	defer conn.close()
	// The kernel puts a new address before the others of its scope, and sends from
	// the first (addrconf.c, ipv6_link_dev_addr): the last one first.
	var addrs, nexthops, routes missing
	has := index(now.Addrs)
	for _, m := range slices.Backward(s.Addrs) {
		if !has[string(m)] {
			addrs.add(m, conn.request(unix.RTM_NEWADDR, m))
		}
	}
	has = index(now.Nexthops)
	for _, m := range s.Nexthops {
		if !has[string(m)] {
			nexthops.add(m, s.requestNexthop(conn, m))
		}
	}
	// Those by way of others come after the others.
	ordered := slices.Clone(s.Routes)
	slices.SortStableFunc(ordered, func(a, b []byte) int { return cmp.Compare(gateways(a), gateways(b)) })
	has = index(now.Routes)
	for _, m := range ordered {
		if !has[string(m)] {
			routes.add(m, conn.request(unix.RTM_NEWROUTE, m))
		}
	}
	// Or they lead by way of one that came after them.
	again := routes.of
	routes = missing{}
	for _, m := range again {
		routes.add(m, conn.request(unix.RTM_NEWROUTE, m))
	}
	if now, err = readSettings(ifindex); err != nil {
		return err
	}
	inPlace := 0
	has, failed := index(now.Routes), index(routes.of)
	for _, m := range s.Routes {
		if !has[string(m)] && !failed[string(m)] {
			inPlace++
		}
	}
	if inPlace > 0 {
		err = fmt.Errorf("%d routes are not back: others are in their place", inPlace)
	}
	return errors.Join(addrs.err("addresses"), nexthops.err("nexthops"), routes.err("routes"), err)
}

// missing is what could not be made.
type missing struct {
	of    [][]byte
	first error
}

func (f *missing) add(m []byte, err error) {
	if err == nil {
		return
	}
	if f.first == nil {
		f.first = err
	}
	f.of = append(f.of, m)
}

func (f *missing) err(what string) error {
	if f.first == nil {
		return nil
	}
	return fmt.Errorf("%d %s are not back, the first because: %w", len(f.of), what, f.first)
}

// requestNexthop makes a nexthop object, unless it is there. A group is there, but
// for those of its members that went with the link.
func (s *settings) requestNexthop(conn sockets, m []byte) error {
	want := members(m)
	if want == nil {
		return conn.request(unix.RTM_NEWNEXTHOP, m)
	}
	var rest []uint32
	err := dump(unix.RTM_GETNEXTHOP, unix.RTM_NEWNEXTHOP, func(now []byte) {
		if len(now) >= unix.SizeofNhmsg && nexthopID(now) == nexthopID(m) {
			rest = members(now)
		}
	}, nhmsg)
	if err != nil {
		return err
	}
	want = slices.DeleteFunc(want, func(id uint32) bool {
		return slices.ContainsFunc(s.Nexthops, func(m []byte) bool { return members(m) == nil && nexthopID(m) == id })
	})
	if len(rest) == 0 {
		return conn.request(unix.RTM_NEWNEXTHOP, m)
	}
	if !slices.Equal(rest, want) {
		return fmt.Errorf("the nexthop group %d has been changed", nexthopID(m))
	}
	req := nl.NewNetlinkRequest(unix.RTM_NEWNEXTHOP, unix.NLM_F_REPLACE|unix.NLM_F_ACK)
	req.AddRawData(m)
	_, err = req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func gateways(m []byte) int {
	if attribute(m, unix.SizeofRtMsg, unix.RTA_GATEWAY) != nil || attribute(m, unix.SizeofRtMsg, unix.RTA_VIA) != nil {
		return 1
	}
	return 0
}

// sockets are what the requests of one thread share, for a socket for each would take
// longer than what it is for.
type sockets map[int]*nl.SocketHandle

func openSocket() (sockets, error) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.SetSendTimeout(&nl.SocketTimeoutTv), s.SetReceiveTimeout(&nl.SocketTimeoutTv)); err != nil {
		s.Close()
		return nil, err
	}
	return sockets{unix.NETLINK_ROUTE: {Socket: s}}, nil
}

func (s sockets) close() { s[unix.NETLINK_ROUTE].Close() }

// request sends a message that makes something, unless it is there.
func (s sockets) request(kind int, m []byte) error {
	req := nl.NewNetlinkRequest(kind, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.Sockets = s
	req.AddRawData(m)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// dump calls each for every message of a dump. The kernel leaves out what the query does
// not ask for, such as a million routes of other interfaces, or sends all (before Linux 4.20).
func dump(kind int, answer uint16, each func([]byte), query ...nl.NetlinkRequestData) error {
	sockets, err := openSocket()
	if err != nil {
		return err
	}
	defer sockets.close()
	_ = unix.SetsockoptInt(sockets[unix.NETLINK_ROUTE].Socket.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	for range 10 {
		req := nl.NewNetlinkRequest(kind, unix.NLM_F_DUMP)
		req.Sockets = sockets
		for _, q := range query {
			req.AddData(q)
		}
		messages, err := req.Execute(unix.NETLINK_ROUTE, answer)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue // something may be missing
		}
		if err != nil {
			return err
		}
		for _, m := range messages {
			each(m)
		}
		return nil
	}
	return netlink.ErrDumpInterrupted
}

// attributes calls each for every attribute after a header of that size, with the
// bytes of it whole, until that says false.
func attributes(m []byte, header int, each func(kind uint16, whole, value []byte) bool) {
	for m = m[header:]; len(m) >= unix.SizeofRtAttr; {
		size, kind := int(binary.NativeEndian.Uint16(m)), binary.NativeEndian.Uint16(m[2:])
		if size < unix.SizeofRtAttr || size > len(m) {
			return
		}
		padded := min((size+3)&^3, len(m))
		if !each(kind&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), m[:padded], m[unix.SizeofRtAttr:size]) {
			return
		}
		m = m[padded:]
	}
}

// attribute returns an attribute's value, or nil.
func attribute(m []byte, header int, want uint16) (found []byte) {
	attributes(m, header, func(kind uint16, _, value []byte) bool {
		if kind == want {
			found = value
		}
		return found == nil
	})
	return found
}

// without returns a copy of m that lacks some attributes.
func without(m []byte, header int, unwanted ...uint16) []byte {
	out := bytes.Clone(m[:header])
	attributes(m, header, func(kind uint16, whole, _ []byte) bool {
		if !slices.Contains(unwanted, kind) {
			out = append(out, whole...)
		}
		return true
	})
	return out
}

// setLink sets an interface of this thread's network namespace up or down.
func setLink(ifindex int, up bool) error {
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	set, what := netlink.LinkSetDown, "down"
	if up {
		set, what = netlink.LinkSetUp, "up"
	}
	if err := set(link); err != nil {
		return fmt.Errorf("set the link %s: %w", what, err)
	}
	return nil
}

// netnsCookie returns the cookie of this thread's network namespace.
func netnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}
