// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// keepalived is Debian's, on a gateway, with the configuration of contrib/keepalived.
type keepalived struct {
	*process
	gw   *lab.Gateway
	file string
	args []string
}

// elected is a gateway whose role keepalived gives.
type elected struct {
	*node
	keepalived *keepalived
	wire       *capture
}

// newKeepalived writes the configuration of keepalived for a node, which has a
// priority: that of a recipe, in which more is replaced, each once.
func newKeepalived(t testing.TB, n *node, dir, recipe string, priority int, more map[string]string) *keepalived {
	t.Helper()
	if _, err := exec.LookPath("keepalived"); err != nil {
		t.Fatalf("run make deps: %v", err)
	}
	raw, err := os.ReadFile(contrib(recipe + "/keepalived.conf"))
	if err != nil {
		t.Fatal(err)
	}
	text, wgroam := string(raw), binary(t)
	replace := map[string]string{
		"/usr/local/sbin/wgroam check --elect": wgroam + " check --elect --socket " + n.socket,
		"/usr/local/sbin/wgroam check --feed":  wgroam + " check --feed --socket " + n.socket,
		"interface eth0":                       "interface lan0",
		"priority 110":                         "priority " + strconv.Itoa(priority),
	}
	maps.Copy(replace, more)
	for from, to := range replace {
		if strings.Count(text, from) != 1 {
			t.Fatalf("%s/keepalived.conf has %q %d times, want once", recipe, from, strings.Count(text, from))
		}
		text = strings.Replace(text, from, to, 1)
	}
	k := &keepalived{gw: n.gw, file: filepath.Join(dir, "keepalived.conf")}
	if err := os.WriteFile(k.file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k.args = []string{
		"--dont-fork", "--vrrp", "--log-console", "--log-detail", "--no-syslog", "--use-file", k.file,
		"--pid", filepath.Join(dir, "keepalived.pid"), "--vrrp_pid", filepath.Join(dir, "vrrp.pid"),
	}
	k.process = &process{t: t}
	return k
}

// contrib finds a file of contrib.
func contrib(name string) string { return filepath.Join("..", "contrib", name) }

func (k *keepalived) run() {
	k.t.Helper()
	cmd := exec.Command("keepalived", k.args...)
	cmd.Env = append(os.Environ(), "WGROAM="+filepath.Join(filepath.Dir(k.file), "wgroam"))
	k.process = startCommand(k.t, k.gw, cmd)
}

// kill leaves neither of keepalived's two processes time for anything. The first
// would start the second again, and the second ends by itself after the first.
func (k *keepalived) kill() {
	k.t.Helper()
	pid := k.cmd.Process.Pid
	if err := k.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		k.t.Fatal(err)
	}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		k.t.Fatal(err)
	}
	for child := range strings.FieldsSeq(string(children)) {
		n, err := strconv.Atoi(child)
		if err == nil {
			err = syscall.Kill(n, syscall.SIGKILL)
		}
		if err != nil {
			k.t.Fatal(err)
		}
	}
	if err := k.cmd.Process.Kill(); err != nil {
		k.t.Fatal(err)
	}
	<-k.exited
	// A child that nobody has waited for yet would be taken for a running keepalived.
	must(k.t, os.Remove(filepath.Join(filepath.Dir(k.file), "vrrp.pid")))
}

// hasVIP tells which of the virtual IPs are on the gateway.
func hasVIP(t testing.TB, gw *lab.Gateway) (n int) {
	t.Helper()
	err := gw.Do(func() error {
		addrs, err := net.InterfaceAddrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && (p.Addr() == lab.VIP4 || p.Addr() == lab.VIP6) {
				n++
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// vrrpPair is a lab whose gateways fail over with wgroam and keepalived.
type vrrpPair struct {
	*outages
	active, standby *elected
}

func newVRRPPair(t testing.TB) *vrrpPair {
	t.Helper()
	l := newLab(t, lab.Config{Clients: len(kinds), OwnSource: true})
	all := startElected(t, l)
	p := &vrrpPair{active: all[0], standby: all[1]}
	p.settled()
	p.outages = newOutages(t, l)
	return p
}

// startElected starts wgroam and keepalived on all gateways of a lab. The first one
// is the active.
func startElected(t testing.TB, l *lab.Lab) []*elected {
	t.Helper()
	// From now on the virtual IP is keepalived's.
	must(t, l.Gateways[0].Do(func() error {
		lan, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		for _, vip := range []netip.Addr{lab.VIP4, lab.VIP6} {
			if err := netlink.AddrDel(lan, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(vip, vip.BitLen()).String())}); err != nil {
				return err
			}
		}
		return nil
	}))
	var all []*elected
	for i, gw := range l.Gateways {
		dir := t.TempDir()
		device := fmt.Sprintf("role = \"auto\"\nvip = [%q, %q]\nvrrp = \"VI_1\"", lab.VIP4, lab.VIP6)
		tables := fmt.Sprintf("[keepalived]\nfifo = %q\n", filepath.Join(dir, "keepalived.fifo"))
		e := &elected{wire: capturePackets(t, gw)}
		e.node = startNode(t, gw, dir, roleConfig(gw, dir, device, tables, others(l, gw)...))
		e.keepalived = newKeepalived(t, e.node, dir, "keepalived", 110-10*i, map[string]string{
			"/run/wgroam/keepalived.fifo": filepath.Join(dir, "keepalived.fifo"),
			"203.0.113.10":                lab.VIP4.String(),
			"2001:db8::10":                lab.VIP6.String(),
		})
		all = append(all, e)
	}
	for i, e := range all {
		e.awaitNodes(len(all) - 1)
		e.keepalived.run()
		role := "standby"
		if i == 0 {
			role = "active"
		}
		e.awaitRole(role, "vrrp")
		if checks := e.check().Checks; !slices.ContainsFunc(checks, func(f control.Finding) bool {
			return f.Check == "keepalived" && f.State == control.CheckOK && strings.Contains(f.Detail, role)
		}) {
			t.Errorf("check on %s: %+v, want what keepalived says", e.gw.Name, checks)
		}
	}
	return all
}

// settled waits until one gateway is the active and the other the standby, without
// any alarm, and both know the same.
func (p *vrrpPair) settled() {
	p.active.t.Helper()
	p.active.awaitRole("active", "vrrp")
	p.standby.awaitRole("standby", "vrrp")
	p.active.awaitState("open")
	p.standby.awaitState("quiet")
	for _, e := range []*elected{p.active, p.standby} {
		e.awaitAlarms()
		e.awaitNodes(1)
	}
	if a, s := hasVIP(p.active.t, p.active.gw), hasVIP(p.active.t, p.standby.gw); a != 2 || s != 0 {
		p.active.t.Errorf("the active has %d of the virtual IPs, the standby %d, want 2 and 0", a, s)
	}
}

// TestKeepalived: whatever ends an active, the standby takes over; the former active
// is the standby when it comes back, and not one packet of WireGuard leaves it.
func TestKeepalived(t *testing.T) {
	p := newVRRPPair(t)
	for _, s := range []struct {
		what         string
		strike, mend func(e *elected)
		alarms       []string // of the new active, until it is mended
	}{
		{
			what:   "keepalived is stopped",
			strike: func(e *elected) { e.keepalived.stop() },
			mend:   func(e *elected) { e.keepalived.run() },
		},
		{
			// The virtual IP stays where it was, and the role as well.
			what:   "keepalived is killed",
			strike: func(e *elected) { e.keepalived.kill() },
			mend:   func(e *elected) { e.keepalived.run() },
			alarms: []string{"two_actives"},
		},
		{
			what:   "wgroam is killed",
			strike: (*elected).kill,
			mend:   (*elected).run,
		},
		{
			what:   "both are killed",
			strike: func(e *elected) { e.kill(); e.keepalived.kill() },
			mend:   func(e *elected) { e.run(); e.keepalived.run() },
		},
		{
			what:   "the link is cut",
			strike: func(e *elected) { must(t, e.gw.Kill()) },
			mend:   func(e *elected) { must(t, e.gw.Revive()) },
		},
	} {
		for i, c := range p.lab.Clients {
			awaitEndpoint(t, p.standby.gw, c, roam(t, c, i))
		}
		p.standby.wire.none("the standby, before " + s.what)
		out := p.measure(p.standby.gw, patience, func() error { s.strike(p.active); return nil })
		t.Logf("%s: %v: %v; round trip %v", s.what, kinds, out, p.rtt)
		p.active, p.standby = p.standby, p.active
		p.active.awaitRole("active", "vrrp")
		p.active.awaitState("open")
		p.active.awaitAlarms(s.alarms...)
		p.active.wire.fromVIP("the new active, after " + s.what)
		if s.alarms != nil {
			await(t, "check says that keepalived is silent", func() (bool, string) { return deaf(p.standby), "" })
		}
		if deaf(p.active) {
			t.Error("check says that the new active's keepalived is silent")
		}

		s.mend(p.standby)
		p.settled()
		p.standby.wire.take()
		for _, c := range p.lab.Clients {
			ping(t, c)
		}
		p.standby.wire.none("the former active, after " + s.what)
		if t.Failed() {
			t.Fatal("after: ", s.what)
		}
	}
}

// deaf reports whether check says that keepalived does not ask.
func deaf(e *elected) bool {
	return slices.ContainsFunc(e.check().Checks, func(f control.Finding) bool {
		return f.Check == "keepalived" && f.State == control.CheckWarn && strings.Contains(f.Detail, "check --elect")
	})
}

// restart restarts the daemons of nodes.
func (p *vrrpPair) restart(nodes ...*elected) {
	p.active.t.Helper()
	for _, e := range nodes {
		role := e.status().Role
		e.stop()
		e.run()
		e.awaitRole(role, "vrrp")
	}
	for _, e := range []*elected{p.active, p.standby} {
		e.awaitNodes(1)
	}
}

// TestKeepalivedHandover: keepalived moves the virtual IP when wgroam hands over, asked by
// either node, and leaves it there.
func TestKeepalivedHandover(t *testing.T) {
	p := newVRRPPair(t)
	for round, ask := range []func() *elected{
		func() *elected { return p.active },
		func() *elected { return p.standby },
		// Restarted, as for an upgrade: keepalived says nothing then.
		func() *elected { p.restart(p.standby); return p.active },
		func() *elected { p.restart(p.standby, p.active); return p.active },
	} {
		for i, c := range p.lab.Clients {
			roam(t, c, i)
		}
		p.standby.wire.none("the standby, before it is handed the role")
		asked := ask()
		var steps []control.HandoverStep
		out := p.measure(p.standby.gw, patience, func() (err error) {
			steps, err = asked.handover(nil)
			return err
		})
		t.Logf("round %d, asked on %s: %v; round trip %v: %v since it was asked for: %+v", round, asked.gw.Name, kinds, p.rtt, out, steps)
		p.active, p.standby = p.standby, p.active
		p.settled()
		p.active.wire.fromVIP("the new active")
		p.standby.wire.take()
		for _, c := range p.lab.Clients {
			ping(t, c)
		}
		p.standby.wire.none("the former active")
		since := p.active.status().RoleSince
		// It says so of itself, and may be elected again.
		await(t, "the former active may be elected", func() (bool, string) {
			out, err := exec.Command(binary(t), "check", "--elect", "--socket", p.standby.socket).CombinedOutput()
			return err == nil, string(out)
		})
		if now := p.active.status().RoleSince; !now.Equal(since) {
			t.Error("the role has moved again")
		}
	}
}

// TestKeepalivedSplit: gateways that do not hear each other's adverts are both active,
// and say so. When they hear them again, exactly one is.
func TestKeepalivedSplit(t *testing.T) {
	p := newVRRPPair(t)
	nft := func(command string) {
		t.Helper()
		p := startCommand(t, p.standby.gw, exec.Command("nft", command))
		<-p.exited
		must(t, p.err)
	}
	nft("add table ip split; add chain ip split in { type filter hook input priority 0; ip protocol vrrp drop; }; " +
		"add chain ip split out { type filter hook output priority 0; ip protocol vrrp drop; }")
	for _, e := range []*elected{p.active, p.standby} {
		e.awaitRole("active", "vrrp")
		e.awaitAlarms("two_actives")
		if n := hasVIP(t, e.gw); n != 2 {
			t.Errorf("%s has %d of the virtual IPs, want 2", e.gw.Name, n)
		}
	}
	for _, c := range p.lab.Clients {
		reach(t, c)
	}
	nft("delete table ip split")
	// The lower priority gives way.
	p.settled()
	p.standby.wire.take()
	for _, c := range p.lab.Clients {
		ping(t, c)
	}
	p.standby.wire.none("the one that gave way")
}

// TestKeepalivedDead: a standby whose daemon is dead is not elected, though it has the
// higher priority.
func TestKeepalivedDead(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "c"}, Clients: 2, OwnSource: true})
	all := startElected(t, l)
	a, h, c := all[0], all[1], all[2]
	h.awaitState("quiet")
	for _, client := range l.Clients {
		ping(t, client)
		awaitEndpoint(t, c.gw, client, client.Endpoint())
	}
	h.kill()
	h.keepalived.says("Entering FAULT STATE")
	a.keepalived.stop()
	c.awaitRole("active", "vrrp")
	c.awaitState("open")
	for _, client := range l.Clients {
		reach(t, client)
	}
	// The last one, too, leaves it nothing: its device would stay shut.
	c.keepalived.stop()
	c.awaitRole("standby", "vrrp")
	if n := hasVIP(t, h.gw); n != 0 || strings.Contains(h.keepalived.stderr.String(), "Entering MASTER STATE") {
		t.Errorf("%s has %d virtual IPs", h.gw.Name, n)
	}
	h.wire.none("the gateway whose daemon is dead")

	h.run()
	h.awaitRole("active", "vrrp")
	for _, client := range l.Clients {
		reach(t, client)
	}
	h.wire.fromVIP("the gateway whose daemon is back")
}

// TestKeepalivedReload: a reload of keepalived changes no role.
func TestKeepalivedReload(t *testing.T) {
	p := newVRRPPair(t)
	for _, e := range []*elected{p.active, p.standby} {
		before := e.status().RoleSince
		must(t, e.keepalived.cmd.Process.Signal(syscall.SIGHUP))
		e.keepalived.says("Reload complete")
		for _, c := range p.lab.Clients {
			ping(t, c)
		}
		p.settled()
		if now := e.status().RoleSince; !now.Equal(before) {
			t.Errorf("%s: the role is of %v, and was of %v", e.gw.Name, now, before)
		}
	}
	p.standby.wire.none("the standby")
}

// TestKeepalivedFlaps: however quickly the states of keepalived follow each other,
// wgroam hears all of them, in their order.
func TestKeepalivedFlaps(t *testing.T) {
	p := newVRRPPair(t)
	states := regexp.MustCompile(`\(VI_1\) Entering (MASTER|BACKUP|FAULT) STATE`)
	roles := regexp.MustCompile(`the role has changed.* role=(active|standby) by=vrrp`)
	faults := func(e *elected) int { return strings.Count(e.keepalived.stderr.String(), "Entering FAULT STATE") }
	for range 10 {
		for _, e := range []*elected{p.active, p.standby} {
			n := faults(e)
			must(t, e.gw.Kill())
			await(t, "keepalived sees the link go", func() (bool, string) { return faults(e) > n, "" })
			must(t, e.gw.Revive())
		}
	}
	await(t, "one is active", func() (bool, string) {
		a, h := p.active.status(), p.standby.status()
		return a.Role != h.Role && len(a.Alarms) == 0 && len(h.Alarms) == 0, a.Role + " and " + h.Role
	})
	if p.active.status().Role != "active" {
		p.active, p.standby = p.standby, p.active
	}
	p.settled()
	for _, c := range p.lab.Clients {
		reach(t, c)
	}
	for _, e := range []*elected{p.active, p.standby} {
		var want, got []string
		for _, s := range states.FindAllStringSubmatch(e.keepalived.stderr.String(), -1) {
			role := "standby"
			if s[1] == "MASTER" {
				role = "active"
			}
			// From one to another that is the same to us.
			if len(want) == 0 || want[len(want)-1] != role {
				want = append(want, role)
			}
		}
		for _, s := range roles.FindAllStringSubmatch(e.stderr.String(), -1) {
			got = append(got, s[1])
		}
		t.Logf("%s: %d states, %d roles", e.gw.Name, len(states.FindAllString(e.keepalived.stderr.String(), -1)), len(got))
		// It is a standby by the virtual IP before keepalived speaks.
		if !slices.Equal(want[1:], got) {
			t.Errorf("%s: keepalived has been %v, wgroam %v", e.gw.Name, want, got)
		}
	}
}
