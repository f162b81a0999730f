// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/wg"
	"github.com/wgroam/wgroam/tracker"
)

const (
	defaultSocket = "/run/wgroam/control.sock"
	defaultPoll   = time.Second
	defaultSweep  = 5 * time.Minute
)

// watchVerb prints endpoint changes: those of the daemon if one follows the
// device, or else its own, with nothing else running.
func watchVerb(ctx context.Context, e env, args []string) error {
	fs, parse := flags(e, "watch")
	device := fs.String("device", "", "only this device (default all of this network namespace)")
	asJSON := fs.Bool("json", false, "print one JSON object a line")
	socket := fs.String("socket", defaultSocket, "control socket of the daemon")
	if err := parse(args); err != nil {
		return err
	}
	out := &eventPrinter{w: e.stdout, json: *asJSON}
	if daemonFollows(ctx, *socket, *device) {
		return watchDaemon(ctx, e, *socket, *device, out)
	}
	return watchAlone(ctx, e, *device, out)
}

func daemonFollows(ctx context.Context, socket, device string) bool {
	var status control.Status
	if err := control.Get(ctx, socket, control.VerbStatus, &status); err != nil {
		return false
	}
	for _, d := range status.Devices {
		if device == "" || d.Name == device {
			return true
		}
	}
	return false
}

func watchDaemon(ctx context.Context, e env, socket, device string, out *eventPrinter) error {
	err := control.Stream(ctx, socket, control.VerbWatch, func(line json.RawMessage) error {
		var l struct {
			control.Event
			Missed *uint64 `json:"missed"`
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
			e.log.Warn("events left out because this reader was too slow", "events", *l.Missed)
			return nil
		}
		event := l.Event
		if device != "" && event.Device != device {
			return nil
		}
		return out.print(event)
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func watchAlone(ctx context.Context, e env, device string, out *eventPrinter) error {
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

	failed := make(chan error, 1)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	session := func(ctx context.Context, link wg.Link) error {
		t := tracker.New(tracker.Config{
			Device: link.Name, Ifindex: link.Ifindex, Netns: netns,
			Kernel: &kernel, WG: client, View: wgroam.NewView(),
			Poll: defaultPoll, Sweep: defaultSweep, Log: e.log,
			Proven: func(wgroam.Observation) {},
			Changed: func(o wgroam.Observation) {
				if !isChange(o) {
					return
				}
				if err := out.print(control.NewEvent(link.Name, o, time.Now())); err != nil {
					fail(err)
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
		case err := <-failed:
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
			return follow(ctx, device, e.log, func(err error) {
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
	session func(context.Context, wg.Link) error, fail func(error),
) error {
	followed := make(map[string]bool)
	return wg.WatchLinks(ctx, func() {
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
				return follow(ctx, name, e.log, func(error) {}, session)
			})
		}
		if len(followed) == 0 {
			e.log.Info("no WireGuard device here yet: waiting for one")
			followed[""] = true // said once
		}
	})
}

// eventPrinter prints events for people or programs, one at a time.
type eventPrinter struct {
	json bool

	mu sync.Mutex
	w  io.Writer
}

func (p *eventPrinter) print(e control.Event) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.json {
		return json.NewEncoder(p.w).Encode(e)
	}
	_, err := fmt.Fprintf(p.w, "%s  %s  %s  %s -> %s  %s  %.1f ms\n",
		e.Time.Local().Format("15:04:05.000"), e.Device, e.Peer, orNone(e.Old), orNone(e.New), e.Cause, float64(e.LatencyUS)/1000)
	return err
}

func orNone(ep netip.AddrPort) string {
	if !ep.IsValid() {
		return "none"
	}
	return ep.String()
}
