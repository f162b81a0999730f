// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/privilege"
	"github.com/wgroam/wgroam/internal/wg"
	"github.com/wgroam/wgroam/tracker"
)

const (
	defaultSocket = "/run/wgroam/control.sock"
	defaultPoll   = time.Second
	defaultSweep  = 5 * time.Minute
)

// watchVerb prints endpoint changes: those that the daemon sees, and its promotions, if
// there is one and it follows what is meant, or else its own, with nothing else running.
func watchVerb(ctx context.Context, e env, args []string) error {
	fs, parse := flags(e, "watch")
	device := fs.String("device", "", "only this device (default all of the daemon, or without one all of this network namespace)")
	asJSON := fs.Bool("json", false, "print one JSON object a line")
	promotions := fs.Bool("promotions", false, "with --json, also how far promotions have come, in lines of another kind; without, they are shown anyway")
	socket := fs.String("socket", defaultSocket, "control socket of the daemon")
	if err := parse(args); err != nil {
		return err
	}
	out := newEventPrinter(e.stdout, *asJSON)
	watch := watchAlone
	if meant := throughDaemon(ctx, *socket, *device); meant != nil {
		watch = watchDaemon(*socket, !*asJSON || *promotions, meant)
	}
	return errors.Join(watch(ctx, e, *device, out), out.close())
}

// throughDaemon tells which of a daemon's events are meant by --device; nil if the
// daemon has none of those. A name means the device of this network namespace,
// whether the daemon follows it or not, before those that the daemon follows in
// others. The status names a namespace as the daemon's configuration does, so
// its inode is compared.
func throughDaemon(ctx context.Context, socket, device string) (meant func(device, netns string) bool) {
	var status control.Status
	if err := control.Get(ctx, socket, control.VerbStatus, &status); err != nil {
		return nil
	}
	if device == "" {
		return func(string, string) bool { return true }
	}
	here, err := wg.Netns()
	if err != nil {
		return nil
	}
	return choose(status.Devices, device, here, func() bool { _, err := wg.LinkByName(device); return err == nil })
}

// choose is throughDaemon for the devices that the daemon follows. exists tells
// whether there is a link of that name here.
func choose(devices []control.DeviceStatus, name string, here uint32, exists func() bool) (meant func(device, netns string) bool) {
	elsewhere := false
	for _, d := range devices {
		if d.Name != name {
			continue
		}
		if d.NetnsInode == here {
			return func(device, netns string) bool { return device == name && netns == d.Netns }
		}
		elsewhere = true
	}
	if !elsewhere || exists() {
		return nil
	}
	return func(device, _ string) bool { return device == name }
}

func watchDaemon(socket string, promotions bool, meant func(device, netns string) bool) func(context.Context, env, string, *eventPrinter) error {
	return func(ctx context.Context, e env, _ string, out *eventPrinter) error {
		err := control.Watch(ctx, socket, promotions, func(line json.RawMessage) error {
			var l struct {
				control.Event
				Promotion *control.Promotion `json:"promotion"`
				Missed    *uint64            `json:"missed"`
			}
			if err := json.Unmarshal(line, &l); err != nil {
				return err
			}
			switch {
			case l.Missed == nil:
			case *l.Missed == 0: // the first line of the answer
				e.log.Info("watching through the daemon", "socket", socket)
				return nil
			default:
				e.log.Warn("lines left out because this reader was too slow", "lines", *l.Missed)
				return nil
			}
			if !meant(l.Device, l.Netns) {
				return nil
			}
			var shown any = l.Event
			if l.Promotion != nil {
				shown = control.Progress{Time: l.Time, Device: l.Device, Netns: l.Netns, Promotion: *l.Promotion}
			}
			// Waiting here makes the daemon count what this reader misses.
			select {
			case out.queue <- shown:
				return nil
			case err := <-out.failed:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
}

func watchAlone(ctx context.Context, e env, device string, out *eventPrinter) error {
	if err := privilege.Lower(); err != nil {
		return err
	}
	client, err := wg.Open()
	if err != nil {
		return err
	}
	defer client.Close()
	netns, err := wg.Netns()
	if err != nil {
		return err
	}
	var kernel tracker.Kernel
	defer kernel.Close()
	var port tracker.Port
	defer port.Close()

	fail := func(err error) {
		select {
		case out.failed <- err:
		default:
		}
	}
	session := func(ctx context.Context, _ *wg.Space, link wg.Link) error {
		t := tracker.New(tracker.Config{
			Device: link.Name, Ifindex: link.Ifindex, Netns: netns,
			Kernel: &kernel, Port: &port, WG: client, View: wgroam.NewView(),
			Poll: defaultPoll, Sweep: defaultSweep, Log: e.log.With("device", link.Name),
			Proven: func(wgroam.Observation) {},
			Changed: func(o wgroam.Observation) {
				if !isChange(o) {
					return
				}
				select {
				case out.queue <- control.NewEvent(link.Name, o, time.Now()):
				default:
					// The tracker must not wait for a reader.
					e.log.Warn("an event left out because this reader was too slow", "peer", o.Peer)
				}
			},
		})
		if err := t.Start(); err != nil {
			return err
		}
		return t.Run(ctx)
	}

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		select {
		case err := <-out.failed:
			return err
		case <-ctx.Done():
			return nil
		}
	})
	if device != "" {
		if _, err := client.Device(device); err != nil {
			return err
		}
		g.Go(func() error {
			return follow(ctx, place{name: device}, e.log.With("device", device), func(err error) {
				e.log.Warn("waiting for the device to come back", "device", device, "err", err)
			}, session)
		})
	} else {
		g.Go(func() error { return watchAll(ctx, e, client, g, session, fail) })
	}
	return g.Wait()
}

// watchAll starts to follow every device of this namespace, as they come.
func watchAll(ctx context.Context, e env, client *wg.Client, g *errgroup.Group,
	session life, fail func(error),
) error {
	followed := make(map[string]bool)
	return watchLinks(ctx, nil, e.log, func() {
		names, err := client.Names()
		if err != nil {
			fail(err)
			return
		}
		for _, name := range names {
			if followed[name] {
				continue
			}
			followed[name] = true
			g.Go(func() error {
				return follow(ctx, place{name: name}, e.log.With("device", name), func(error) {}, session)
			})
		}
		if len(followed) == 0 {
			e.log.Info("no WireGuard device here yet: waiting for one")
			followed[""] = true // said once
		}
	})
}

// eventPrinter prints the lines of watch for people or programs. It has a goroutine of its
// own, because whoever reads the output may be slow, or stuck.
type eventPrinter struct {
	queue  chan any   // a control.Event or a control.Progress each
	failed chan error // gets the error that ended the printing
	done   chan struct{}
}

// lastWords is how long close waits for a reader that has stopped reading.
const lastWords = 500 * time.Millisecond

func newEventPrinter(w io.Writer, asJSON bool) *eventPrinter {
	p := &eventPrinter{
		queue:  make(chan any, 1024),
		failed: make(chan error, 2), // of the printer, and of whoever lists devices
		done:   make(chan struct{}),
	}
	go func() {
		defer close(p.done)
		for line := range p.queue {
			if err := printLine(w, line, asJSON); err != nil {
				p.failed <- err
				return
			}
		}
	}()
	return p
}

// close prints what is left, if the reader lets it, and returns the error that
// ended the printing if nobody has taken it. Nobody may put events any more.
func (p *eventPrinter) close() error {
	close(p.queue)
	select {
	case <-p.done:
	case <-time.After(lastWords):
	}
	select {
	case err := <-p.failed:
		return err
	default:
		return nil
	}
}

func printLine(w io.Writer, line any, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(w).Encode(line)
	}
	var err error
	switch l := line.(type) {
	case control.Event:
		_, err = fmt.Fprintf(w, "%s  %s  %s  %s -> %s  %s  %.1f ms\n",
			onClock(l.Time), where(l.Device, l.Netns), l.Peer, orNone(l.Old), orNone(l.New), l.Cause, float64(l.LatencyUS)/1000)
	case control.Progress:
		_, err = fmt.Fprintf(w, "%s  %s  %s\n", onClock(l.Time), where(l.Device, l.Netns), "promotion "+promotionLine(l.Promotion))
	}
	return err
}

func onClock(t time.Time) string { return t.Local().Format("15:04:05.000") }

func orNone(ep netip.AddrPort) string {
	if !ep.IsValid() {
		return "none"
	}
	return ep.String()
}
