// SPDX-License-Identifier: MIT

package demo

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/wgroam/wgroam/internal/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var update = flag.Bool("update", false, "rewrite the golden files")

// at is an arrival, in milliseconds after a death 10 seconds after the start.
func at(sent, got int) arrival {
	return arrival{10*time.Second + time.Duration(sent)*time.Millisecond, 10*time.Second + time.Duration(got)*time.Millisecond}
}

func TestPicture(t *testing.T) {
	start := time.Now()
	death := start.Add(10 * time.Second)
	cut, told := death.Add(20*time.Millisecond), death.Add(1010*time.Millisecond)
	for name, tt := range map[string]struct {
		arrivals []arrival
		now      time.Duration // after the death
		want     string        // up to the spaces at the end
		outage   time.Duration
		back     bool
	}{
		"nothing yet":        {nil, 0, "..|  ^", 0, false},
		"only before":        {[]arrival{at(-3000, -2999), at(-900, -899), at(-400, -399)}, 1200 * time.Millisecond, "##|..^", 0, false},
		"sent before, late":  {[]arrival{at(-900, -899), at(10, 30)}, time.Second, "##|..^", 0, false},
		"back":               {[]arrival{at(-900, -899), at(-10, -9), at(100, 1600)}, 1700 * time.Millisecond, "##|..^.#", 590 * time.Millisecond, true},
		"unfinished is open": {[]arrival{at(-900, -899), at(-10, -9), at(1030, 1040)}, 1200 * time.Millisecond, "##|..^#", 30 * time.Millisecond, true},
		"the end":            {[]arrival{at(19_000, 19_700), at(20_000, 20_001)}, 20 * time.Second, "..|..^" + strings.Repeat(".", 37) + "#", 18_690 * time.Millisecond, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := &flow{start: start, arrivals: tt.arrivals}
			p := newPicture(44, death, time.Second, 20*time.Second, mark{death, '|'}, mark{told, '^'})
			row := p.row(f, death, cut, death.Add(tt.now))
			if got := strings.TrimRight(row, " "); got != tt.want {
				t.Errorf("row %q, want %q", got, tt.want)
			}
			if len(row) != 44 {
				t.Errorf("row has %d characters, want 44", len(row))
			}
			if d, ok := f.outage(told, cut); d != tt.outage || ok != tt.back {
				t.Errorf("outage %v %v, want %v %v", d, ok, tt.outage, tt.back)
			}
		})
	}
}

// Whatever the width, the picture has room for all, and every mark is there.
func TestPictureFits(t *testing.T) {
	death := time.Now()
	for columns := 20; columns < 300; columns++ {
		p := newPicture(columns, death, 2*time.Second, notice+limit, mark{death, '|'}, mark{death.Add(notice), '^'})
		row := p.row(&flow{start: death}, death, death, death.Add(time.Hour))
		if len(row) > columns || len(p.ruler()) > columns || strings.Count(row, "|") != 1 || strings.Count(row, "^") != 1 {
			t.Errorf("%d columns: %q %q", columns, p.ruler(), row)
		}
		if begin := time.Duration(p.size-p.lead) * p.per; begin < notice+limit || time.Duration(p.lead)*p.per < 2*time.Second {
			t.Errorf("%d columns: %v are shown, from %d characters before", columns, begin, p.lead)
		}
	}
}

// recorded is a demo as a busy machine has shown it, until a time after the death.
func recorded(w *Screen, until time.Duration) *show {
	s := &show{screen: w, back: make(map[*flow]bool), sum: &Summary{
		Kernel: "6.12.57+deb13-amd64", WireGuard: "kernel", Detector: control.Detector{Rung: control.RungFentry},
		Roams:    []Roam{{What: "port", Arrived: true, LatencyUS: 412}},
		Failover: &Failover{Answered: 3},
	}}
	s.hooked = true
	s.sum.Latency = s.latency()
	start := time.Unix(1_800_000_000, 0)
	// told is after the death, and back after that, zero for never.
	one := func(told time.Duration, back ...time.Duration) *side {
		const from = 10 * time.Second
		d := &side{death: start.Add(from), cut: start.Add(from + 1_300*time.Microsecond), told: start.Add(from + told)}
		for _, b := range back {
			f := &flow{start: start}
			for at := time.Duration(0); at < from+until; at += interval {
				if at < from || b > 0 && at >= from+told+b-interval {
					f.arrivals = append(f.arrivals, arrival{at, at + interval})
				}
			}
			d.flows = append(d.flows, f)
		}
		return d
	}
	s.with = one(1_012*time.Millisecond, 139_282*time.Microsecond, 132_104*time.Microsecond, 132_351*time.Microsecond)
	s.with.known = 3
	s.without = one(1_011*time.Millisecond, 14_053_870*time.Microsecond, 0, 0)
	s.sum.Failover.With, s.sum.Failover.Without = s.with.outcome(), s.without.outcome()
	return s
}

// The rows of the second act, as they were after a time and at the end, on
// terminals of several widths.
func TestFailoverRows(t *testing.T) {
	for _, columns := range []int{60, 79, 120, 159} {
		screen := &Screen{w: io.Discard, width: columns}
		var s *show
		var rows []string
		for _, until := range []time.Duration{800 * time.Millisecond, 12_340 * time.Millisecond, notice + limit + 100*time.Millisecond} {
			s = recorded(screen, until)
			if until < notice {
				s.with.told, s.without.told = time.Time{}, time.Time{}
			}
			rows = append(rows, s.failoverRows(s.with.death.Add(until))...)
		}
		rows = append(rows, s.closeRows(s.with.death.Add(2*limit))...)
		rows = append(rows, s.summaryRows()...)
		got := strings.Join(rows, "\n") + "\n"
		for _, r := range rows {
			if strings.HasPrefix(r, "  with") && len(r) > columns {
				t.Errorf("%d characters in %d columns: %s", len(r), columns, r)
			}
		}
		path := filepath.Join("testdata", fmt.Sprintf("failover-%d.txt", columns))
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", path, diff)
		}
	}
	// Colours change no character, and a client that is not back gets no close view.
	s := recorded(&Screen{w: io.Discard, width: width}, 2*limit)
	plain := s.failoverRows(s.with.told)
	s.screen.color = true
	for i, r := range s.failoverRows(s.with.told) {
		if !strings.Contains(r, "\x1b[") || regexp.MustCompile("\x1b\\[[0-9]*m").ReplaceAllString(r, "") != plain[i] {
			t.Errorf("in colours: %q", r)
		}
	}
	s.with.flows[2].arrivals = nil
	if rows := s.closeRows(s.with.death.Add(2 * limit)); rows != nil {
		t.Errorf("a close view of nothing: %q", rows)
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
		if err := pause(ctx, 10*interval); err != nil {
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
	for name, tt := range map[string]struct {
		change func(*Failover)
		want   string // in the error; empty for none
	}{
		"all is well":             {func(*Failover) {}, ""},
		"silent client is lost":   {func(f *Failover) { f.With.Clients[2] = Outage{"silent", false, 40_000} }, "client that is silent was not back at h's first call"},
		"answers the second call": {func(f *Failover) { f.With.Clients[1].OutageMS = 5_200 }, "client that is idle was not back"},
		"no sooner":               {func(f *Failover) { f.Without.Clients[0].OutageMS = 90 }, "client that sends was back no sooner"},
		"h knew two":              {func(f *Failover) { f.With.Known = 2 }, "knew 2 of 3 clients"},
		"two answered":            {func(f *Failover) { f.Answered = 2 }, "says that 2 answered"},
	} {
		s := recorded(&Screen{w: io.Discard, width: width}, 2*limit)
		tt.change(s.sum.Failover)
		err := s.verdict()
		if (err == nil) != (tt.want == "") || err != nil && (!strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
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
	s := recorded(NewScreen(io.Discard), 2*limit)
	s.sum.Kernel = "6.12.117+deb12-cloud-amd64"
	s.sum.Detector.Reason = strings.Repeat("reason ", 40)
	s.sum.Roams = []Roam{{
		What: "address", Old: netip.MustParseAddrPort("[2001:db8::1f]:10012"), New: netip.MustParseAddrPort("[2001:db8::2f]:10012"),
		Cause: "initiation", Arrived: true, LatencyUS: 123_456,
	}}
	s.sum.Latency = s.latency()
	for i := range kinds {
		s.sum.Failover.With.Clients[i].OutageMS, s.sum.Failover.Without.Clients[i].OutageMS = 4_999, 39_999
	}
	var lines []string
	for _, rung := range []string{control.RungFentry, control.RungPort, control.RungPolling} {
		for _, wireguard := range []string{"kernel", "wireguard-go"} {
			s.hooked, s.sum.Detector.Rung, s.sum.WireGuard = rung == control.RungFentry, rung, wireguard
			lines = append(lines, s.screen.wrap(s.describe())...)
			lines = append(lines, s.roamsResult()...)
			lines = append(lines, s.summaryRows()...)
		}
	}
	lines = append(lines, title, roamsTitle, failoverTitle, s.roamsHeader(), s.roamRow(s.sum.Roams[0]), s.traffic())
	lines = append(lines, s.screen.wrap(failoverText)...)
	lines = append(lines, s.failoverRows(s.with.death.Add(limit))...)
	lines = append(lines, s.failoverRows(s.with.death.Add(2*limit))...)
	lines = append(lines, s.closeRows(s.with.death.Add(2*limit))...)
	for _, l := range lines {
		if len(l) > width {
			t.Errorf("%d characters: %s", len(l), l)
		}
	}
	if len(lines) < 80 {
		t.Errorf("only %d lines", len(lines))
	}
}

func TestWrap(t *testing.T) {
	long := strings.Repeat("x", 100)
	text := strings.Repeat("word ", 16) + long + " end"
	want := []string{strings.TrimSpace(strings.Repeat("word ", 16)), long, "end"}
	if diff := cmp.Diff(want, NewScreen(io.Discard).wrap(text)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
