// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

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

// run starts wgroam again.
func (e *elected) run() {
	e.t.Helper()
	e.process = start(e.t, e.gw, nil, "run", "--config", e.file)
	e.says("following endpoint changes")
}

// kill leaves wgroam no time for anything.
func (e *elected) kill() {
	e.t.Helper()
	if err := e.cmd.Process.Kill(); err != nil {
		e.t.Fatal(err)
	}
	<-e.exited
}

// newKeepalived writes the configuration of keepalived for a node, which has a
// priority.
func newKeepalived(t testing.TB, n *node, dir string, priority int) *keepalived {
	t.Helper()
	if _, err := exec.LookPath("keepalived"); err != nil {
		t.Fatalf("run make deps: %v", err)
	}
	text, err := os.ReadFile("../contrib/keepalived/keepalived.conf")
	if err != nil {
		t.Fatal(err)
	}
	wgroam := binary(t)
	for _, s := range []struct{ old, new string }{
		{"/run/wgroam/keepalived.fifo", filepath.Join(dir, "keepalived.fifo")},
		{"/usr/local/sbin/wgroam role", wgroam + " role --socket " + n.socket},
		{"/usr/local/sbin/wgroam check --feed", wgroam + " check --feed --socket " + n.socket},
		{"interface eth0", "interface lan0"},
		{"203.0.113.10", lab.VIP4.String()},
		{"2001:db8::10", lab.VIP6.String()},
		{"priority 110", "priority " + strconv.Itoa(priority)},
	} {
		if strings.Count(string(text), s.old) != 1 {
			t.Fatalf("keepalived.conf has %q %d times, want once", s.old, strings.Count(string(text), s.old))
		}
		text = []byte(strings.Replace(string(text), s.old, s.new, 1))
	}
	k := &keepalived{gw: n.gw, file: filepath.Join(dir, "keepalived.conf")}
	if err := os.WriteFile(k.file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	k.args = []string{
		"--dont-fork", "--vrrp", "--log-console", "--log-detail", "--no-syslog", "--use-file", k.file,
		"--pid", filepath.Join(dir, "keepalived.pid"), "--vrrp_pid", filepath.Join(dir, "vrrp.pid"),
	}
	k.process = &process{t: t}
	return k
}

func (k *keepalived) run() {
	k.t.Helper()
	cmd := exec.Command("keepalived", k.args...)
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
	// From now on it is keepalived's.
	err := l.Gateways[0].Do(func() error {
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
	})
	if err != nil {
		t.Fatal(err)
	}
	p := &vrrpPair{}
	var all []*elected
	for i, gw := range l.Gateways {
		dir := t.TempDir()
		device := fmt.Sprintf("role = \"auto\"\nvip = [%q, %q]\nvrrp = \"VI_1\"", lab.VIP4, lab.VIP6)
		tables := fmt.Sprintf("[keepalived]\nfifo = %q\n", filepath.Join(dir, "keepalived.fifo"))
		e := &elected{wire: capturePackets(t, gw)}
		e.node = startNode(t, gw, dir, roleConfig(gw, dir, device, tables, others(l, gw)...))
		e.keepalived = newKeepalived(t, e.node, dir, 110-10*i)
		all = append(all, e)
	}
	p.active, p.standby = all[0], all[1]
	for _, e := range all {
		e.awaitNodes(1)
		e.keepalived.run()
		if e == p.active {
			e.awaitRole("active", "vrrp")
		}
	}
	p.settled()
	p.outages = newOutages(t, l)
	return p
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

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
