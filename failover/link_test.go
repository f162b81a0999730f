// SPDX-License-Identifier: MIT

package failover

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace runs the rest of the test in a network namespace of its own.
func inNamespace(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("network namespaces need root")
		}
		t.Skip("network namespaces need root")
	}
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
}

// TestSettings: a link that was down has again what it lost, and what is in the way
// is told.
func TestSettings(t *testing.T) {
	inNamespace(t)
	for _, link := range []netlink.Link{
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "one"}, PeerName: "two"},
		&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "other"}, PeerName: "rest"},
	} {
		if err := netlink.LinkAdd(link); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	index := map[string]int{}
	for _, name := range []string{"one", "two", "other", "rest"} {
		link, err := netlink.LinkByName(name)
		must(err)
		index[name] = link.Attrs().Index
		must(netlink.LinkSetUp(link))
	}
	one := index["one"]
	link, err := netlink.LinkByIndex(one)
	must(err)
	for _, a := range []string{"10.1.0.1/24", "fd01::1/64", "fd01::2/128"} {
		addr, err := netlink.ParseAddr(a)
		must(err)
		addr.Flags |= unix.IFA_F_NODAD
		must(netlink.AddrAdd(link, addr))
	}
	cidr := func(s string) *net.IPNet {
		_, n, err := net.ParseCIDR(s)
		must(err)
		return n
	}
	for _, r := range []netlink.Route{
		{Dst: cidr("10.2.0.0/16"), Protocol: unix.RTPROT_BOOT, Scope: netlink.SCOPE_LINK},
		{Dst: cidr("10.3.0.0/16"), Protocol: unix.RTPROT_STATIC, Gw: net.ParseIP("10.1.0.9"), Priority: 7, MTU: 1234},
		{Dst: cidr("10.4.0.0/16"), Protocol: unix.RTPROT_STATIC, Gw: net.ParseIP("10.99.0.9"), Flags: int(netlink.FLAG_ONLINK), Table: 51820},
		{Dst: cidr("0.0.0.0/0"), Protocol: unix.RTPROT_BOOT, Scope: netlink.SCOPE_LINK, Table: 51820, Src: net.ParseIP("10.1.0.1")},
		{Dst: cidr("fd02::/64"), Protocol: unix.RTPROT_BOOT, Src: net.ParseIP("fd01::2")},
		{Dst: cidr("fd03::/64"), Protocol: unix.RTPROT_STATIC, Gw: net.ParseIP("fd01::9"), Priority: 9},
		{Dst: cidr("::/0"), Protocol: unix.RTPROT_BOOT, Table: 51820},
	} {
		r.LinkIndex = one
		if err := netlink.RouteAdd(&r); err != nil {
			t.Fatalf("%v: %v", r, err)
		}
	}
	// Of a routing daemon, and of another link: not ours to give back.
	must(netlink.RouteAdd(&netlink.Route{LinkIndex: one, Dst: cidr("10.5.0.0/16"), Protocol: unix.RTPROT_BIRD, Scope: netlink.SCOPE_LINK}))
	must(netlink.RouteAdd(&netlink.Route{LinkIndex: index["other"], Dst: cidr("10.6.0.0/16"), Protocol: unix.RTPROT_BOOT, Scope: netlink.SCOPE_LINK}))

	before, err := readSettings(one)
	must(err)
	if len(before.Routes) != 7 {
		t.Errorf("%d routes are kept, want 7", len(before.Routes))
	}
	// As the memory keeps it.
	data, err := json.Marshal(taken{iface: iface{Ifindex: one}, settings: before})
	must(err)
	var kept taken
	must(json.Unmarshal(data, &kept))

	equal := func(what string) {
		t.Helper()
		now, err := readSettings(one)
		must(err)
		for _, m := range []struct {
			kind      string
			want, got [][]byte
		}{{"addresses", before.Addrs, now.Addrs}, {"routes", before.Routes, now.Routes}} {
			for _, w := range m.want {
				if !slices.ContainsFunc(m.got, func(m []byte) bool { return bytes.Equal(m, w) }) {
					t.Errorf("%s: of the %s, this is missing: %x", what, m.kind, w)
				}
			}
			if len(m.want) != len(m.got) {
				t.Errorf("%s: %d %s, want %d", what, len(m.got), m.kind, len(m.want))
			}
		}
	}
	for range 2 {
		must(setLink(one, false))
		now, err := readSettings(one)
		must(err)
		if len(now.Routes) != 0 {
			t.Errorf("a link that is down has %d routes", len(now.Routes))
		}
		must(setLink(one, true))
		must(kept.give(one))
		equal("given back")
		must(kept.give(one))
		equal("given back twice")
	}
	// The first of an order is the source of what has none.
	now, err := readSettings(one)
	must(err)
	if !slices.EqualFunc(now.Addrs, before.Addrs, bytes.Equal) {
		t.Errorf("the addresses are %x, want %x, in that order", now.Addrs, before.Addrs)
	}

	// One that cannot be given back is no reason to leave out the others.
	must(setLink(one, false))
	must(setLink(one, true))
	bad := kept
	bad.Addrs = append([][]byte{before.Addrs[0][:unix.SizeofIfAddrmsg]}, append(slices.Clone(before.Addrs), before.Addrs[0][:unix.SizeofIfAddrmsg])...)
	bad.Routes = append([][]byte{before.Routes[0][:unix.SizeofRtMsg]}, before.Routes...)
	if err := bad.give(one); err == nil || !strings.Contains(err.Error(), "2 addresses are not back") || !strings.Contains(err.Error(), "1 routes are not back") {
		t.Errorf("with what cannot be made: error %v", err)
	}
	equal("given back, but for what cannot be")

	merged := kept.settings
	merged.add(before)
	if len(merged.Routes) != len(before.Routes) || len(merged.Addrs) != len(before.Addrs) {
		t.Error("what was there already was added")
	}

	must(setLink(one, false))
	must(netlink.RouteAdd(&netlink.Route{LinkIndex: index["other"], Dst: cidr("10.2.0.0/16"), Protocol: unix.RTPROT_BOOT, Scope: netlink.SCOPE_LINK}))
	must(setLink(one, true))
	if err := kept.give(one); err == nil || !strings.Contains(err.Error(), "1 routes are not back") {
		t.Errorf("another's route is in the place of one: error %v", err)
	}
	if !slices.ContainsFunc(mustRoutes(t), func(r netlink.Route) bool { return r.LinkIndex == index["other"] && r.Dst.String() == "10.2.0.0/16" }) {
		t.Error("the other's route was taken away")
	}
}

// TestRoutesOfAllKinds: what ip(8) says of routes, rules, nexthop objects and addresses
// is the same after the link was down as it was before, byte for byte, but for what the
// kernel makes of addresses.
func TestRoutesOfAllKinds(t *testing.T) {
	inNamespace(t)
	ip := func(args string) string {
		t.Helper()
		out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
		if err != nil {
			t.Fatalf("ip %s: %v: %s", args, err, out)
		}
		return string(out)
	}
	dumps := func() (out string) {
		for _, args := range []string{
			"-j -4 route show table all", "-j -6 route show table all", "-j -4 rule", "-j -6 rule", "-j nexthop", "-j addr show dev one",
		} {
			// The kernel makes its own in its own time.
			lines := slices.DeleteFunc(strings.Split(strings.Trim(ip(args), "[{}]\n"), "},{"), func(s string) bool { return strings.Contains(s, `"protocol":"kernel"`) })
			out += args + "\n" + strings.Join(lines, "\n") + "\n"
		}
		return out
	}
	for _, args := range []string{
		"link add one type veth peer name two", "link add other type veth peer name rest",
		"addr add 10.1.0.1/24 dev one", "addr add fd01::1/64 dev one nodad", "addr add 10.2.0.1/24 dev other", "addr add fd02::1/64 dev other nodad",
		"link set one addrgenmode none", "link set two up", "link set rest up", "link set one up", "link set other up",
		// Of numbers that are nobody's, and of other types.
		"route add 10.10.0.0/16 dev one proto 200", "route add fd10::/64 dev one proto 200", "route add 10.11.0.0/16 dev one proto dhcp metric 5",
		"route add 10.12.0.0/16 via 10.1.0.7 dev one proto static src 10.1.0.1 mtu 1300 table 51820",
		"route add default dev one table 51820", "-6 route add default dev one table 51820",
		"rule add not fwmark 51820 table 51820", "rule add table main suppress_prefixlength 0", "-6 rule add not fwmark 51820 table 51820",
		// Several next hops, all by the link, and some.
		"route add 10.20.0.0/16 nexthop via 10.1.0.8 weight 2 nexthop via 10.1.0.9", "-6 route add fd20::/64 nexthop via fd01::8 dev one weight 3 nexthop via fd01::9 dev one",
		"route add 10.21.0.0/16 nexthop via 10.1.0.8 nexthop via 10.2.0.8", "-6 route add fd21::/64 nexthop via fd01::8 dev one nexthop via fd02::8 dev other",
		// Nexthop objects, and groups of them.
		"nexthop add id 1 via 10.1.0.8 dev one", "nexthop add id 2 via 10.1.0.9 dev one proto static", "nexthop add id 3 via 10.2.0.9 dev other",
		"nexthop add id 4 via fd01::8 dev one", "nexthop add id 5 via fd02::8 dev other",
		"nexthop add id 10 group 1/2,5", "nexthop add id 11 group 3/1,7", "nexthop add id 12 group 4/5", "nexthop add id 13 group 3",
		"route add 10.30.0.0/16 nhid 1", "route add 10.31.0.0/16 nhid 10 metric 3", "route add 10.32.0.0/16 nhid 11", "route add 10.33.0.0/16 nhid 3", "route add 10.34.0.0/16 nhid 13",
		"-6 route add fd30::/64 nhid 4", "-6 route add fd31::/64 nhid 12 metric 7",
	} {
		ip(args)
	}
	link, err := netlink.LinkByName("one")
	if err != nil {
		t.Fatal(err)
	}
	one := link.Attrs().Index
	for _, compat := range []string{"1", "0"} {
		// 0: a route with a nexthop object does not show where that leads.
		if err := os.WriteFile("/proc/sys/net/ipv4/nexthop_compat_mode", []byte(compat), 0o600); err != nil {
			t.Fatal(err)
		}
		before := dumps()
		kept, err := readSettings(one)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			ip("link set one down")
			if diff := cmp.Diff(before, dumps()); diff == "" {
				t.Error("nothing went with the link")
			}
			ip("link set one up")
			if err := kept.give(one); err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(before, dumps()); diff != "" {
				t.Errorf("compat_mode %s (-before +given back):\n%s", compat, diff)
			}
			if err := kept.give(one); err != nil {
				t.Error(err)
			}
		}
	}

	// A group that somebody has changed meanwhile is not ours to change back.
	kept, err := readSettings(one)
	if err != nil {
		t.Fatal(err)
	}
	ip("link set one down")
	ip("nexthop add id 6 via 10.2.0.10 dev other")
	ip("nexthop replace id 11 group 3/6")
	ip("link set one up")
	if err := kept.give(one); err == nil || !strings.Contains(err.Error(), "nexthop group 11 has been changed") {
		t.Errorf("a group that was changed: error %v", err)
	}
	if out := ip("nexthop show id 11"); !strings.Contains(out, "group 3/6") {
		t.Errorf("the group is %s", out)
	}
}

func mustRoutes(t *testing.T) []netlink.Route {
	t.Helper()
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	return routes
}
