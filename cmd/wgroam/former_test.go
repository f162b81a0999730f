// SPDX-License-Identifier: MIT

package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/snapshot"
)

// TestRekeyed gives a device one private key after the other.
func TestRekeyed(t *testing.T) {
	var keys []feed.Keys
	number := make(map[string]int)
	for i := range 4 {
		k, err := feed.Derive([32]byte{8, byte(i)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
		number[k.Group()] = i
	}
	d := &device{d: new(daemon), log: slog.New(slog.DiscardHandler)}
	d.d.cfg.StateDir = t.TempDir()
	start := time.Now()
	for i, step := range []struct {
		key   int
		after time.Duration
		want  []int
	}{
		{0, 0, nil},
		{0, time.Minute, nil},                     // a session more
		{1, time.Hour, []int{0}},                  // rolled
		{0, 2 * time.Hour, []int{1}},              // and back
		{2, 3 * time.Hour, []int{1, 0}},           // once more
		{3, 4 * time.Hour, []int{0, 2}},           // no more than two
		{3, 3*time.Hour + formerFor, []int{2}},    // the older one has had its time
		{3, 4*time.Hour + formerFor, []int(nil)},  // both have
		{3, 40*time.Hour + formerFor, []int(nil)}, // for good
		{0, 9000 * time.Hour, []int{3}},           // rolled by a clock that is ahead
		{0, 90 * time.Hour, []int{3}},             // and has been corrected
		{0, 91*time.Hour + formerFor, []int(nil)},
	} {
		var got []int
		for _, f := range d.rekeyed(keys[step.key], start.Add(step.after)) {
			got = append(got, number[f.Group()])
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("step %d: former keys (-want +got)\n%s", i, diff)
		}
		// Another daemon goes on from there, and there is a file for that where there has to be.
		d = &device{d: d.d, log: d.log}
		files, err := filepath.Glob(filepath.Join(d.d.cfg.StateDir, "*"))
		if want := min(1, len(step.want)); err != nil || len(files) != want {
			t.Errorf("step %d: files %v, want %d (%v)", i, files, want, err)
		}
		d.rekeyed(keys[step.key], start.Add(step.after))
	}
}

// TestRekeyedUnreadable: a file of former keys that is none to this daemon, as one of a
// later version, is not removed.
func TestRekeyedUnreadable(t *testing.T) {
	keys, err := feed.Derive([32]byte{8}, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := &device{d: new(daemon), log: slog.New(slog.DiscardHandler)}
	d.d.cfg.StateDir = t.TempDir()
	path := filepath.Join(d.d.cfg.StateDir, keys.Group()+".former")
	if err := os.WriteFile(path, []byte("wgroam\x01\x02"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if former := d.rekeyed(keys, time.Now()); len(former) > 0 {
			t.Errorf("former keys %v", former)
		}
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}

// rolling returns a device in the middle of a key roll, whose membership in the
// former group lasts for so long.
func rolling(t *testing.T, lasts time.Duration) (*device, *session) {
	t.Helper()
	var keys [2]feed.Keys
	for i := range keys {
		var err error
		if keys[i], err = feed.Derive([32]byte{8, byte(i)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	log := slog.New(slog.DiscardHandler)
	d := &device{d: &daemon{groups: make(map[string]claim), lag: newLag()}, log: log}
	d.d.cfg.Node, d.d.cfg.NATS.Heartbeat, d.d.cfg.NATS.Peers = "gw-a", time.Second, []string{"127.0.0.1:1"}
	d.desk = failover.NewDesk(failover.DeskConfig{Fixed: failover.Always, Log: log})
	s := &session{table: wgroam.NewTable([32]byte{}), clock: wgroam.NewClock(time.Second), view: wgroam.NewView()}
	var err error
	if s.feed, s.merger, err = d.connect(s, keys[0], s.table, nil); err != nil {
		t.Fatal(err)
	}
	if err := d.join(s, snapshot.Former{Keys: keys[1], Until: time.Now().Add(lasts)}, nil); err != nil {
		t.Fatal(err)
	}
	return d, s
}

// TestMemberEnds: a membership that has had its time ends alone, and leaves nothing
// behind.
func TestMemberEnds(t *testing.T) {
	d, s := rolling(t, 50*time.Millisecond)
	m := s.former[0]
	if n := len(s.members()); n != 1 {
		t.Fatalf("%d members, want 1", n)
	}
	m.run(t.Context(), s.table, d.log)
	if n := len(s.members()); n != 0 {
		t.Errorf("%d members when the keys have had their time", n)
	}
	if _, err := d.d.claim(m.keys.Group(), claim{device: "wg1"}); err != nil {
		t.Errorf("the group is still taken: %v", err)
	}
	s.table.Merge(wgroam.Record{Peer: wgroam.Key{1}, Endpoint: netip.MustParseAddrPort("198.51.100.7:1")})
	if n := m.from.Len(); n != 0 {
		t.Errorf("%d changes that nobody will look at", n)
	}
}

// TestMemberYields: a device gets the group of its own key, also where that is a former
// one of another device.
func TestMemberYields(t *testing.T) {
	d, s := rolling(t, time.Hour)
	m, other := s.former[0], claim{device: "wg1"}
	if _, err := d.d.claim(m.keys.Group(), claim{device: "wg2", yield: func() {}}); !errors.Is(err, errSameKey) {
		t.Errorf("as former keys of two devices: %v", err)
	}
	for range 2 { // both before the membership has ended
		if _, err := d.d.claim(m.keys.Group(), other); err == nil || errors.Is(err, errSameKey) {
			t.Errorf("in the group at the same time: %v", err)
		}
	}
	m.run(t.Context(), s.table, d.log)
	if _, err := d.d.claim(m.keys.Group(), other); err != nil {
		t.Errorf("the group is still taken: %v", err)
	}
	if _, err := d.d.claim(m.keys.Group(), claim{device: "wg2"}); !errors.Is(err, errSameKey) {
		t.Errorf("the same key twice: %v", err)
	}
}

// TestFormerStatus: while keys are rolled, the trouble in the former group shows, too.
func TestFormerStatus(t *testing.T) {
	_, s := rolling(t, time.Hour)
	at := netip.MustParseAddrPort("198.51.100.7:1")
	s.former[0].merger.Update(feed.Update{Records: []wgroam.Record{
		{Peer: wgroam.Key{1}, Endpoint: at, Version: wgroam.Version{HLC: wgroam.HLCAt(time.Now().Add(time.Hour)), Node: 2}},
		{Peer: wgroam.Key{2}, Version: wgroam.Version{HLC: wgroam.HLCAt(time.Now()), Node: 2}},
	}})
	var out control.FeedStatus
	s.feedStatus(&out)
	if out.Refused["skew"] != 1 || out.Refused["endpoint"] != 1 {
		t.Errorf("refused: %v", out.Refused)
	}
	var former []bool
	for _, c := range out.Connections {
		former = append(former, c.Former)
	}
	if diff := cmp.Diff([]bool{false, true}, former); diff != "" {
		t.Errorf("connections of former keys (-want +got)\n%s", diff)
	}
	if err := s.future(); !errors.Is(err, wgroam.ErrSkew) {
		t.Errorf("records from the future: %v", err)
	}
}
