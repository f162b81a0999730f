// SPDX-License-Identifier: MIT

package test

import (
	"context"
	bin "encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// packet is one of WireGuard's that left a gateway.
type packet struct {
	at   time.Time
	from netip.Addr
	kind byte // the first of WireGuard's
}

// capture is what leaves a gateway from WireGuard's port, on the wire.
type capture struct {
	t  testing.TB
	gw *lab.Gateway

	mu      sync.Mutex
	packets []packet
}

// capturePackets listens on the LAN link of a gateway until the test ends.
func capturePackets(t testing.TB, gw *lab.Gateway) *capture {
	t.Helper()
	c := &capture{t: t, gw: gw}
	var fd int
	err := gw.Do(func() (err error) {
		// Without its Ethernet header, and all protocols: the outgoing are only
		// shown to those who want all.
		all := int(bin.BigEndian.Uint16(bin.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL)))
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		lan, err := net.InterfaceByName("lan0")
		if err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: lan.Index})
	})
	if err != nil {
		t.Fatalf("capture: %v", err)
	}
	done := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			switch {
			case err == nil:
				if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
					c.add(buf[:n])
				}
			case errors.Is(err, unix.EAGAIN):
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
				}
			case !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENETDOWN):
				t.Errorf("capture: %v", err)
				return
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-done; unix.Close(fd) })
	return c
}

// add takes a packet that is WireGuard's.
func (c *capture) add(b []byte) {
	var (
		from netip.Addr
		udp  []byte
	)
	switch {
	case len(b) >= 28 && b[0]>>4 == 4 && b[9] == unix.IPPROTO_UDP:
		from, udp = netip.AddrFrom4([4]byte(b[12:16])), b[int(b[0]&15)*4:]
	case len(b) >= 48 && b[0]>>4 == 6 && b[6] == unix.IPPROTO_UDP:
		from, udp = netip.AddrFrom16([16]byte(b[8:24])), b[40:]
	}
	if len(udp) < 9 || bin.BigEndian.Uint16(udp) != lab.ListenPort {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.packets = append(c.packets, packet{time.Now(), from, udp[8]})
}

// take returns what has been captured since the last time.
func (c *capture) take() []packet {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.packets
	c.packets = nil
	return out
}

// none fails if anything was captured.
func (c *capture) none(what string) {
	c.t.Helper()
	if got := c.take(); len(got) > 0 {
		c.t.Errorf("%s: %d packets left %s, the first of type %d from %v", what, len(got), c.gw.Name, got[0].kind, got[0].from)
	}
}

// fromVIP fails unless something was captured, all of it from the virtual IP.
func (c *capture) fromVIP(what string) {
	c.t.Helper()
	got := c.take()
	if len(got) == 0 {
		c.t.Errorf("%s: nothing left %s", what, c.gw.Name)
	}
	for _, p := range got {
		if p.from != lab.VIP4 && p.from != lab.VIP6 {
			c.t.Errorf("%s: a packet of type %d left %s from %v", what, p.kind, c.gw.Name, p.from)
		}
	}
}

// settings is what an operator has made of a device, as far as failover touches it.
type settings struct {
	Keepalives    map[wgroam.Key]time.Duration
	Addrs, Routes []string
}

// settingsOf reads the settings of a gateway's device.
func settingsOf(t testing.TB, gw *lab.Gateway) settings {
	t.Helper()
	s := settings{Keepalives: map[wgroam.Key]time.Duration{}}
	peers, err := gw.Peers()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range peers {
		s.Keepalives[wgroam.Key(p.PublicKey)] = p.PersistentKeepaliveInterval
	}
	err = gw.Do(func() error {
		link, err := netlink.LinkByName(gw.Device())
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			s.Addrs = append(s.Addrs, fmt.Sprint(a.IPNet, " scope ", a.Scope, " lft ", a.PreferedLft, a.ValidLft))
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: link.Attrs().Index}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_KERNEL {
				continue // it makes them of the addresses, in its own time
			}
			s.Routes = append(s.Routes, fmt.Sprint(r))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(s.Addrs)
	slices.Sort(s.Routes)
	return s
}

// furnish gives a gateway's device what operators give it: keepalives for some
// peers; routes to what is behind the peers; and what wg-quick makes of AllowedIPs
// of everything, a default route in a table of its own.
func furnish(t testing.TB, l *lab.Lab, gw *lab.Gateway) {
	t.Helper()
	var cfg wgtypes.Config
	for i, c := range l.Clients {
		if i%2 == 0 {
			interval := time.Duration(20+i) * time.Second
			cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(c.Key()), UpdateOnly: true, PersistentKeepaliveInterval: &interval})
		}
	}
	err := gw.WG().ConfigureDevice(gw.Device(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	err = gw.Do(func() error {
		link, err := netlink.LinkByName(gw.Device())
		if err != nil {
			return err
		}
		index := link.Attrs().Index
		for _, r := range []netlink.Route{
			{Dst: ipNet("10.200.0.0/16"), Protocol: unix.RTPROT_BOOT, Scope: netlink.SCOPE_LINK},
			{Dst: ipNet("10.201.0.0/16"), Priority: 50, MTU: 1300, Src: net.IP(lab.Inner4.AsSlice()), Protocol: unix.RTPROT_STATIC, Scope: netlink.SCOPE_LINK},
			{Dst: ipNet("0.0.0.0/0"), Table: 51820, Protocol: unix.RTPROT_BOOT, Scope: netlink.SCOPE_LINK},
			{Dst: ipNet("fd77::/64"), Priority: 77, Protocol: unix.RTPROT_BOOT},
			{Dst: ipNet("::/0"), Table: 51820, Protocol: unix.RTPROT_STATIC},
		} {
			r.LinkIndex = index
			if err := netlink.RouteAdd(&r); err != nil {
				return fmt.Errorf("add route %v: %w", r, err)
			}
		}
		rule := netlink.NewRule()
		rule.Family, rule.Table, rule.Mark, rule.Invert, rule.Priority = unix.AF_INET, 51820, 51820, true, 40000
		return netlink.RuleAdd(rule)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func ipNet(s string) *net.IPNet {
	p := netip.MustParsePrefix(s)
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// awaitState waits for what the node has made of its device.
func (n *node) awaitState(state string) control.Failover {
	n.t.Helper()
	var f control.Failover
	await(n.t, fmt.Sprintf("%s is %s", n.gw.Name, state), func() (bool, string) {
		f = n.status().Failover
		return f.State == state && f.Error == "", fmt.Sprintf("%+v", f)
	})
	return f
}

// isQuiet fails unless the gateway's device is that of a standby.
func isQuiet(t testing.TB, gw *lab.Gateway, mode string) {
	t.Helper()
	for k, i := range settingsOf(t, gw).Keepalives {
		if i != 0 {
			t.Errorf("%s: peer %v has a keepalive of %v", gw.Name, k, i)
		}
	}
	err := gw.Do(func() error {
		link, err := netlink.LinkByName(gw.Device())
		if err == nil && (link.Attrs().RawFlags&unix.IFF_UP != 0) != (mode == "silent") {
			t.Errorf("%s: the link's flags are %x", gw.Name, link.Attrs().RawFlags)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func sameSettings(t testing.TB, what string, want, got settings) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-before +after):\n%s", what, diff)
	}
}

// startPair starts a daemon on both gateways, with roles that follow the virtual IP.
func startPair(t testing.TB, l *lab.Lab, mode string) (a, h *node) {
	t.Helper()
	var nodes []*node
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		device := fmt.Sprintf("role = \"auto\"\nstandby = %q\nvip = [%q, %q]", mode, lab.VIP4, lab.VIP6)
		nodes = append(nodes, startNode(t, gw, dir, roleConfig(gw, dir, device, "", others(l, gw)...)))
	}
	for _, n := range nodes {
		n.awaitNodes(1)
	}
	return nodes[0], nodes[1]
}

// TestFailover: nothing leaves the standby; when it takes over, it calls all peers
// from the virtual IP, and has all that its device had; and back again.
func TestFailover(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			l := newLab(t, lab.Config{Clients: 4, OwnSource: true})
			a, h := l.Gateways[0], l.Gateways[1]
			furnish(t, l, a)
			furnish(t, l, h)
			before := map[*lab.Gateway]settings{a: settingsOf(t, a), h: settingsOf(t, h)}
			atA, atH := capturePackets(t, a), capturePackets(t, h)
			na, nh := startPair(t, l, mode)
			na.awaitState("open")
			nh.awaitState("quiet")
			isQuiet(t, h, mode)
			atA.take() // of before the daemon
			// While nf_tables is being loaded, the first try may fail.
			said := []int{len(na.stderr.String()), len(nh.stderr.String())}

			for _, c := range l.Clients {
				ping(t, c)
				awaitEndpoint(t, h, c, c.Endpoint())
			}
			for i, c := range l.Clients {
				awaitEndpoint(t, h, c, roam(t, c, i))
			}
			atA.fromVIP("the active")
			sameSettings(t, "the active has what it had", before[a], settingsOf(t, a))
			atH.none("the standby")

			// What the gateway sends through the tunnel waits for nothing and goes nowhere.
			active, standby, fromActive, fromStandby := na, nh, atA, atH
			w := watch(t, h, "--promotions", "--socket", nh.socket)
			w.says("watching through the daemon")
			for round := range 3 {
				began := time.Now()
				if round == 0 {
					if err := active.gw.Kill(); err != nil {
						t.Fatal(err)
					}
				}
				if err := l.MoveVIP(standby.gw); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				out := make([]time.Duration, len(l.Clients))
				var wg sync.WaitGroup
				for i, c := range l.Clients {
					wg.Go(func() {
						if _, err := c.Reach(ctx); err != nil {
							t.Error(err)
						}
						out[i] = time.Since(began)
					})
				}
				wg.Wait()
				cancel()
				f := standby.awaitState("open")
				if f.Promotion == nil || f.Promotion.Answered != len(l.Clients) || f.Promotion.Silent != 0 || f.Promotion.Unknown != 0 {
					t.Errorf("round %d: promotion %+v", round, f.Promotion)
				}
				if f.Promotion != nil && standby == nh {
					w.awaitPromotion(*f.Promotion)
				}
				t.Logf("round %d: the clients reach the new active after %v; promotion %+v", round, out, f.Promotion)
				fromStandby.fromVIP("after the promotion")
				sameSettings(t, "the new active has what it had", before[standby.gw], settingsOf(t, standby.gw))

				if round == 0 {
					if err := active.gw.Revive(); err != nil {
						t.Fatal(err)
					}
				}
				active.awaitState("quiet")
				isQuiet(t, active.gw, mode)
				fromActive.take()
				for _, c := range l.Clients {
					ping(t, c)
				}
				fromActive.none("the former active")
				active, standby, fromActive, fromStandby = standby, active, fromStandby, fromActive
			}
			if s := na.stderr.String()[said[0]:] + nh.stderr.String()[said[1]:]; strings.Contains(s, "not what its role asks for") {
				t.Errorf("the daemons complained:\n%s", s)
			}
		})
	}
}

// TestFailoverAlone: the role is carried out also where the node has no part in a
// group, such as without a private key.
func TestFailoverAlone(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw, dir := l.Gateways[0], t.TempDir()
	furnish(t, l, gw)
	before := settingsOf(t, gw)
	if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{PrivateKey: new(wgtypes.Key)}); err != nil {
		t.Fatal(err)
	}
	n := &node{gw: gw, socket: filepath.Join(dir, "control.sock"), file: filepath.Join(dir, "wgroam.toml")}
	if err := os.WriteFile(n.file, []byte(roleConfig(gw, dir, `role = "auto"`, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	n.process = start(t, gw, nil, "run", "--config", n.file)
	n.says("the device is not served")
	n.awaitState("quiet")
	isQuiet(t, gw, "down")
	n.mustRole("active")
	n.awaitState("open")
	sameSettings(t, "the active has what it had", before, settingsOf(t, gw))
	if s := n.status(); s.State != control.StateWaiting {
		t.Errorf("the device is %s", s.State)
	}
}

// TestFailoverAtStart: a daemon that is active as soon as it starts waits with its
// calls for what it knew when it ended.
func TestFailoverAtStart(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 4, OwnSource: true})
	a, h := l.Gateways[0], l.Gateways[1]
	_, n := startPair(t, l, "down")
	n.awaitState("quiet")
	for _, c := range l.Clients {
		ping(t, c)
		awaitEndpoint(t, h, c, c.Endpoint())
	}
	n.stop()
	// As by configuration management: the device has forgotten where the peers are.
	peers, err := h.Peers()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range peers {
		cfg := wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: p.PublicKey, Remove: true}, {PublicKey: p.PublicKey, AllowedIPs: p.AllowedIPs}}}
		if err := h.WG().ConfigureDevice(h.Device(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := l.MoveVIP(h); err != nil {
		t.Fatal(err)
	}
	// A fixed role is known before anything else is.
	cfg, err := os.ReadFile(n.file)
	if err != nil {
		t.Fatal(err)
	}
	n = startNode(t, h, filepath.Dir(n.file), strings.Replace(string(cfg), `"auto"`, `"active"`, 1))
	if p := n.awaitState("open").Promotion; p == nil || p.Answered != len(l.Clients) || p.Unknown != 0 {
		t.Errorf("promotion %+v", p)
	}
}

// dumpsOf returns what ip(8) and wg(8) say of a gateway: its routes and rules, the
// device's addresses, and its configuration. Endpoints are left out, for peers move, and
// the routes that the kernel makes of addresses, in its own time.
func dumpsOf(t testing.TB, gw *lab.Gateway) string {
	t.Helper()
	return dumpsOfDevice(t, gw, gw.Device())
}

func dumpsOfDevice(t testing.TB, gw *lab.Gateway, name string) string {
	t.Helper()
	var out strings.Builder
	for _, c := range []struct {
		command, between, without string
	}{
		{"ip -j -4 route show table all", "},{", `"protocol":"kernel"`},
		{"ip -j -6 route show table all", "},{", `"protocol":"kernel"`},
		{"ip -j -4 rule", "},{", "\x00"},
		{"ip -j -6 rule", "},{", "\x00"},
		{"ip -j addr show dev " + name, "},{", "\x00"},
		{"wg showconf " + name, "\n[Peer]\n", "\x00"},
	} {
		args := strings.Fields(c.command)
		var got []byte
		err := gw.Do(func() (err error) {
			got, err = exec.Command(args[0], args[1:]...).Output()
			return err
		})
		if err != nil {
			t.Fatalf("%s: %v", c.command, err)
		}
		parts := strings.Split(strings.Trim(endpointLine.ReplaceAllString(string(got), ""), "[{}]\n"), c.between)
		parts = slices.DeleteFunc(parts, func(s string) bool { return strings.Contains(s, c.without) })
		if args[0] == "wg" {
			for i := range parts {
				parts[i] = strings.TrimSpace(parts[i])
			}
			slices.Sort(parts) // wireguard-go has no order
		}
		fmt.Fprintf(&out, "%s\n%s\n", c.command, strings.Join(parts, "\n"))
	}
	return out.String()
}

var endpointLine = regexp.MustCompile("(?m)^Endpoint = .*\n")

// TestFailoverKilled: a daemon that is killed at any moment of a promotion or
// demotion leaves nothing that the next one does not bring to its end.
func TestFailoverKilled(t *testing.T) {
	kills := 50 // in each mode
	if lab.InVM() {
		kills = 10
	}
	seed := *lifeSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("to repeat these moments: -test.run TestFailoverKilled -seed %d", seed)
	for i, mode := range []string{"down", "silent"} {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			failoverKilled(t, mode, kills, rng)
		})
	}
}

func failoverKilled(t *testing.T, mode string, kills int, rng *rand.Rand) {
	l := newLab(t, lab.Config{Clients: 4, OwnSource: true})
	a, h := l.Gateways[0], l.Gateways[1]
	furnish(t, l, a)
	furnish(t, l, h)
	before := dumpsOf(t, h)
	wire := capturePackets(t, h)
	_, n := startPair(t, l, mode)
	n.awaitState("quiet")
	for _, c := range l.Clients {
		ping(t, c)
		awaitEndpoint(t, h, c, c.Endpoint())
	}
	wire.none("the standby")
	for i := range kills {
		// A promotion takes some 100 ms here, a demotion less.
		to, state, within := h, "open", 120*time.Millisecond
		if i%2 == 1 {
			to, state, within = a, "quiet", 60*time.Millisecond
		}
		after := time.Duration(rng.Int64N(int64(within)))
		what := fmt.Sprintf("%s, killed %v after the virtual IP went to %s", mode, after, to.Name)
		if err := l.MoveVIP(to); err != nil {
			t.Fatal(err)
		}
		<-time.After(after)
		n.kill()
		n.run()
		n.awaitState(state)
		for _, c := range l.Clients {
			reach(t, c)
		}
		if state == "open" {
			if diff := cmp.Diff(before, dumpsOf(t, h)); diff != "" {
				t.Errorf("%s (-before +after):\n%s", what, diff)
			}
			wire.fromVIP(what)
		} else {
			isQuiet(t, h, mode)
			wire.take()
			for _, c := range l.Clients {
				reach(t, c)
			}
			wire.none(what)
		}
		if t.Failed() {
			t.Fatal(what)
		}
	}
}

// reach waits until a client has had an answer.
func reach(t testing.TB, c *lab.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Reach(ctx); err != nil {
		t.Error(err)
	}
}
