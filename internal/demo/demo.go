// SPDX-License-Identifier: MIT

// Package demo shows wgroam at work on one machine: real daemons on two
// gateways in network namespaces, a client that roams between them through real
// WireGuard, and the death of the active gateway beside the same death without
// wgroam, as three kinds of client see it.
package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

const (
	// poll is how often the daemons read their device where they have nothing better.
	// Packets come every 5 ms: a multiple of that would make every roam wait for the
	// same time.
	poll = 19 * time.Millisecond
	// pace lets people see one roam before the next begins.
	pace = 700 * time.Millisecond
	// patience is for what takes milliseconds, on machines that are very slow.
	patience = 20 * time.Second
)

// SummarySchema is the version of Summary. Fields may be added under the same
// number.
const SummarySchema = 1

// Summary is the outcome of a demo.
type Summary struct {
	Schema    int              `json:"schema"`
	OK        bool             `json:"ok"`        // every roam arrived, and the failover with wgroam worked
	Error     string           `json:"error"`     // why not OK; empty when OK
	Kernel    string           `json:"kernel"`    // release, as uname -r prints it
	WireGuard string           `json:"wireguard"` // kernel, wireguard-go
	Detector  control.Detector `json:"detector"`  // the active gateway's
	Roams     []Roam           `json:"roams"`
	Latency   *Latency         `json:"latency,omitempty"`  // of the roams that arrived; absent when none
	Failover  *Failover        `json:"failover,omitempty"` // absent when it did not come to its end
}

// Roam is one change of the client's endpoint.
type Roam struct {
	What      string         `json:"what"` // port, address, family
	Old       netip.AddrPort `json:"old"`
	New       netip.AddrPort `json:"new"`
	Cause     string         `json:"cause"`      // what the active's daemon saw: data, response, initiation; empty when nothing
	Arrived   bool           `json:"arrived"`    // at the standby's device
	LatencyUS int64          `json:"latency_us"` // see Latency.Method; 0 unless Arrived
}

// Latency is the time from the active's device to the standby's, in microseconds.
type Latency struct {
	Method   string `json:"method"`
	MinUS    int64  `json:"min_us"`
	MedianUS int64  `json:"median_us"`
	MaxUS    int64  `json:"max_us"`
}

// Failover is the death of the active gateway, with wgroam and without.
type Failover struct {
	Method   string  `json:"method"`
	LimitMS  int64   `json:"limit_ms"` // how long the traffic was waited for
	With     Outcome `json:"with"`
	Without  Outcome `json:"without"`
	Answered int     `json:"answered"` // clients that h's daemon says have answered it
}

// Outcome is what the death did to the clients of one lab.
type Outcome struct {
	NoticeMS float64  `json:"notice_ms"` // from the death until h was told to take over
	Known    int      `json:"known"`     // clients whose endpoint h's device had at the death
	Clients  []Outage `json:"clients"`
}

// Outage is how long a client had no traffic.
type Outage struct {
	Client   string  `json:"client"`    // sends, idle, silent
	Back     bool    `json:"back"`      // the traffic came back
	OutageMS float64 `json:"outage_ms"` // until then, since h was told; else LimitMS, or longer
}

var errInterrupted = errors.New("interrupted")

// Run runs the demo, which takes about a minute, and shows it on the
// screen. It needs the privileges of root. The error tells why the Summary is
// not OK; when ctx ends first, that is all it tells.
//
// Run starts /proc/self/exe, which must be wgroam, as the daemons.
func Run(ctx context.Context, screen *Screen) (Summary, error) {
	sum := Summary{Schema: SummarySchema, WireGuard: "wireguard-go", Roams: []Roam{}}
	if lab.KernelWireGuard() {
		sum.WireGuard = "kernel"
	}
	var err error
	if sum.Kernel, err = kernelRelease(); err == nil {
		err = run(ctx, screen, &sum)
	}
	if ctx.Err() != nil {
		err = errInterrupted
	}
	if sum.OK = err == nil; !sum.OK {
		sum.Error = err.Error()
	}
	return sum, err
}

func kernelRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("ask for the kernel's version: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

func run(ctx context.Context, screen *Screen, sum *Summary) (err error) {
	dir, err := os.MkdirTemp("/run", "wgroam-demo-")
	if err != nil {
		return fmt.Errorf("make a directory for the daemons: %w", err)
	}
	sctx, cancel := context.WithCancelCause(ctx)
	s := &show{screen: screen, sum: sum, dir: dir, fail: cancel, back: make(map[*flow]bool)}
	err = s.run(sctx)
	if cause := context.Cause(sctx); cause != nil {
		err = cause // rather than what it led to
	}
	cancel(nil)
	err = errors.Join(err, s.close())
	if err != nil && ctx.Err() == nil {
		err = s.keepLogs(err)
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// show is a running demo.
type show struct {
	screen *Screen
	sum    *Summary
	dir    string
	fail   context.CancelCauseFunc // ends the demo

	with, without *side
	a, h          *daemon        // of with
	hooked        bool           // the daemons see endpoints in the kernel
	back          map[*flow]bool // after the death
	wg            sync.WaitGroup
}

// side is a lab with two gateways and a client of each kind.
type side struct {
	lab   *lab.Lab
	flows []*flow // of the clients, in their order
	known int     // clients whose endpoint h had at the death

	death, cut time.Time // the link of a goes down between the two
	told       time.Time // when h was told to take over; zero before
}

func (s *side) active() *lab.Gateway  { return s.lab.Gateways[0] }
func (s *side) standby() *lab.Gateway { return s.lab.Gateways[1] }

func (s *show) run(ctx context.Context) error {
	s.screen.print(s.screen.paint(bold, title))
	s.screen.draw("Making the networks and starting the daemons ...")
	if err := s.setUp(ctx); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	s.screen.print(s.screen.wrap(s.describe())...)
	if err := s.roams(ctx); err != nil {
		return err
	}
	if err := s.failover(ctx); err != nil {
		return err
	}
	s.screen.print(s.summaryRows()...)
	return s.verdict()
}

func (s *show) setUp(ctx context.Context) error {
	var err error
	if s.with, err = newSide(ctx); err != nil {
		return err
	}
	if s.without, err = newSide(ctx); err != nil {
		return err
	}
	// The daemon does that to the other one.
	if err := s.without.standby().LinkDown(); err != nil {
		return err
	}
	if s.a, err = s.startDaemon(s.with.active(), s.with.standby()); err != nil {
		return err
	}
	if s.h, err = s.startDaemon(s.with.standby(), s.with.active()); err != nil {
		return err
	}
	for _, d := range []*daemon{s.a, s.h} {
		if err := d.ready(ctx); err != nil {
			return err
		}
		if err := s.follow(ctx, d); err != nil {
			return err
		}
	}
	s.sum.Detector = s.a.detector
	s.hooked = s.a.hooked() && s.h.hooked()
	for _, side := range s.sides() {
		for i, k := range kinds {
			start := s.calling
			if k.sends {
				start = s.sending
			}
			f, err := start(ctx, side, side.lab.Clients[i])
			if err != nil {
				return err
			}
			side.flows = append(side.flows, f)
		}
	}
	return s.synced(ctx)
}

// newSide makes a lab whose clients have a session with a.
func newSide(ctx context.Context) (*side, error) {
	l, err := lab.New(ctx, lab.Config{Clients: len(kinds)})
	if err != nil {
		return nil, err
	}
	s := &side{lab: l}
	for i, k := range kinds {
		err = errors.Join(err, l.Clients[i].KeepAlive(k.keepalive))
	}
	if err == nil {
		err = s.roamAll(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return s, nil
}

// roamAll moves the clients to new addresses and lets a see it.
func (s *side) roamAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, c := range s.lab.Clients {
		if _, err := c.RoamAddress(); err != nil {
			return err
		}
		if _, err := c.Ping(ctx); err != nil {
			return err
		}
	}
	return nil
}

// synced waits until the standby's device has what the active's has.
func (s *show) synced(ctx context.Context) error {
	return eventually(ctx, "the standby has the endpoints of the active", func() (bool, error) {
		for _, c := range s.with.lab.Clients {
			a, err := s.with.active().Endpoint(c.Key())
			if err != nil {
				return false, err
			}
			h, err := s.with.standby().Endpoint(c.Key())
			if err != nil || h != a || h != c.Endpoint() {
				return false, err
			}
		}
		return true, nil
	})
}

// eventually waits for a condition that nothing announces.
func eventually(ctx context.Context, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		done, err := ok()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waited for this: %s: %w", what, ctx.Err()), err)
		case <-tick.C:
		}
	}
}

// pause waits as the eyes of the audience need it, or until ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// close ends everything. The context of the flows has ended.
func (s *show) close() error {
	s.screen.draw()
	var errs []error
	for _, d := range []*daemon{s.a, s.h} {
		if d != nil {
			errs = append(errs, d.stop())
		}
	}
	s.wg.Wait()
	for _, side := range s.sides() {
		if side != nil {
			errs = append(errs, side.lab.Close())
		}
	}
	return errors.Join(errs...)
}

// roams is the first act.
func (s *show) roams(ctx context.Context) error {
	client := s.with.lab.Clients[0] // the one that sends
	rows := []string{s.roamsHeader()}
	s.screen.print("", s.screen.paint(bold, roamsTitle))
	if !s.screen.live {
		s.screen.print(rows...)
	}
	for _, step := range []struct {
		what string
		roam func() (netip.AddrPort, error)
	}{
		{"port", client.RoamPort},
		{"address", client.RoamAddress},
		{"family", client.RoamFamily},
		{"port", client.RoamPort},
		{"address", client.RoamAddress},
		{"family", client.RoamFamily},
		{"port", client.RoamPort},
		{"address", client.RoamAddress},
	} {
		end := time.Now().Add(pace)
		r, err := s.roam(ctx, step.what, step.roam)
		if err != nil {
			return fmt.Errorf("roam by %s: %w", step.what, err)
		}
		s.sum.Roams = append(s.sum.Roams, r)
		rows = append(rows, s.roamRow(r))
		if !s.screen.live {
			s.screen.print(rows[len(rows)-1])
		}
		for more := true; more; more = time.Now().Before(end) {
			s.screen.draw(append(slices.Clone(rows), "", s.traffic())...)
			if err := pause(ctx, min(frame, time.Until(end))); err != nil {
				return err
			}
		}
	}
	if s.screen.live && (s.screen.tall || s.arrived() < len(s.sum.Roams)) {
		s.screen.print(rows...)
	}
	s.sum.Latency = s.latency()
	s.screen.print(s.roamsResult()...)
	if s.arrived() < len(s.sum.Roams) {
		return fmt.Errorf("%d of %d roams did not arrive at the standby", len(s.sum.Roams)-s.arrived(), len(s.sum.Roams))
	}
	return nil
}

// roam moves the client once and follows the news to the standby's device.
func (s *show) roam(ctx context.Context, what string, move func() (netip.AddrPort, error)) (Roam, error) {
	client := s.with.lab.Clients[0]
	r := Roam{What: what, Old: client.Endpoint()}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()

	onA, onH := s.a.seen, s.h.seen
	fromA, fromH := onA.len(), onH.len()
	deviceA, deviceH := onA, onH
	if !s.hooked {
		// The daemons do not know when it happened: look at the devices.
		reading, stop := context.WithCancel(limited)
		deviceA, deviceH, fromH = new(sightings), new(sightings), 0
		var g errgroup.Group
		g.Go(func() error {
			return readDevices(reading, s.with.active(), s.with.standby(), client.Key(), r.Old, deviceA, deviceH)
		})
		defer func() { _ = g.Wait() }() // what they miss has not arrived
		defer stop()
	}
	err := s.with.flows[0].between(ctx, func() (err error) {
		r.New, err = move()
		return err
	})
	if err != nil {
		return r, err
	}
	is := func(e control.Event) bool { return e.Peer == client.Key() && e.New == r.New }
	at, err := onA.wait(limited, fromA, is)
	if err == nil {
		r.Cause = at.Cause
		if !s.hooked {
			at, err = deviceA.wait(limited, 0, is)
		}
	}
	var has control.Event
	if err == nil {
		has, err = deviceH.wait(limited, fromH, is)
	}
	if ctx.Err() != nil {
		return r, ctx.Err()
	}
	if r.Arrived = err == nil; r.Arrived {
		r.LatencyUS = has.Time.Sub(at.Time).Microseconds()
	}
	return r, nil
}

func (s *show) arrived() int {
	n := 0
	for _, r := range s.sum.Roams {
		if r.Arrived {
			n++
		}
	}
	return n
}

func (s *show) latency() *Latency {
	var us []int64
	for _, r := range s.sum.Roams {
		if r.Arrived {
			us = append(us, r.LatencyUS)
		}
	}
	if len(us) == 0 {
		return nil
	}
	slices.Sort(us)
	n := len(us)
	return &Latency{
		Method: s.latencyMethod(),
		MinUS:  us[0], MedianUS: (us[(n-1)/2] + us[n/2]) / 2, MaxUS: us[n-1],
	}
}

// keepLogs saves the daemons' logs, shows their ends, and adds to err where they are.
func (s *show) keepLogs(err error) error {
	var logs []string
	for _, d := range []*daemon{s.a, s.h} {
		if d != nil {
			logs = append(logs, d.log)
		}
	}
	if logs == nil {
		return err
	}
	// Elsewhere than the daemons' directory, which goes.
	dir, mkErr := os.MkdirTemp("", "wgroam-demo-logs-")
	if mkErr != nil {
		return errors.Join(err, mkErr)
	}
	for _, name := range logs {
		text, readErr := os.ReadFile(name)
		if readErr == nil {
			readErr = os.WriteFile(filepath.Join(dir, filepath.Base(name)), text, 0o600)
		}
		if readErr != nil {
			return errors.Join(err, readErr)
		}
		s.screen.print(logRows(filepath.Base(name), string(text))...)
	}
	return fmt.Errorf("%w; the daemons' logs are in %s", err, dir)
}
