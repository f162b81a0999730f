// SPDX-License-Identifier: MIT

package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// check runs wgroam check on the node, as JSON.
func (n *node) check() control.Check {
	n.t.Helper()
	out, err := exec.CommandContext(n.t.Context(), binary(n.t), "check", "--json", "--socket", n.socket).Output()
	var c control.Check
	if jsonErr := json.Unmarshal(out, &c); jsonErr != nil {
		n.t.Fatalf("check printed %q: %v, %v", out, jsonErr, err)
	}
	exit, failed := errors.AsType[*exec.ExitError](err)
	if c.Ready == failed || failed && exit.ExitCode() != 1 {
		n.t.Errorf("ready is %v: %v", c.Ready, err)
	}
	for _, f := range c.Checks {
		if f.Detail == "" || (f.Do == "") != (f.State == control.CheckOK) {
			n.t.Errorf("%+v: every line says what it is, and those that are not ok what to do", f)
		}
	}
	return c
}

// awaitReady waits until nothing fails.
func (n *node) awaitReady() {
	n.t.Helper()
	await(n.t, n.gw.Name+" is ready", func() (bool, string) {
		c := n.check()
		return c.Ready, fmt.Sprintf("%+v", c.Checks)
	})
}

// awaitFinding waits for a line of check that has failed and says so.
func (n *node) awaitFinding(check, detail string) control.Finding {
	n.t.Helper()
	var found control.Finding
	await(n.t, fmt.Sprintf("check on %s: %s, %q", n.gw.Name, check, detail), func() (bool, string) {
		c := n.check()
		i := slices.IndexFunc(c.Checks, func(f control.Finding) bool {
			return f.State == control.CheckFail && f.Check == check && strings.Contains(f.Detail, detail)
		})
		if i >= 0 {
			found = c.Checks[i]
		}
		return i >= 0, fmt.Sprintf("%+v", c.Checks)
	})
	return found
}

// ghosts gives both gateways peers that nobody is, with preshared keys, and returns
// how they are configured.
func ghosts(t testing.TB, l *lab.Lab, n int) []wgtypes.PeerConfig {
	t.Helper()
	var out []wgtypes.PeerConfig
	for i := range n {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		psk, err := wgtypes.GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, wgtypes.PeerConfig{
			PublicKey: key.PublicKey(), PresharedKey: &psk, ReplaceAllowedIPs: true,
			AllowedIPs: []net.IPNet{*ipNet(fmt.Sprintf("10.99.100.%d/32", i)), *ipNet(fmt.Sprintf("fd99::a:%d/128", i))},
		})
	}
	for _, gw := range l.Gateways {
		configure(t, gw, out...)
	}
	return out
}

func configure(t testing.TB, gw *lab.Gateway, peers ...wgtypes.PeerConfig) {
	t.Helper()
	if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: peers}); err != nil {
		t.Fatal(err)
	}
}

// TestReady: what would go wrong at a promotion, check on the standby says before, and
// not any more when it is mended; and so on the active, as far as it concerns that.
func TestReady(t *testing.T) {
	l := newLab(t, lab.Config{OwnSource: true})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	peers := ghosts(t, l, 3)
	na, nh := startPair(t, l, "down")
	na.awaitState("open")
	nh.awaitState("quiet")
	ping(t, c)
	awaitEndpoint(t, h, c, c.Endpoint())
	na.awaitReady()
	nh.awaitReady()
	var at sync.WaitGroup
	for range 4 {
		at.Go(func() {
			if c := nh.check(); !c.Ready || slices.ContainsFunc(c.Checks, func(f control.Finding) bool { return f.Check == "peers" && f.State != control.CheckOK }) {
				t.Errorf("one of several at once: %+v", c.Checks)
			}
		})
	}
	at.Wait()
	capture := capturePackets(t, h)

	about := func(t *testing.T, f control.Finding, peer wgtypes.Key, what string) {
		t.Helper()
		if len(f.Peers) != 1 || wgtypes.Key(f.Peers[0].Peer) != peer || f.Peers[0].What != what {
			t.Errorf("%+v, want that %v is %s", f, peer, what)
		}
	}
	key := peers[0].PublicKey
	psk := wgtypes.Key{1}
	for _, tc := range []struct {
		name          string
		change        wgtypes.PeerConfig
		atH, atA, all string // what of the peer; in the detail
	}{
		{"missing", wgtypes.PeerConfig{PublicKey: key, Remove: true}, "missing here", "missing there", "(3 peers here, 4 there)"},
		{"allowed IPs", wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, AllowedIPs: []net.IPNet{*ipNet("10.98.0.0/24")}}, "allowed-ips", "allowed-ips", "1 allowed-ips"},
		{"preshared key", wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, PresharedKey: &psk}, "preshared-key", "preshared-key", "1 preshared-key"},
	} {
		configure(t, h, tc.change)
		about(t, nh.awaitFinding("peers", tc.all), key, tc.atH)
		about(t, na.awaitFinding("peers", "1 "+tc.atA), key, tc.atA)
		configure(t, h, peers[0])
		nh.awaitReady()
		na.awaitReady()
	}

	// Somebody has set another endpoint.
	elsewhere := wgtypes.PeerConfig{PublicKey: wgtypes.Key(c.Key()), UpdateOnly: true, Endpoint: net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.7:7"))}
	configure(t, h, elsewhere)
	about(t, nh.awaitFinding("table", "1 not where the group saw them last"), wgtypes.Key(c.Key()), "overridden")
	elsewhere.Endpoint = net.UDPAddrFromAddrPort(c.Endpoint())
	configure(t, h, elsewhere)
	nh.awaitReady()

	// The nodes do not hear each other any more.
	for _, way := range [][2]*lab.Gateway{{a, h}, {h, a}} {
		if err := way[0].Lose(way[1]); err != nil {
			t.Fatal(err)
		}
	}
	nh.awaitFinding("feed", "stale")
	nh.awaitFinding("table", "is not known here")
	for _, way := range [][2]*lab.Gateway{{a, h}, {h, a}} {
		if err := way[0].Reach(way[1]); err != nil {
			t.Fatal(err)
		}
	}
	nh.awaitReady()
	na.awaitReady()

	// The standby has no port that could be shut.
	port := 0
	if err := h.WG().ConfigureDevice(h.Device(), wgtypes.Config{ListenPort: &port}); err != nil {
		t.Fatal(err)
	}
	nh.awaitFinding("failover", "no listen port")
	port = lab.ListenPort
	if err := h.WG().ConfigureDevice(h.Device(), wgtypes.Config{ListenPort: &port}); err != nil {
		t.Fatal(err)
	}
	nh.awaitReady()

	// Another rule of the standby is in the way of what comes from the virtual IP.
	stop := dropFrom(t, h, lab.VIP4)
	nh.awaitFinding("source", "forbids to send from "+lab.VIP4.String())
	stop()
	nh.awaitReady()

	// A virtual IP is missing on the active.
	vip := &netlink.Addr{IPNet: ipNet(lab.VIP6.String() + "/128"), Flags: unix.IFA_F_NODAD}
	onLAN := func(change func(netlink.Link, *netlink.Addr) error) {
		t.Helper()
		if err := a.Do(func() error {
			link, err := netlink.LinkByName("lan0")
			if err != nil {
				return err
			}
			return change(link, vip)
		}); err != nil {
			t.Fatal(err)
		}
	}
	onLAN(netlink.AddrDel)
	na.awaitFinding("source", lab.VIP6.String())
	onLAN(netlink.AddrAdd)
	na.awaitReady()

	capture.none("a standby that is checked")
	ctx := t.Context()
	human, err := exec.CommandContext(ctx, binary(t), "check", "--socket", nh.socket).Output()
	if err != nil {
		t.Errorf("%v: %s", err, human)
	}
	t.Logf("\n%s", human)
	for _, want := range []string{
		"set up as on gw-a", "can send from " + lab.VIP4.String(), "can send from " + lab.VIP6.String(), "1 peers known, 3 that nobody has seen",
		"the same", "all 1 peers with an endpoint 0s after", "the device is quiet",
	} {
		if !strings.Contains(string(human), want) {
			t.Errorf("check does not say %q", want)
		}
	}
}

// dropFrom makes a gateway drop what it sends from an address, until stop.
func dropFrom(t testing.TB, gw *lab.Gateway, addr netip.Addr) (stop func()) {
	t.Helper()
	table := &nftables.Table{Name: "theirs", Family: nftables.TableFamilyIPv4}
	change := func(f func(*nftables.Conn)) {
		t.Helper()
		if err := gw.Do(func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			f(conn)
			return conn.Flush()
		}); err != nil {
			t.Fatal(err)
		}
	}
	change(func(conn *nftables.Conn) {
		conn.AddTable(table)
		chain := conn.AddChain(&nftables.Chain{
			Name: "out", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr.AsSlice()},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
	})
	return func() { change(func(conn *nftables.Conn) { conn.DelTable(table) }) }
}
