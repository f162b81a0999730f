// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/events"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/privilege"
	"github.com/wgroam/wgroam/tracker"
)

func runVerb(ctx context.Context, e env, args []string) error {
	cfg, err := loadConfig(e, "run", args, config.Load)
	if err != nil {
		return err
	}
	return run(ctx, cfg, e.log)
}

// loadConfig reads the configuration that the arguments of a verb say; a file by load.
func loadConfig(e env, verb string, args []string, load func(path string) (config.Config, error)) (config.Config, error) {
	fs, parse := flags(e, verb)
	file := fs.String("config", "", "configuration `file`")
	name := fs.String("device", "", "one WireGuard device with defaults, instead of a configuration")
	if err := parse(args); err != nil {
		return config.Config{}, err
	}
	if (*file == "") == (*name == "") {
		fmt.Fprintf(e.stderr, "wgroam %s: give either --config FILE or --device NAME\n", verb)
		return config.Config{}, errUsage
	}
	if *file != "" {
		return load(*file)
	}
	return config.ForDevice(*name)
}

// run is the daemon. What it wires together, once per device:
//
//	kernel --> tracker --> Table --> publisher --> feed
//	              |          |                      |
//	             View     applier <---- merger <----+
//	                         |
//	                  WireGuard device
func run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	started := time.Now()
	if err := privilege.Lower(); err != nil {
		return err
	}
	kernel := new(tracker.Kernel)
	defer kernel.Close()
	port := new(tracker.Port)
	defer port.Close()

	d := &daemon{
		cfg: cfg, log: log, started: started,
		kernel: kernel, port: port,
		events:  control.NewHub(),
		lag:     newLag(),
		groups:  make(map[string]claim),
		serving: make(chan struct{}),
	}
	d.fifo = &failover.FIFO{Path: cfg.KeepalivedFIFO, Each: d.vrrp, Log: log}
	if cfg.Events.Enabled {
		d.public = events.New(events.Config{
			Node: cfg.Node, NATS: feed.External(cfg.Events.External), Redact: cfg.Events.Redact, Log: log,
		})
	}
	if cfg.NATS.Listen != "" {
		// The other nodes' servers carry our records as well.
		if err := d.serve(ctx); err != nil {
			log.Error("cannot serve the other nodes; going on through theirs, and trying again", "err", err)
		}
		defer d.shutdown()
	}
	for _, dc := range cfg.Devices {
		d.devices = append(d.devices, newDevice(d, dc))
	}

	g, ctx := errgroup.WithContext(ctx)
	if cfg.NATS.Listen != "" {
		g.Go(func() error { d.serveLater(ctx); return nil })
	}
	if d.public != nil {
		g.Go(func() error { d.public.Run(ctx); return nil })
	}
	ctl, err := control.Listen(cfg.ControlSocket, control.Handler{Status: d.status, Elect: d.elect, Peers: d.peers, Check: d.check, Events: d.events, SetRole: d.setRole, Handover: d.handover})
	switch {
	case errors.Is(err, control.ErrInUse):
		return err
	case err != nil:
		log.Error("no control socket: status, peers and watch will not find this daemon", "err", err)
	default:
		defer ctl.Close()
		g.Go(func() error { return ctl.Serve(ctx) })
	}
	if cfg.MetricsListen != "" {
		g.Go(func() error { return d.serveMetrics(ctx, cfg.MetricsListen) })
	}
	if cfg.KeepalivedFIFO != "" {
		g.Go(func() error { d.fifo.Run(ctx); return nil })
	}
	for _, dev := range d.devices {
		g.Go(func() error { dev.desk.Run(ctx); return nil })
		if dev.watchesVIP() {
			g.Go(func() error { return dev.watchVIP(ctx) })
		}
		at := place{dev.cfg.Netns, dev.cfg.Name}
		if dev.cfg.Role != config.RoleAlways {
			g.Go(func() error { return dev.shutAhead(ctx) })
		}
		g.Go(func() error { return follow(ctx, at, dev.log, dev.unkept, dev.keep) })
		g.Go(func() error { return follow(ctx, at, dev.log, dev.absent, dev.session) })
	}
	return g.Wait()
}

// placeLog returns a log that says where a device is, if that is not here.
func placeLog(log *slog.Logger, netns string) *slog.Logger {
	if netns == "" {
		return log
	}
	return log.With("netns", netns)
}
