// SPDX-License-Identifier: MIT

package main

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
)

func TestEventPrinter(t *testing.T) {
	event := control.NewEvent("wg0", wgroam.Observation{
		New: netip.MustParseAddrPort("[2001:db8::1]:51820"), Cause: wgroam.CauseData,
		At: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC),
	}, time.Date(2026, 1, 2, 3, 4, 5, 1_506_000, time.UTC))

	var out bytes.Buffer
	p := newEventPrinter(&out, true)
	p.queue <- event
	if err := p.close(); err != nil {
		t.Error(err)
	}
	want := `{"time":"2026-01-02T03:04:05.000006Z","device":"wg0","peer":"` + strings.Repeat("A", 43) + `=",` +
		`"old":"","new":"[2001:db8::1]:51820","cause":"data","latency_us":1500}` + "\n"
	if out.String() != want {
		t.Errorf("got  %swant %s", &out, want)
	}

	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for want, line := range map[string]any{
		"  none -> [2001:db8::1]:51820  data  1.5 ms\n": event,
		"  wg0@blue  promotion going on: 3 of 9 peers answered (p50 0 ms, p99 0 ms), 4 called, 0 silent, 0 nobody knows where\n": control.Progress{
			Time: began, Device: "wg0", Netns: "blue", Promotion: control.Promotion{Began: began, Peers: 9, Called: 4, Answered: 3},
		},
	} {
		out.Reset()
		p = newEventPrinter(&out, false)
		p.queue <- line
		if err := p.close(); err != nil {
			t.Error(err)
		}
		if !strings.HasSuffix(out.String(), want) {
			t.Errorf("got %q, want the end %q", &out, want)
		}
	}
}

// TestChoose: a name means the device here, before one of that name elsewhere.
func TestChoose(t *testing.T) {
	const here, blue, red = 1, 2, 3
	own := control.DeviceStatus{Name: "wg0", NetnsInode: here}
	inBlue := control.DeviceStatus{Name: "wg0", Netns: "blue", NetnsInode: blue}
	inRed := control.DeviceStatus{Name: "wg0", Netns: "red", NetnsInode: red}
	missing := control.DeviceStatus{Name: "wg0"}
	other := control.DeviceStatus{Name: "wg1", NetnsInode: here}
	for name, c := range map[string]struct {
		devices []control.DeviceStatus
		exists  bool
		want    string // wg0 in these namespaces; "alone" without the daemon
	}{
		"followed here":               {[]control.DeviceStatus{inBlue, own}, true, "."},
		"here has a name":             {[]control.DeviceStatus{{Name: "wg0", Netns: "green", NetnsInode: here}, missing}, true, "green"},
		"here, and not followed":      {[]control.DeviceStatus{inBlue, other}, true, "alone"},
		"elsewhere":                   {[]control.DeviceStatus{inBlue, other}, false, ". blue green red"},
		"in two places elsewhere":     {[]control.DeviceStatus{inBlue, inRed}, false, ". blue green red"},
		"waited for":                  {[]control.DeviceStatus{missing}, false, ". blue green red"},
		"here, and not followed yet":  {[]control.DeviceStatus{missing}, true, "alone"},
		"not followed, and not there": {[]control.DeviceStatus{other}, false, "alone"},
	} {
		t.Run(name, func(t *testing.T) {
			got := "alone"
			if meant := choose(c.devices, "wg0", here, func() bool { return c.exists }); meant != nil {
				var where []string
				for _, netns := range []string{"", "blue", "green", "red"} {
					if meant("wg0", netns) {
						where = append(where, cmp.Or(netns, "."))
					}
					if meant("wg1", netns) {
						t.Errorf("wg1 in %q is meant", netns)
					}
				}
				got = strings.Join(where, " ")
			}
			if got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

// A reader that is stuck, or gone, does not keep watch from ending.
func TestEventPrinterReader(t *testing.T) {
	r, w := io.Pipe()
	p := newEventPrinter(w, true)
	p.queue <- control.Event{}
	closed := make(chan error, 1)
	go func() { closed <- p.close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * lastWords):
		t.Error("waits for a reader that does not read")
	}
	r.Close() // frees the printer
	<-p.done

	r, w = io.Pipe()
	r.Close()
	p = newEventPrinter(w, true)
	p.queue <- control.Event{}
	<-p.done
	if err := p.close(); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("reader gone: %v", err)
	}
}
