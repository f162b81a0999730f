// SPDX-License-Identifier: MIT

package main

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/internal/feed"
)

// TestRenew: the record of a peer that completes handshakes does not age, unless it
// says something else than the device.
func TestRenew(t *testing.T) {
	keys, err := feed.Derive([32]byte{1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	link, err := feed.New(feed.Config{Name: "gw-a", Keys: keys, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	const after = time.Hour
	now := time.Now().Truncate(time.Millisecond)
	at, other := netip.MustParseAddrPort("198.51.100.7:1"), netip.MustParseAddrPort("198.51.100.7:2")
	peer := wgroam.Key{1}
	for name, c := range map[string]struct {
		seen, handshake time.Duration // ago
		at              netip.AddrPort
		renewed         bool
	}{
		"old, and alive":          {3 * after, time.Minute, at, true},
		"not so old":              {after / 2, time.Minute, at, false},
		"old, and silent":         {3 * after, 3*after - time.Minute, at, false},
		"elsewhere in the device": {3 * after, time.Minute, other, false},
		"in the future":           {3 * after, -time.Minute, at, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &session{table: wgroam.NewTable([32]byte{}), feed: link}
			s.renew(peer, at, now, after)
			if s.table.Len() != 0 {
				t.Error("a record out of nothing")
			}
			was := wgroam.Record{
				Peer: peer, Endpoint: at, Cause: wgroam.CauseData,
				Version: wgroam.Version{HLC: wgroam.HLCAt(now.Add(-c.seen)), Node: 2},
			}
			s.table.Merge(was)
			s.renew(peer, c.at, now.Add(-c.handshake), after)
			want := was
			if c.renewed {
				want.Version = wgroam.Version{HLC: wgroam.HLCAt(now.Add(-c.handshake)), Node: link.Self()}
			}
			if got, _ := s.table.Get(peer); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// TestClockSetBack: a table of former keys follows a clock that is set back as the
// device's own does, whoever looks first.
func TestClockSetBack(t *testing.T) {
	const self, skew = 1, 10 * time.Second
	right := time.Now()
	d := &device{log: slog.New(slog.DiscardHandler), clock: wgroam.NewClock(skew)}
	at := netip.MustParseAddrPort("198.51.100.7:1")
	seen := func(peer byte, when time.Time) wgroam.Record {
		return wgroam.Record{
			Peer: wgroam.Key{peer}, Endpoint: at, Cause: wgroam.CauseData,
			Version: wgroam.Version{HLC: d.clock.Stamp(when), Node: self},
		}
	}
	tables := []*wgroam.Table{wgroam.NewTable([32]byte{1}), wgroam.NewTable([32]byte{2})}
	early, late := seen(1, right.Add(time.Hour)), seen(2, right.Add(time.Hour))
	for _, table := range tables {
		table.Merge(early)
	}
	d.rewind(self, right, tables...)
	tables[1].Merge(late) // which was on its way
	d.rewind(self, right.Add(clockCheck), tables...)
	for i, table := range tables {
		for peer := range byte(2) {
			r := seen(peer+1, right.Add(time.Second))
			if r.Version.HLC > d.clock.Limit(right.Add(time.Second)) {
				t.Errorf("a stamp of the future: %v", r.Version.HLC.Time().Sub(right))
			}
			if !table.Merge(r) {
				t.Errorf("table %d: what peer %d does now is lost", i, peer+1)
			}
		}
	}
}

// TestHandOver: a peer that has roamed while no session ran is not taken back to where
// the session before saw it, unless it has been silent for long.
func TestHandOver(t *testing.T) {
	keys, err := feed.Derive([32]byte{1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	link, err := feed.New(feed.Config{Name: "gw-a", Keys: keys, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	was, is := netip.MustParseAddrPort("198.51.100.7:1"), netip.MustParseAddrPort("198.51.100.7:2")
	for name, c := range map[string]struct {
		handshake time.Duration // ago
		want      netip.AddrPort
	}{
		"roamed":       {time.Minute, is},
		"a dead place": {time.Hour, was},
	} {
		t.Run(name, func(t *testing.T) {
			peer := wgroam.Key{1}
			at := now.Add(-c.handshake)
			d := &device{log: log, clock: wgroam.NewClock(10 * time.Second), table: wgroam.NewTable([32]byte{1})}
			d.table.Merge(wgroam.Record{
				Peer: peer, Endpoint: was, Cause: wgroam.CauseData,
				Version: wgroam.Version{HLC: wgroam.HLCAt(now.Add(-time.Second)), Node: link.Self()},
			})
			s := &session{table: wgroam.NewTable([32]byte{2}), clock: d.clock, view: wgroam.NewView(), feed: link}
			s.merger = applier.NewMerger(applier.MergerConfig{Self: link.Self(), Table: s.table, Clock: s.clock, View: s.view, Log: log})
			// What the tracker finds as the session begins.
			s.view.Set(peer, wgroam.Holding{Endpoint: is, Cause: wgroam.CauseSnapshot, At: at})
			d.record(s, wgroam.Observation{Peer: peer, New: is, Cause: wgroam.CauseSnapshot, At: at})
			d.handOver(s)
			if r, _ := s.table.Get(peer); r.Endpoint != c.want {
				t.Errorf("the table has %v, want %v", r.Endpoint, c.want)
			}
			if d.table != s.table {
				t.Error("the next session will not know what this one learns")
			}
		})
	}
}

// TestSettled: before there is a session, what the snapshot knows is not in the
// device yet.
func TestSettled(t *testing.T) {
	if new(device).settled() {
		t.Error("settled without a session")
	}
}
