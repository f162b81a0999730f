// SPDX-License-Identifier: MIT

package main

import (
	"slices"
	"testing"
	"time"

	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/control"
)

func TestCheckStatus(t *testing.T) {
	healthy := func() control.DeviceStatus {
		return control.DeviceStatus{
			Name: "wg0", State: control.StateUp, Detector: control.Detector{Rung: control.RungFentry},
			Feed: control.FeedStatus{
				Mode:        control.FeedEmbedded,
				Connections: []control.FeedConnection{{Connection: control.Connection{Name: "10.0.0.2:4950", Connected: true}}},
				Nodes:       []control.NodeStatus{{Name: "gw-b", State: control.NodeSynced}},
			},
		}
	}
	for name, c := range map[string]struct {
		spoil func(*control.DeviceStatus)
		check string // the one that is not ok
		state string
	}{
		"healthy": {func(*control.DeviceStatus) {}, "", ""},
		"waiting": {func(d *control.DeviceStatus) { d.State = control.StateWaiting }, "device", checkFail},
		"missing": {func(d *control.DeviceStatus) { d.State = control.StateMissing }, "device", checkFail},
		"down":    {func(d *control.DeviceStatus) { d.State = control.StateDown }, "", ""},
		"polling": {func(d *control.DeviceStatus) {
			d.Detector = control.Detector{Rung: control.RungPolling, Reason: "no BTF"}
		}, "detector", checkWarn},
		"port": {func(d *control.DeviceStatus) {
			d.Detector = control.Detector{Rung: control.RungPort, Reason: "user space"}
		}, "", ""},
		"repaired":    {func(d *control.DeviceStatus) { d.SweepRepairs = 1 }, "losses", checkWarn},
		"not applied": {func(d *control.DeviceStatus) { d.ApplyErrors, d.LastError = 1, "EINVAL" }, "applier", checkWarn},
		"disk full":   {func(d *control.DeviceStatus) { d.Snapshot.Error = "no space left" }, "snapshot", checkWarn},
		"not serving": {func(d *control.DeviceStatus) { d.Feed.Error = "address in use" }, "feed", checkFail},
		"ahead":       {func(d *control.DeviceStatus) { d.Feed.Nodes[0].SkewMS = -9000 }, "clock", checkWarn},
		"behind": {func(d *control.DeviceStatus) {
			d.Role, d.Failover.State, d.ClockBehindMS = "standby", failover.StateQuiet, 9000
		}, "clock", checkFail},
		"active and behind": {func(d *control.DeviceStatus) {
			d.Role, d.Failover.State, d.ClockBehindMS = "active", failover.StateOpen, 9000
		}, "clock", checkWarn},
		"a little behind": {func(d *control.DeviceStatus) { d.ClockBehindMS = 300 }, "clock", checkWarn},
		"hardly behind":   {func(d *control.DeviceStatus) { d.ClockBehindMS = 30 }, "", ""},
		"not active":      {func(d *control.DeviceStatus) { d.Role = "active" }, "failover", checkFail},
		"being promoted":  {func(d *control.DeviceStatus) { d.Role, d.Failover.State = "active", failover.StatePromoting }, "", ""},
		"not known yet":   {func(d *control.DeviceStatus) { d.Role, d.RoleSince = "unknown", time.Now() }, "role", checkWarn},
		"never known":     {func(d *control.DeviceStatus) { d.Role, d.RoleSince = "unknown", time.Now().Add(-time.Minute) }, "role", checkFail},
		"left alone":      {func(d *control.DeviceStatus) { d.Role, d.Failover.Error = "active", "no netlink" }, "failover", checkFail},
		"hands over": {func(d *control.DeviceStatus) {
			d.Role, d.Failover = "active", control.Failover{State: failover.StateOpen, Yields: "gw-b"}
		}, "keepalived", checkWarn},
		"yields":          {func(d *control.DeviceStatus) { d.Failover.Yields = "gw-b" }, "keepalived", checkWarn},
		"not quiet":       {func(d *control.DeviceStatus) { d.Role, d.Failover.State = "standby", failover.StateIdle }, "failover", checkFail},
		"quiet":           {func(d *control.DeviceStatus) { d.Role, d.Failover.State = "standby", failover.StateQuiet }, "", ""},
		"from the future": {func(d *control.DeviceStatus) { d.Feed.Refused = map[string]uint64{"skew": 1, "auth": 1} }, "feed", checkWarn},
		"alone":           {func(d *control.DeviceStatus) { d.Feed = control.FeedStatus{Mode: control.FeedNone} }, "feed", checkWarn},
		"a standby alone": {func(d *control.DeviceStatus) {
			d.Role, d.Failover.State, d.Feed = "standby", failover.StateQuiet, control.FeedStatus{Mode: control.FeedNone}
		}, "feed", checkFail},
		"unheard": {func(d *control.DeviceStatus) { d.Feed.Nodes = nil }, "feed", checkWarn},
		"a standby unheard": {func(d *control.DeviceStatus) {
			d.Role, d.Failover.State, d.Feed.Nodes = "standby", failover.StateQuiet, nil
		}, "feed", checkFail},
		"disconnected": {func(d *control.DeviceStatus) { d.Feed.Connections[0].Connected = false }, "feed", checkFail},
		"keepalived": {func(d *control.DeviceStatus) {
			d.Keepalived = &control.Keepalived{FIFO: "/run/fifo", Name: "VI_1", Tracks: true, Says: "active", Heard: true, Others: []string{"VI_2"}}
		}, "", ""},
		"keepalived before": {func(d *control.DeviceStatus) {
			d.Keepalived = &control.Keepalived{FIFO: "/run/fifo", Name: "VI_1", Tracks: true, Says: "active"}
		}, "", ""},
		"keepalived's FIFO": {func(d *control.DeviceStatus) {
			d.Keepalived = &control.Keepalived{FIFO: "/run/fifo", Name: "VI_1", Tracks: true, Says: "active", Error: "no FIFO"}
		}, "keepalived", checkFail},
		"keepalived's other instance": {func(d *control.DeviceStatus) {
			d.Keepalived = &control.Keepalived{FIFO: "/run/fifo", Name: "VI_1", Tracks: true, Others: []string{"VI_2"}}
		}, "keepalived", checkFail},
		"keepalived's other instance since": {func(d *control.DeviceStatus) {
			d.Keepalived = &control.Keepalived{FIFO: "/run/fifo", Name: "VI_1", Tracks: true, Says: "standby", Others: []string{"VI_2"}}
		}, "keepalived", checkWarn},
		"keepalived's death": {func(d *control.DeviceStatus) {
			d.Keepalived = &control.Keepalived{FIFO: "/run/fifo", Name: "VI_1", Says: "active", Heard: true}
		}, "keepalived", checkWarn},
		"keepalived's silence": {func(d *control.DeviceStatus) {
			d.Keepalived = &control.Keepalived{FIFO: "/run/fifo", Name: "VI_1", Tracks: true}
		}, "keepalived", checkWarn},
		"keys are rolled": {func(d *control.DeviceStatus) {
			c := d.Feed.Connections[0]
			c.Former, d.Feed.Connections[0].Connected = true, false
			d.Feed.Connections = append(d.Feed.Connections, c)
		}, "feed", checkWarn},
		"keys have been rolled": {func(d *control.DeviceStatus) {
			d.Feed.Connections = append(d.Feed.Connections, control.FeedConnection{Connection: control.Connection{Name: "10.0.0.2:4950"}, Former: true})
		}, "", ""},
		"forbidden": {func(d *control.DeviceStatus) { d.Feed.Connections[0].Error = "permissions violation" }, "feed", checkFail},
		"stale":     {func(d *control.DeviceStatus) { d.Feed.Nodes[0].State = control.NodeStale }, "feed", checkFail},
		"syncing":   {func(d *control.DeviceStatus) { d.Feed.Nodes[0].State = control.NodeSyncing }, "feed", checkWarn},
	} {
		t.Run(name, func(t *testing.T) {
			d := healthy()
			c.spoil(&d)
			behind := slices.Contains([]string{"waiting", "missing", "unheard", "a standby alone", "a standby unheard", "stale", "syncing", "yields", "hands over"}, name)
			if err := electable(control.Status{Devices: []control.DeviceStatus{d}}); (err != nil) != (name == "hands over") {
				t.Errorf("electable: %v", err)
			}
			if err := inStep(control.Status{Devices: []control.DeviceStatus{d}}); (err != nil) != behind {
				t.Errorf("in step: %v", err)
			}
			found := false
			for _, f := range checkStatus(control.Status{Node: "gw-a", Devices: []control.DeviceStatus{d}}) {
				if f.Detail == "" || (f.Do == "") != (f.State == checkOK) {
					t.Errorf("%+v: every line says what it is, and those that are not ok what to do", f)
				}
				if f.State == checkOK {
					continue
				}
				if found = true; f.Check != c.check || f.State != c.state || f.Device != "wg0" {
					t.Errorf("%+v, want %s %s", f, c.check, c.state)
				}
			}
			if found != (c.check != "") {
				t.Errorf("found something: %v", found)
			}
		})
	}
}

// TestCheckEvents: who does not hear of roams warns, and is no reason not to be ready.
func TestCheckEvents(t *testing.T) {
	up := control.Connection{Name: "nats://x", Connected: true}
	for name, c := range map[string]struct {
		events control.EventsStatus
		state  string
	}{
		"fine":    {control.EventsStatus{Connection: up, Sent: 7}, checkOK},
		"away":    {control.EventsStatus{Connection: control.Connection{Name: "nats://x", Error: "refused"}}, checkWarn},
		"dropped": {control.EventsStatus{Connection: up, Dropped: 1}, checkWarn},
	} {
		got := checkStatus(control.Status{Events: &c.events})
		if len(got) != 2 || got[1].Check != "events" || got[1].State != c.state || (got[1].Do == "") != (c.state == checkOK) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
