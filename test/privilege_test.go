// SPDX-License-Identifier: MIT

package test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

const nobody = 65534

// What it takes, and no more. The table in README.md says the same.
var (
	forPolling = []int{unix.CAP_NET_ADMIN}
	forFentry  = []int{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN}
	forPort    = []int{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON}
	forNetns   = []int{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN}
	forProcess = []int{unix.CAP_SYS_PTRACE} // besides, for /proc/PID/ns/net of others
	forSockets = []int{unix.CAP_DAC_OVERRIDE}
	// forAll is what the unit gives. CAP_SYS_ADMIN stands for CAP_BPF where it is
	// raised (linux/capability.h, bpf_capable), which it is not all the time.
	forAll = []int{unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_SYS_ADMIN}
)

// daemonAs starts a daemon for a device as somebody who has these capabilities.
func daemonAs(t *testing.T, gw *lab.Gateway, c confinement, device, netns string) *node {
	t.Helper()
	// Not t.TempDir, which nobody else may enter.
	dir, err := os.MkdirTemp("", "wgroam-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &node{gw: gw, socket: filepath.Join(dir, "control.sock"), file: filepath.Join(dir, "wgroam.toml")}
	cfg := fmt.Sprintf("[[device]]\nname = %q\nnetns = %q\npoll_interval = \"20ms\"\n[control]\nsocket = %q\n", device, netns, n.socket)
	if err := errors.Join(os.WriteFile(n.file, []byte(cfg), 0o644), os.Chmod(dir, 0o755), os.Chown(dir, c.UID, c.UID)); err != nil {
		t.Fatal(err)
	}
	c.Writable = []string{dir}
	n.process = confined(t, gw, c, "run", "--config", n.file)
	return n
}

// fails waits until the process has failed, naming what is missing.
func (p *process) fails(missing string) {
	p.t.Helper()
	<-p.exited
	if out := p.stderr.String(); p.err == nil || !strings.Contains(out, missing) {
		p.t.Errorf("%v: %v, not for %s:\n%s", p.cmd.Args, p.err, missing, out)
	}
}

// usesSeldom fails if a thread of the process goes about with what is seldom
// needed, or if the process could not have it.
func (n *node) usesSeldom(permitted ...int) {
	n.t.Helper()
	seldom := capSet(unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_PERFMON)
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", n.cmd.Process.Pid))
	if err != nil || len(threads) < 2 {
		n.t.Fatalf("%d threads, error %v", len(threads), err)
	}
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(text)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			if name != "CapEff" && name != "CapPrm" {
				continue
			}
			set, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				n.t.Fatal(err)
			}
			if name == "CapEff" && set&seldom != 0 {
				n.t.Errorf("%s: has %v all the time", path, capNames(set&seldom))
			}
			if want := capSet(permitted...); name == "CapPrm" && set != want {
				n.t.Errorf("%s: is permitted %x, want %x", path, set, want)
			}
		}
	}
}

// TestPrivileges: what it takes is enough, each part of it is needed, and what is
// missing is named. The daemon does what it still can.
func TestPrivileges(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "x"}})
	needKernel(t, l)
	a, x, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	run := func(gw *lab.Gateway, netns string, caps ...int) *node {
		t.Helper()
		return daemonAs(t, gw, confinement{UID: nobody, Caps: caps}, a.Device(), netns)
	}
	sees := func(n *node) {
		t.Helper()
		n.says("following endpoint changes")
		n.awaitRecord(c.Key(), c.Endpoint())
		n.awaitRecord(c.Key(), roam(t, c, 0))
	}
	ping(t, c)

	run(a, "").fails("CAP_NET_ADMIN")
	for _, args := range [][]string{{"watch"}, {"watch", "--device", a.Device()}} {
		confined(t, a, confinement{UID: nobody}, args...).fails("CAP_NET_ADMIN")
	}

	n := run(a, "", forPolling...)
	sees(n)
	n.awaitRung(control.RungPolling, "CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN")
	n.stop()

	n = run(a, "", forFentry...)
	sees(n)
	n.awaitRung(control.RungFentry, "")
	n.usesSeldom(forFentry...)
	n.stop()
	n = run(a, "", unix.CAP_NET_ADMIN, unix.CAP_BPF, unix.CAP_PERFMON)
	sees(n)
	if d := n.status().Detector; d.Rung == control.RungFentry || !strings.Contains(d.Reason, "needs CAP_SYS_ADMIN") {
		t.Errorf("without CAP_SYS_ADMIN: %+v", d)
	}
	n.stop()
	run(a, "", unix.CAP_SYS_ADMIN).fails("CAP_NET_ADMIN")
	w := confined(t, a, confinement{UID: nobody, Caps: forPolling}, "watch", "--device", a.Device())
	w.says("CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN")
	w.stop()

	// In another namespace.
	blue := netnsName(t, "blue")
	attach(t, a, blue)
	run(x, blue, forPolling...).fails("CAP_SYS_ADMIN")
	n = run(x, blue, forNetns...)
	sees(n)
	n.awaitRung(control.RungFentry, "")
	n.usesSeldom(forNetns...)
	n.stop()

	// In that of a process of another user.
	other := exec.Command("sleep", "1000")
	if err := a.Start(other); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }() // it ends by that
	path := fmt.Sprintf("/proc/%d/ns/net", other.Process.Pid)
	n = run(x, path, forNetns...)
	n.says("CAP_SYS_PTRACE")
	n.awaitDevice(a.Device()+"@"+path, control.StateWaiting)
	n.stop()
	all := slices.Concat(forNetns, forProcess)
	n = run(x, path, all...)
	sees(n)
	n.awaitRung(control.RungFentry, "")
	n.usesSeldom(all...)
}

// TestPrivilegesUser: the same for an implementation in user space, where files are
// what counts.
func TestPrivilegesUser(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a"}})
	if l.Kernel {
		t.Skip("the kernel has WireGuard, and the lab no other")
	}
	a, c := l.Gateways[0], l.Clients[0]
	ping(t, c)
	n := daemonAs(t, a, confinement{UID: nobody}, a.Device(), "")
	n.says("CAP_DAC_OVERRIDE")
	if d := n.awaitDevice(a.Device()+"@", control.StateWaiting); !strings.Contains(d.LastError, "CAP_DAC_OVERRIDE") {
		t.Errorf("status: %+v", d)
	}
	n.stop()
	confined(t, a, confinement{UID: nobody}, "watch").fails("CAP_DAC_OVERRIDE")
	confined(t, a, confinement{UID: nobody}, "watch", "--device", a.Device()).fails("CAP_DAC_OVERRIDE")

	for _, who := range []struct {
		confinement
		rung, missing string
	}{
		{confinement{UID: nobody, Caps: forSockets}, control.RungPolling, "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"},
		{confinement{UID: 0}, control.RungPolling, "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"}, // the owner
		{confinement{UID: 0, Caps: forPort[:2]}, control.RungPolling, "needs CAP_PERFMON:"},
		{confinement{UID: 0, Caps: forPort}, control.RungPort, ""},
		{confinement{UID: 0, Caps: forAll}, control.RungPort, ""},
	} {
		n := daemonAs(t, a, who.confinement, a.Device(), "")
		n.says("following endpoint changes")
		n.awaitRecord(c.Key(), c.Endpoint())
		n.awaitRecord(c.Key(), roam(t, c, 0))
		n.awaitRung(who.rung, who.missing)
		n.usesSeldom(who.Caps...)
		n.stop()
	}
}

// TestUnit: the daemon does all it can with what contrib/systemd/wgroam.service
// gives it, see TestUnitFile, and under the same restrictions.
func TestUnit(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "x"}})
	a, x, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	unit := confinement{UID: nobody, Caps: forAll, Sealed: true}
	if !l.Kernel {
		unit.UID = 0 // as the unit says for user space
	}
	ping(t, c)
	blue := netnsName(t, "blue")
	// What is mounted below /run/netns gets through to other mount namespaces from
	// the first use of ip netns on, if not before.
	ip(t, x, "netns", "add", netnsName(t, "first"))
	far := daemonAs(t, x, unit, a.Device(), blue)
	near := daemonAs(t, a, unit, a.Device(), "")
	far.says("ip netns add")
	attach(t, a, blue)
	for _, n := range []*node{far, near} {
		n.says("following endpoint changes")
		n.awaitRecord(c.Key(), c.Endpoint())
		if l.Kernel {
			n.awaitRung(control.RungFentry, "")
		}
		n.usesSeldom(forAll...)
	}
	for range 3 {
		ep := roam(t, c, 0)
		far.awaitRecord(c.Key(), ep)
		near.awaitRecord(c.Key(), ep)
	}
	unname(t, blue)
	far.awaitDevice(a.Device()+"@"+blue, control.StateMissing)
}
