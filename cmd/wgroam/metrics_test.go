// SPDX-License-Identifier: MIT

package main

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/events"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/tracker"
)

// A daemon whose device does not exist yet has metrics all the same.
func TestCollector(t *testing.T) {
	cfg, err := config.ForDevice("wg0")
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{cfg: cfg, log: slog.New(slog.DiscardHandler), kernel: new(tracker.Kernel), lag: newLag()}
	d.cfg.StateDir = t.TempDir()
	dev := newDevice(d, cfg.Devices[0])
	d.devices = []*device{dev}

	problems, err := testutil.CollectAndLint(collector{d})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	want := `
# HELP wgroam_role 1 for the role that the node has for the device.
# TYPE wgroam_role gauge
wgroam_role{device="wg0",netns="",role="always"} 1
# HELP wgroam_sweep_repairs_total Changes that only the slow sweep found.
# TYPE wgroam_sweep_repairs_total counter
wgroam_sweep_repairs_total{device="wg0",netns=""} 0
`
	if err := testutil.CollectAndCompare(collector{d}, strings.NewReader(want), "wgroam_sweep_repairs_total", "wgroam_role"); err != nil {
		t.Error(err)
	}
}

// The defaults of watch are those of the configuration.
func TestDefaults(t *testing.T) {
	cfg, err := config.ForDevice("wg0")
	if err != nil {
		t.Fatal(err)
	}
	if cfg.ControlSocket != defaultSocket || cfg.Devices[0].PollInterval != defaultPoll || cfg.Devices[0].SweepInterval != defaultSweep {
		t.Errorf("watch and run have different defaults: %+v", cfg)
	}
}

// Who publishes roams has their numbers.
func TestEventMetrics(t *testing.T) {
	d := &daemon{log: slog.New(slog.DiscardHandler), public: events.New(events.Config{Node: "gw-a"})}
	keys, err := feed.Derive([32]byte{8}, nil)
	if err != nil {
		t.Fatal(err)
	}
	d.public.Publish(keys, control.Event{})
	want := `
# HELP wgroam_roams_dropped_total Roams that could not be published for other programs.
# TYPE wgroam_roams_dropped_total counter
wgroam_roams_dropped_total 0
# HELP wgroam_roams_published_total Roams published for other programs.
# TYPE wgroam_roams_published_total counter
wgroam_roams_published_total 0
# HELP wgroam_roams_waiting Roams that wait for the connection to be published on.
# TYPE wgroam_roams_waiting gauge
wgroam_roams_waiting 1
`
	if err := testutil.CollectAndCompare(collector{d}, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}
