// SPDX-License-Identifier: MIT

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
)

// roleDevice returns a device without a session, of a daemon.
func roleDevice(t *testing.T, cfg config.Device) *device {
	t.Helper()
	cfg.Name = "wg0"
	return newDevice(&daemon{cfg: config.Config{StateDir: t.TempDir()}, log: slog.New(slog.DiscardHandler)}, cfg)
}

// TestNotices: keepalived's word is for the devices that follow it, and no other.
func TestNotices(t *testing.T) {
	follows := roleDevice(t, config.Device{Role: config.RoleAuto, VRRP: "VI_1"})
	without := roleDevice(t, config.Device{Role: config.RoleAuto})
	fixed := roleDevice(t, config.Device{Role: "standby", VRRP: "VI_1"})
	d := &daemon{devices: []*device{follows, without, fixed}}
	for _, name := range []string{"", "VI_2"} {
		d.vrrp(failover.Notice{Name: name, Role: failover.Active})
		for i, dev := range d.devices {
			if said := dev.desk.Said(failover.ByVRRP); said != "" {
				t.Errorf("%q: device %d has heard %s", name, i, said)
			}
		}
	}
	d.vrrp(failover.Notice{Name: "VI_1", Role: failover.Active})
	if a, b, c := follows.desk.Said(failover.ByVRRP), without.desk.Said(failover.ByVRRP), fixed.desk.Said(failover.ByVRRP); a != failover.Active || b != "" || c != "" {
		t.Errorf("they have heard %q, %q, %q", a, b, c)
	}
}

// TestLeft: where nobody keeps a device, the status says why.
func TestLeft(t *testing.T) {
	dev := roleDevice(t, config.Device{Role: config.RoleAuto})
	says := func() string {
		var out control.Failover
		dev.keeperStatus(&out)
		return out.Error
	}
	dev.unkept(errors.New("no such link"))
	if got := says(); got != "" {
		t.Errorf("without a link: %q", got)
	}
	err := fmt.Errorf("%w: no netlink", errKeep)
	dev.unkept(err)
	if got := says(); got != err.Error() {
		t.Errorf("got %q, want %q", got, err)
	}
	dev.setKeeper(nil)
	if got := says(); got != "" {
		t.Errorf("kept again: %q", got)
	}
}

// TestYields: the word that is taken back makes keepalived prefer nobody.
func TestYields(t *testing.T) {
	dev := roleDevice(t, config.Device{Role: config.RoleAuto, VRRP: "VI_1"})
	dev.yield("gw-b")
	for _, c := range []struct {
		word failover.Role
		want string
	}{{failover.Standby, "gw-b"}, {"", ""}} {
		if err := dev.setRole(c.word); err != nil || dev.yields() != c.want {
			t.Errorf("%q: yields to %q, want %q (%v)", c.word, dev.yields(), c.want, err)
		}
	}
}

// TestFurthest: the clock of a node that is silent counts for as long as what it has
// stamped is in the future.
func TestFurthest(t *testing.T) {
	now := time.Now()
	node := func(state applier.NodeState, skew, ago time.Duration) groupNode {
		return groupNode{Node: applier.Node{State: state, Skew: skew, Heard: now.Add(-ago)}}
	}
	for name, c := range map[string]struct {
		nodes []groupNode
		want  time.Duration
	}{
		"none":            {nil, 0},
		"slow":            {[]groupNode{node(applier.NodeSynced, -time.Minute, 0)}, 0},
		"fast":            {[]groupNode{node(applier.NodeSynced, 3*time.Second, time.Second), node(applier.NodeSynced, time.Second, 0)}, 3 * time.Second},
		"silent":          {[]groupNode{node(applier.NodeStale, 30*time.Second, 10*time.Second)}, 20 * time.Second},
		"silent for long": {[]groupNode{node(applier.NodeStale, 30*time.Second, time.Hour), node(applier.NodeSynced, time.Second, 0)}, time.Second},
	} {
		if got := furthest(c.nodes, now); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// TestTracked: keepalived's script has to ask again and again, once it had the time to.
func TestTracked(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		started, asked time.Duration // ago; asked 0 for never
		want           bool
	}{
		"just started": {time.Second, 0, true},
		"never":        {time.Hour, 0, false},
		"now":          {time.Hour, time.Second, true},
		"not any more": {time.Hour, time.Minute, false},
	} {
		d := &device{d: &daemon{started: now.Add(-c.started)}}
		if c.asked > 0 {
			d.elected.Store(now.Add(-c.asked).UnixNano())
		}
		if got := d.tracked(now); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
