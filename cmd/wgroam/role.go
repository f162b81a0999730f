// SPDX-License-Identifier: MIT

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/wg"
)

// newDevice returns a device of the configuration, without a session.
func newDevice(d *daemon, dc config.Device) *device {
	dev := &device{cfg: dc, d: d, log: placeLog(d.log, dc.Netns).With("device", dc.Name)}
	memory, err := failover.OpenMemory(d.cfg.StateDir, where(dc.Name, dc.Netns))
	if err != nil {
		dev.log.Error("what the verb role and keepalived said last is not known", "err", err)
	}
	dev.mem = memory
	fixed := failover.Role(dc.Role)
	if dc.Role == config.RoleAuto {
		fixed = ""
	}
	dev.desk = failover.NewDesk(failover.DeskConfig{
		Fixed: fixed, VIP: dev.watchesVIP(), VRRP: dev.hearsVRRP(), Memory: memory, Others: dev.actives, Log: dev.log,
	})
	return dev
}

// watchesVIP tells whether the virtual IP is a source of the role.
func (d *device) watchesVIP() bool { return d.cfg.Role == config.RoleAuto && len(d.cfg.VIP) > 0 }

// hearsVRRP tells whether keepalived is a source of the role.
func (d *device) hearsVRRP() bool { return d.cfg.Role == config.RoleAuto && d.cfg.VRRP != "" }

// live returns the session; nil while there is none.
func (d *device) live() *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.current
}

// actives returns the names of the other nodes that are active.
func (d *device) actives() []string {
	s := d.live()
	if s == nil {
		return nil
	}
	var out []string
	for _, n := range s.nodes() {
		if n.Role == feed.RoleActive && n.State != applier.NodeStale {
			out = append(out, cmp.Or(n.Name, n.ID.String()))
		}
	}
	return out
}

// errKeep: what is wrong is wrong with keep alone.
var errKeep = errors.New("the role is not carried out")

// keep makes the device what the role asks for while the link lasts, whatever
// becomes of the session: a standby must not speak for want of a feed, and an
// active must.
func (d *device) keep(ctx context.Context, space *wg.Space, link wg.Link) error {
	client, err := space.Open()
	if err != nil {
		return fmt.Errorf("%w: %w", errKeep, err)
	}
	defer client.Close()
	keeper := d.newKeeper(space, link, client)
	d.found = true // for the next one
	d.setKeeper(keeper)
	defer d.setKeeper(nil)
	keeper.Run(ctx)
	return nil
}

// unkept says why there is no keeper, unless there is no session for that, too.
func (d *device) unkept(err error) {
	d.found = true
	if errors.Is(err, errKeep) {
		d.log.Error("the device is left as it is; trying again", "err", err)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.left = err
	}
}

func (d *device) setKeeper(k *failover.Keeper) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.keeper, d.left = k, nil
}

// aheadEvery is how often the ports of a standby without a device are looked at.
const aheadEvery = 100 * time.Millisecond

// shutAhead keeps the ports shut that a standby's device had, while it has none.
func (d *device) shutAhead(ctx context.Context) error {
	absent := func(error) {} // follow says so
	return inSpace(ctx, d.cfg.Netns, absent, func(inside context.Context, space *wg.Space) error {
		tick := time.NewTicker(aheadEvery)
		defer tick.Stop()
		last := "" // the last complaint
		for {
			if err := d.shutUnkept(space); err != nil && err.Error() != last {
				last = err.Error()
				d.log.Error("the ports of a device that is not there are not shut; trying again", "err", err)
			}
			select {
			case <-inside.Done():
				return nil
			case <-tick.C:
			}
		}
	})
}

func (d *device) shutUnkept(space *wg.Space) error {
	if role, _, _ := d.desk.Role(); role != failover.Standby {
		return nil
	}
	// No keeper begins meanwhile.
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.keeper != nil {
		return nil
	}
	return failover.ShutAhead(space, d.cfg.Name, d.mem)
}

// completed passes on that a peer has a new session.
func (d *device) completed(peer wgroam.Key) {
	d.mu.Lock()
	keeper := d.keeper
	d.mu.Unlock()
	if keeper != nil {
		keeper.Answered(peer)
	}
}

// newKeeper returns the keeper of a link.
func (d *device) newKeeper(space *wg.Space, link wg.Link, client *wg.Client) *failover.Keeper {
	return failover.NewKeeper(failover.KeeperConfig{
		Device: client, Name: link.Name, Ifindex: link.Ifindex, Space: space,
		Desk: d.desk, Memory: d.mem, Silent: d.cfg.Standby == config.StandbySilent, VIP: d.cfg.VIP, Fresh: d.found,
		Settled: d.settled,
		Told: func() bool {
			s := d.live()
			return s != nil && s.tracker.Status().Rung.Completes()
		},
		Seen: func(k wgroam.Key) time.Time {
			if s := d.live(); s != nil {
				if r, ok := s.table.Get(k); ok {
					return r.Version.HLC.Time()
				}
			}
			return time.Time{}
		},
		Behind: d.behind,
		Progress: func(p failover.Promotion) {
			d.d.events.Progress(control.Progress{Time: time.Now().UTC(), Device: d.cfg.Name, Netns: d.cfg.Netns, Promotion: promotion(p)})
		},
		Log: d.log,
	})
}

// behind returns by how much this host's clock is behind the group's; zero where that
// is the way of a heartbeat.
func (d *device) behind() time.Duration {
	if s := d.live(); s != nil {
		if behind := s.behind(); behind > skewWarn*time.Millisecond {
			return behind
		}
	}
	return 0
}

// settled reports whether the device holds every endpoint that is known. What the
// snapshot knows comes with the session.
func (d *device) settled() bool {
	s := d.live()
	return s != nil && s.applier.Settled()
}

// feedRole is the role as the others hear of it.
func (d *device) feedRole() feed.Role {
	switch role, _, _ := d.desk.Role(); role {
	case failover.Active:
		return feed.RoleActive
	case failover.Standby:
		return feed.RoleStandby
	case failover.Always:
		return feed.RoleAlways
	}
	return feed.RoleUnknown
}

// watchVIP tells the desk where the virtual IP is, until ctx ends.
func (d *device) watchVIP(ctx context.Context) error {
	return inSpace(ctx, d.cfg.Netns, func(err error) {
		d.log.Warn("cannot see the virtual IP; trying again", "err", err)
	}, func(inside context.Context, space *wg.Space) error {
		err := again(inside, d.log, "cannot see the virtual IP; trying again", func() error {
			return space.Do(func() error {
				return failover.WatchVIP(inside, d.cfg.VIP, func(here bool) {
					role := failover.Standby
					if here {
						role = failover.Active
					}
					// Only words that are kept can fail.
					_ = d.desk.Say(failover.ByVIP, role)
				})
			})
		})
		if ctx.Err() == nil {
			// Where an address was in a namespace that is gone says nothing.
			_ = d.desk.Say(failover.ByVIP, "")
		}
		return err
	})
}

// trackedWithin is how long it may take until keepalived's script asks again.
const trackedWithin = 5 * time.Second

// elect is the status for keepalived's script, by which keepalived learns that this daemon
// is alive, and this daemon that keepalived is.
func (d *daemon) elect(name string) control.Status {
	for _, dev := range d.devices {
		if name == "" || name == where(dev.cfg.Name, dev.cfg.Netns) {
			dev.elected.Store(time.Now().UnixNano())
		}
	}
	return d.status()
}

// tracked reports whether keepalived's script asks; also while it has not had the time to.
func (d *device) tracked(now time.Time) bool {
	last := time.Unix(0, d.elected.Load())
	return now.Sub(last) < trackedWithin || now.Sub(d.d.started) < trackedWithin
}

// vrrp passes on what keepalived says.
func (d *daemon) vrrp(n failover.Notice) {
	for _, dev := range d.devices {
		if !dev.hearsVRRP() || dev.cfg.VRRP != n.Name {
			continue
		}
		if err := dev.desk.Say(failover.ByVRRP, n.Role); err != nil {
			dev.log.Error("keepalived's word is not kept", "err", err)
		}
	}
}

// roleOf returns the role of a word of the verb; empty for auto.
func roleOf(word string) (failover.Role, error) {
	switch role := failover.Role(word); role {
	case failover.Active, failover.Standby:
		return role, nil
	case "auto":
		return "", nil
	}
	return "", fmt.Errorf("%q is not a role to set: want active, standby, or auto to take the verb's word back", word)
}

// setRole gives the verb's word to a device, named as in the status, or to all
// whose role is not fixed.
func (d *daemon) setRole(name, word string) error {
	role, err := roleOf(word)
	if err != nil {
		return err
	}
	var errs []error
	found := false
	for _, dev := range d.devices {
		switch {
		case name == "" && dev.cfg.Role != config.RoleAuto:
			continue
		case name != "" && name != where(dev.cfg.Name, dev.cfg.Netns):
			continue
		}
		found = true
		if err := dev.setRole(role); err != nil {
			errs = append(errs, fmt.Errorf("device %s: %w", where(dev.cfg.Name, dev.cfg.Netns), err))
		}
	}
	switch {
	case !found && name == "":
		return fmt.Errorf("%w: set role = \"auto\" for the devices that the verb is to decide on", failover.ErrFixed)
	case !found:
		return noDevice(name)
	}
	return errors.Join(errs...)
}

// setRole gives the verb's word. It ends a handover that is waiting, and does not come
// between the steps of one that is not.
func (d *device) setRole(role failover.Role) error {
	d.handing.end()
	if err := d.handing.begin(context.Background()); err != nil {
		return err
	}
	defer d.handing.giving.Unlock()
	// Nor does one whose end is not known count any more.
	if role == "" {
		d.yield("")
	}
	return errors.Join(d.mem.Offer(""), d.desk.Say(failover.ByVerb, role))
}

// keeperStatus adds what the keeper makes of the device.
func (d *device) keeperStatus(out *control.Failover) {
	out.Yields = d.yields()
	k := d.keeping()
	out.State = k.State
	if k.Err != nil {
		out.Error = k.Err.Error()
	}
	if p := promotion(k.Last); !p.Began.IsZero() {
		out.Promotion = &p
	}
}

func promotion(p failover.Promotion) control.Promotion {
	return control.Promotion{
		Began: p.Began.UTC(), Ended: p.Ended.UTC(), Peers: p.Peers, Called: p.Called, Answered: p.Answered, Silent: p.Silent, Unknown: p.Unknown,
		P50MS: p.P50.Milliseconds(), P99MS: p.P99.Milliseconds(),
	}
}

// roleUnknown is the role in the status while there is none.
const roleUnknown = "unknown"

// roleStatus adds the role to the status.
func (d *device) roleStatus(out *control.DeviceStatus) {
	role, by, since := d.desk.Role()
	out.Role, out.RoleBy, out.RoleSince = string(role), string(by), since
	if role == "" {
		out.Role = roleUnknown
	}
	for _, a := range d.desk.Alarms() {
		out.Alarms = append(out.Alarms, control.RoleAlarm{
			Alarm: string(a.Alarm), Detail: a.Detail, Do: a.Alarm.Advice(), Since: a.Since,
		})
	}
	if !d.hearsVRRP() {
		return
	}
	names, err := d.d.fifo.Heard()
	out.Keepalived = &control.Keepalived{
		FIFO: d.d.fifo.Path, Name: d.cfg.VRRP, Says: string(d.desk.Said(failover.ByVRRP)), Heard: slices.Contains(names, d.cfg.VRRP),
		Others: slices.DeleteFunc(names, func(n string) bool { return n == d.cfg.VRRP }),
		Tracks: d.tracked(time.Now()),
	}
	if err != nil {
		out.Keepalived.Error = err.Error()
	}
}

func roleVerb(ctx context.Context, e env, args []string) error {
	fs, parse := flags(e, "role")
	asJSON := fs.Bool("json", false, "print the status as JSON")
	socket := fs.String("socket", defaultSocket, "control socket of the daemon")
	device := fs.String("device", "", "one device, as status names it, instead of all")
	word := ""
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		word, args = args[0], args[1:]
	}
	if err := parse(args); err != nil {
		return err
	}
	if _, err := roleOf(word); err != nil && word != "" {
		fmt.Fprintf(e.stderr, "wgroam role: %v\n", err)
		return errUsage
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var raw json.RawMessage
	var err error
	if word == "" {
		err = control.Get(ctx, *socket, control.VerbStatus, &raw)
	} else {
		err = control.SetRole(ctx, *socket, *device, word, &raw)
	}
	if err != nil {
		return err
	}
	var status control.Status
	if err := json.Unmarshal(raw, &status); err != nil {
		return fmt.Errorf("answer of the daemon: %w", err)
	}
	if *device != "" && !slices.ContainsFunc(status.Devices, func(d control.DeviceStatus) bool { return where(d.Name, d.Netns) == *device }) {
		return noDevice(*device)
	}
	if *asJSON {
		_, err := fmt.Fprintf(e.stdout, "%s\n", raw)
		return err
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	for _, d := range status.Devices {
		if name := where(d.Name, d.Netns); *device == "" || *device == name {
			fmt.Fprintf(w, "%s\t%s\n", name, roleLine(d))
			for _, a := range d.Alarms {
				fmt.Fprintf(w, "\t%s: %s\n\t  %s\n", a.Alarm, a.Detail, a.Do)
			}
		}
	}
	return w.Flush()
}

// noDevice says that a name is of no device of the daemon.
func noDevice(name string) error {
	return fmt.Errorf("this daemon has no device %s: wgroam status names those that it has", name)
}

// roleLine is a device's role for people.
func roleLine(d control.DeviceStatus) string {
	return fmt.Sprintf("%s by %s, for %s", d.Role, d.RoleBy, time.Since(d.RoleSince).Round(time.Second))
}
