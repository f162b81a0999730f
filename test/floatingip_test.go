// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgroam/wgroam/internal/lab"
)

// TestFloatingIP: keepalived elects, the command of contrib/floating-ip asks the cloud,
// which is this test, and wgroam is active when the cloud has done it, not before.
func TestFloatingIP(t *testing.T) {
	l := newLab(t, lab.Config{Clients: len(kinds)})
	var all []*elected
	var dirs []string
	for i, gw := range l.Gateways {
		dir := t.TempDir()
		e := &elected{wire: capturePackets(t, gw)}
		e.node = startNode(t, gw, dir, roleConfig(gw, dir, `role = "auto"`, "", others(l, gw)...))
		api := filepath.Join(dir, "move-address")
		must(t, os.WriteFile(api, fmt.Appendf(nil, "#!/bin/sh\n: >%[1]s/asked\n[ -e %[1]s/moved ]\n", dir), 0o700))
		must(t, os.WriteFile(filepath.Join(dir, "wgroam"), fmt.Appendf(nil, "#!/bin/sh\nexec %s \"$@\" --socket %s\n", binary(t), e.socket), 0o700))
		hook, err := filepath.Abs(contrib("floating-ip/floating-ip"))
		must(t, err)
		e.keepalived = newKeepalived(t, e.node, dir, "floating-ip", 110-10*i, map[string]string{
			"/run/wgroam/floating-ip.fifo":        filepath.Join(dir, "fifo"),
			"/usr/local/lib/wgroam/floating-ip":   hook,
			"/etc/wgroam/move-address":            api,
			"unicast_src_ip 10.0.0.11":            "unicast_src_ip " + gw.Addr4.String(),
			"unicast_peer {\n        10.0.0.12\n": "unicast_peer {\n        " + others(l, gw)[0].Addr4.String() + "\n",
		})
		all, dirs = append(all, e), append(dirs, dir)
	}
	// The cloud has done what gateway i asks for.
	grant := func(i int) error {
		must(t, l.MoveVIP(l.Gateways[i]))
		for j, dir := range dirs {
			if j == i {
				must(t, os.WriteFile(filepath.Join(dir, "moved"), nil, 0o600))
			} else {
				_ = os.Remove(filepath.Join(dir, "moved")) // it may not be there
			}
			_ = os.Remove(filepath.Join(dir, "asked"))
		}
		return nil
	}
	asked := func(i int) {
		t.Helper()
		await(t, "the cloud is asked", func() (bool, string) {
			_, err := os.Stat(filepath.Join(dirs[i], "asked"))
			return err == nil, ""
		})
	}
	a, h := all[0], all[1]
	a.awaitNodes(1)
	a.keepalived.run()
	asked(0)
	// The cloud says no, and is asked again.
	must(t, os.Remove(filepath.Join(dirs[0], "asked")))
	asked(0)
	a.awaitRole("standby", "verb")
	must(t, grant(0))
	a.awaitRole("active", "verb")
	h.keepalived.run()
	h.awaitRole("standby", "verb")

	p := &vrrpPair{outages: newOutages(t, l), active: a, standby: h}
	for round := range 2 {
		from, to := round%2, (round+1)%2
		for i, c := range l.Clients {
			awaitEndpoint(t, p.standby.gw, c, roam(t, c, i))
		}
		p.standby.wire.none("the standby")
		p.active.keepalived.kill()
		asked(to)
		// The one whose keepalived is dead knows that it has lost, before the cloud moves.
		p.active.awaitRole("standby", "verb")
		p.active.awaitState("quiet")
		p.active.wire.take()
		if role := p.standby.status().Role; role != "standby" {
			t.Errorf("%s is %s before the cloud has moved the address", p.standby.gw.Name, role)
		}
		out := p.measure(p.standby.gw, patience, func() error { return grant(to) })
		t.Logf("from %s to %s, since the cloud moved the address: %v: %v", l.Gateways[from].Name, l.Gateways[to].Name, kinds, out)
		p.standby.awaitRole("active", "verb")
		p.active.keepalived.run()
		p.active, p.standby = p.standby, p.active
		p.standby.keepalived.says("Entering BACKUP STATE")
		p.standby.awaitRole("standby", "verb")
		for _, c := range l.Clients {
			ping(t, c)
		}
		p.standby.wire.none("the former active")
		p.active.wire.fromVIP("the new active")
	}
	if s := a.keepalived.stderr.String(); strings.Contains(s, "Disabling track script") {
		t.Error(s)
	}
}
