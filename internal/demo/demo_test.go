// SPDX-License-Identifier: MIT

package demo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/wgroam/wgroam/internal/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStrip(t *testing.T) {
	start := time.Now()
	crash := start.Add(10 * time.Second)
	cut := crash.Add(20 * time.Millisecond)
	// at is an arrival, in milliseconds after the crash.
	at := func(sent, got int) arrival {
		return arrival{10*time.Second + time.Duration(sent)*time.Millisecond, 10*time.Second + time.Duration(got)*time.Millisecond}
	}
	for name, tt := range map[string]struct {
		arrivals []arrival
		now      time.Duration
		want     string // up to the spaces at the end
		outage   time.Duration
		back     bool
	}{
		"nothing yet":        {nil, 0, "..|", 0, false},
		"only before":        {[]arrival{at(-3000, -2999), at(-900, -899), at(-400, -399)}, 1200 * time.Millisecond, "##|..", 0, false},
		"sent before, late":  {[]arrival{at(-900, -899), at(10, 30)}, time.Second, "##|..", 0, false},
		"back":               {[]arrival{at(-900, -899), at(-10, -9), at(100, 1600)}, 1700 * time.Millisecond, "##|...#", 1600 * time.Millisecond, true},
		"unfinished is open": {[]arrival{at(-900, -899), at(-10, -9), at(30, 40)}, 600 * time.Millisecond, "##|#", 40 * time.Millisecond, true},
		"the end":            {[]arrival{at(19_000, 19_700), at(20_000, 20_001)}, limit, "..|" + strings.Repeat(".", 39) + "#", 19_700 * time.Millisecond, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := &flow{start: start, arrivals: tt.arrivals}
			strip := f.strip(crash, cut, tt.now)
			if got := strings.TrimRight(strip, " "); got != tt.want {
				t.Errorf("strip %q, want %q", got, tt.want)
			}
			if len(strip) != 43 {
				t.Errorf("strip has %d characters, want 43", len(strip))
			}
			if d, ok := f.outage(crash, cut); d != tt.outage || ok != tt.back {
				t.Errorf("outage %v %v, want %v %v", d, ok, tt.outage, tt.back)
			}
		})
	}
}

// A flow over UDP on the loopback, there and back.
func TestFlow(t *testing.T) {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	s := new(show)
	f := s.flow(ctx, hears{conn}, calls{conn, conn.LocalAddr()})
	defer s.wg.Wait()
	defer cancel()

	arrived := func() int { _, n := f.count(); return n }
	if err := eventually(ctx, "packets", func() (bool, error) { return arrived() > 5, nil }); err != nil {
		t.Fatal(err)
	}
	err = f.between(ctx, func() error {
		sent, n := f.count()
		if n != sent {
			t.Errorf("%d of %d packets have arrived between two packets", n, sent)
		}
		if err := pause(ctx, 5*interval); err != nil {
			return err
		}
		if later, _ := f.count(); later != sent {
			t.Errorf("%d packets were sent between two packets", later-sent)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	n := arrived()
	if err := eventually(ctx, "more packets", func() (bool, error) { return arrived() > n, nil }); err != nil {
		t.Fatal(err)
	}
	// A packet that is lost does not hold things up.
	f.mu.Lock()
	f.arrivals = nil
	f.mu.Unlock()
	boom := errors.New("boom")
	if err := f.between(ctx, func() error { return boom }); !errors.Is(err, boom) {
		t.Errorf("error %v, want that of the function", err)
	}
	cancel()
	if err := f.between(ctx, func() error { return nil }); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("error %v after the end", err)
	}
}

func TestSightings(t *testing.T) {
	is := func(ep string) func(control.Event) bool {
		want := netip.MustParseAddrPort(ep)
		return func(e control.Event) bool { return e.New == want }
	}
	event := func(ep string) control.Event { return control.Event{New: netip.MustParseAddrPort(ep)} }

	s := new(sightings)
	s.add(event("192.0.2.1:1"))
	if _, err := s.wait(t.Context(), 0, is("192.0.2.1:1")); err != nil {
		t.Error("an old event:", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error)
	for range 2 {
		go func() {
			_, err := s.wait(ctx, s.len(), is("192.0.2.1:1"))
			got <- err
		}()
	}
	s.add(event("192.0.2.2:1"))
	cancel()
	for range 2 {
		if err := <-got; !errors.Is(err, context.Canceled) {
			t.Errorf("an event that does not come again: error %v", err)
		}
	}
	go func() {
		_, err := s.wait(t.Context(), s.len(), is("[2001:db8::1]:1"))
		got <- err
	}()
	// The one that waits may come after the first of these.
	for done := false; !done; {
		s.add(event("[2001:db8::1]:1"))
		select {
		case err := <-got:
			if err != nil {
				t.Error("a new event:", err)
			}
			done = true
		default:
		}
	}
}

func TestLatency(t *testing.T) {
	s := &show{sum: &Summary{}}
	if l := s.latency(); l != nil {
		t.Errorf("no roams: %+v", l)
	}
	for _, us := range []int64{40, 10, 30} {
		s.sum.Roams = append(s.sum.Roams, Roam{Arrived: true, LatencyUS: us})
	}
	s.sum.Roams = append(s.sum.Roams, Roam{LatencyUS: 0})
	want := &Latency{Method: s.latencyMethod(), MinUS: 10, MedianUS: 30, MaxUS: 40}
	if diff := cmp.Diff(want, s.latency()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	s.sum.Roams = append(s.sum.Roams, Roam{Arrived: true, LatencyUS: 20})
	want.MedianUS = 25
	if diff := cmp.Diff(want, s.latency()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if s.arrived() != 4 {
		t.Errorf("%d arrived, want 4", s.arrived())
	}
}

func TestVerdict(t *testing.T) {
	good := Outage{Back: true, OutageMS: 30}
	for name, tt := range map[string]struct {
		with Outcome
		ok   bool
	}{
		"both called":           {Outcome{2, good, good}, true},
		"silent client is lost": {Outcome{2, good, Outage{false, 20_000}}, false},
		"client came by itself": {Outcome{2, Outage{true, 15_100}, good}, false},
	} {
		s := &show{sum: &Summary{Failover: &Failover{With: tt.with}}}
		if err := s.verdict(); (err == nil) != tt.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestScreen(t *testing.T) {
	story := func(s *Screen) {
		s.draw("working")
		s.print("one")
		s.draw("a", "b")
		s.draw("c")
		s.print("two", s.paint(bold, "three"))
		s.draw()
	}
	var plain bytes.Buffer
	story(NewScreen(&plain))
	if diff := cmp.Diff("one\ntwo\nthree\n", plain.String()); diff != "" {
		t.Errorf("plain (-want +got):\n%s", diff)
	}
	var live bytes.Buffer
	story(&Screen{w: &live, live: true, color: true})
	const up1, up2 = "\r\x1b[1A\x1b[J", "\r\x1b[2A\x1b[J"
	want := "working\n" + up1 + "one\na\nb\n" + up2 + "c\n" + up1 + "two\n\x1b[1mthree\x1b[0m\n"
	if diff := cmp.Diff(want, live.String()); diff != "" {
		t.Errorf("live (-want +got):\n%s", diff)
	}
	// Nobody is looking any more.
	NewScreen(failingWriter{}).print("one")
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// Nothing that is said may wrap on a terminal of 80 columns.
func TestWidth(t *testing.T) {
	s := &show{screen: NewScreen(io.Discard), sum: &Summary{
		Kernel: "6.12.117+deb12-cloud-amd64", WireGuard: "wireguard-go",
		Detector: control.Detector{Rung: "polling", Reason: strings.Repeat("reason ", 40)},
		Roams: []Roam{{
			What: "address", Old: netip.MustParseAddrPort("[2001:db8::1f]:10012"), New: netip.MustParseAddrPort("[2001:db8::2f]:10012"),
			Cause: "initiation", Arrived: true, LatencyUS: 123_456,
		}},
		Failover: &Failover{With: Outcome{2, Outage{true, 14_999}, Outage{true, 14_999}}, Without: Outcome{0, Outage{false, 20_000}, Outage{false, 20_000}}},
	}}
	s.sum.Latency = s.latency()
	s.with, s.without = &side{sends: &flow{}, silent: &flow{}}, &side{sends: &flow{}, silent: &flow{}}
	var lines []string
	for _, hooked := range []bool{true, false} {
		for _, wireguard := range []string{"kernel", "wireguard-go"} {
			s.hooked, s.sum.WireGuard = hooked, wireguard
			lines = append(lines, wrap(s.describe())...)
			lines = append(lines, s.roamsResult()...)
			lines = append(lines, s.summaryRows()...)
		}
	}
	lines = append(lines, title, roamsTitle, failoverTitle, s.roamsHeader(), s.roamRow(s.sum.Roams[0]), s.traffic())
	lines = append(lines, wrap(failoverText)...)
	lines = append(lines, s.failoverRows(limit)...)
	lines = append(lines, s.failoverRows(limit-1)...)
	for _, l := range lines {
		if len(l) > width {
			t.Errorf("%d characters: %s", len(l), l)
		}
	}
	if len(lines) < 40 {
		t.Errorf("only %d lines", len(lines))
	}
}

func TestWrap(t *testing.T) {
	long := strings.Repeat("x", 100)
	text := strings.Repeat("word ", 16) + long + " end"
	want := []string{strings.TrimSpace(strings.Repeat("word ", 16)), long, "end"}
	if diff := cmp.Diff(want, wrap(text)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
