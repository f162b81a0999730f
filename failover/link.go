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

// settings are an interface's messages of RTM_NEWADDR and RTM_NEWROUTE.
type settings struct {
	Addrs  [][]byte `json:"addrs,omitempty"`
	Routes [][]byte `json:"routes,omitempty"`
}

// add adds what is new in s.
func (s *settings) add(more settings) {
	s.Addrs, s.Routes = union(s.Addrs, more.Addrs), union(s.Routes, more.Routes)
}

func union(a, b [][]byte) [][]byte {
	for _, m := range b {
		if !has(a, m) {
			a = append(a, m)
		}
	}
	return a
}

func has(all [][]byte, m []byte) bool {
	return slices.ContainsFunc(all, func(o []byte) bool { return bytes.Equal(o, m) })
}

// readSettings reads what an interface of this thread's network namespace would
// lose.
func readSettings(ifindex int) (s settings, err error) {
	err = dump(unix.RTM_GETADDR, nl.NewIfAddrmsg(unix.AF_INET6), unix.RTM_NEWADDR, func(m []byte) {
		if len(m) >= unix.SizeofIfAddrmsg && int(nl.DeserializeIfAddrmsg(m).Index) == ifindex {
			m = bytes.Clone(m)
			if info := attribute(m, unix.SizeofIfAddrmsg, unix.IFA_CACHEINFO); len(info) >= 16 {
				clear(info[8:16]) // when it was made and changed: nothing that can be given back
			}
			s.Addrs = append(s.Addrs, m)
		}
	})
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		err = errors.Join(err, dump(unix.RTM_GETROUTE, &nl.RtMsg{RtMsg: unix.RtMsg{Family: uint8(family)}}, unix.RTM_NEWROUTE, func(m []byte) {
			if routeOf(m, ifindex) {
				s.Routes = append(s.Routes, without(m, unix.SizeofRtMsg, unix.RTA_CACHEINFO))
			}
		}))
	}
	return s, err
}

// routeOf reports whether a route leads to an interface and has to be kept: the
// kernel makes its own again, and so does a routing daemon.
func routeOf(m []byte, ifindex int) bool {
	if len(m) < unix.SizeofRtMsg {
		return false
	}
	msg := nl.DeserializeRtMsg(m)
	if msg.Protocol != unix.RTPROT_BOOT && msg.Protocol != unix.RTPROT_STATIC || msg.Flags&unix.RTM_F_CLONED != 0 {
		return false
	}
	oif := attribute(m, unix.SizeofRtMsg, unix.RTA_OIF)
	return len(oif) == 4 && int(binary.NativeEndian.Uint32(oif)) == ifindex
}

// give gives an interface those of its settings back that it does not have. What it
// cannot be given is an error, after all the others.
func (s settings) give(ifindex int) error {
	now, err := readSettings(ifindex)
	if err != nil {
		return err
	}
	// The kernel puts a new address before the others of its scope, and sends from
	// the first (addrconf.c, ipv6_link_dev_addr): the last one first.
	var addrs, routes missing
	for _, m := range slices.Backward(s.Addrs) {
		if !has(now.Addrs, m) {
			addrs.add(m, request(unix.RTM_NEWADDR, m))
		}
	}
	// Those by way of others come after the others.
	ordered := slices.Clone(s.Routes)
	slices.SortStableFunc(ordered, func(a, b []byte) int { return cmp.Compare(gateways(a), gateways(b)) })
	for _, m := range ordered {
		if !has(now.Routes, m) {
			routes.add(m, requestRoute(m))
		}
	}
	// Or they lead by way of one that came after them.
	again := routes.of
	routes = missing{}
	for _, m := range again {
		routes.add(m, requestRoute(m))
	}
	if now, err = readSettings(ifindex); err != nil {
		return err
	}
	inPlace := 0
	for _, m := range s.Routes {
		if !has(now.Routes, m) && !has(routes.of, m) {
			inPlace++
		}
	}
	if inPlace > 0 {
		err = fmt.Errorf("%d routes are not back: others are in their place", inPlace)
	}
	return errors.Join(addrs.err("addresses"), routes.err("routes"), err)
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

// requestRoute makes a route, unless it is there.
func requestRoute(m []byte) error {
	m = bytes.Clone(m)
	// What the kernel says of a route and does not accept for one (fib_create_info).
	flags := binary.NativeEndian.Uint32(m[8:]) & unix.RTNH_F_ONLINK
	binary.NativeEndian.PutUint32(m[8:], flags)
	return request(unix.RTM_NEWROUTE, m)
}

func gateways(m []byte) int {
	if attribute(m, unix.SizeofRtMsg, unix.RTA_GATEWAY) != nil || attribute(m, unix.SizeofRtMsg, unix.RTA_VIA) != nil {
		return 1
	}
	return 0
}

// request sends a message that makes something, unless it is there.
func request(kind int, m []byte) error {
	req := nl.NewNetlinkRequest(kind, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	req.AddRawData(m)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

// dump calls each for every message of a dump.
func dump(kind int, query nl.NetlinkRequestData, answer uint16, each func([]byte)) error {
	for range 10 {
		req := nl.NewNetlinkRequest(kind, unix.NLM_F_DUMP)
		req.AddData(query)
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

// without returns a copy of m that lacks an attribute.
func without(m []byte, header int, unwanted uint16) []byte {
	out := bytes.Clone(m[:header])
	attributes(m, header, func(kind uint16, whole, _ []byte) bool {
		if kind != unwanted {
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
