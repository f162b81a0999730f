// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// ErrFixed is what Say wraps when the configuration fixes the role.
var ErrFixed = errors.New("the role is fixed")

// DeskConfig describes a Desk.
type DeskConfig struct {
	// Fixed is the role that the configuration fixes; empty if the sources decide.
	Fixed Role
	// VIP says that ByVIP is a source, and will speak soon.
	VIP bool
	// VRRP says that ByVRRP is a source. It speaks when keepalived starts.
	VRRP bool
	// Memory keeps what the verb and keepalived said.
	Memory *Memory
	// Others returns the names of the other nodes that say they are active. It must
	// not call the Desk.
	Others func() []string
	Log    *slog.Logger
}

// Desk is where the sources of a device's role report, and where the role is to
// be had. It outlives the device's links.
//
// A Desk is safe for concurrent use.
type Desk struct {
	cfg DeskConfig

	mu      sync.Mutex
	changed chan struct{} // the role has
	words   words
	started time.Time
	old     bool      // the word of ByVRRP was said to an earlier daemon, and not since
	since   time.Time // of the role
	heard   time.Time // the last packet of peers that a standby got
	dropped int64     // of them, those that the gate has dropped
	first   time.Time // the first of those
	watches map[Alarm]*watch
}

// NewDesk returns a Desk that knows what the memory does.
func NewDesk(cfg DeskConfig) *Desk {
	now := time.Now()
	d := &Desk{cfg: cfg, started: now, since: now, changed: make(chan struct{}, 1), watches: make(map[Alarm]*watch)}
	for _, a := range Alarms {
		d.watches[a] = &watch{}
	}
	d.words.Config = cfg.Fixed
	d.words.wait = cfg.VIP || cfg.VRRP
	if cfg.Fixed == "" {
		d.words.Verb, d.words.VRRP = cfg.Memory.words()
		if !cfg.VRRP {
			d.words.VRRP = "" // it could never be taken back
		}
		d.old = d.words.VRRP != ""
	}
	return d
}

// Role returns the role, who gives it, and since when it is so. The role is empty
// while it is not known yet.
func (d *Desk) Role() (Role, Source, time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	role, by := d.words.decide()
	return role, by, d.since
}

// Said returns what a source said last; empty if it has said nothing.
func (d *Desk) Said(by Source) Role {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range d.words.said() {
		if s.by == by {
			return *s.role
		}
	}
	return ""
}

// Say gives a source's word; an empty role takes it back. The error wraps ErrFixed
// if the configuration fixes the role, or says that the word is in memory only. The role
// does not wait for the memory.
func (d *Desk) Say(by Source, role Role) error {
	role, changed, err := d.say(by, role)
	if err != nil || !changed || by == ByVIP { // which can be seen again
		return err
	}
	if err := d.cfg.Memory.write(); err != nil {
		return fmt.Errorf("the role is %s, but that will be forgotten when this daemon ends: %w", role, err)
	}
	return nil
}

// say returns the role that is so then, and whether the word is another.
func (d *Desk) say(by Source, role Role) (after Role, changed bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.words.Config != "" {
		return "", false, fmt.Errorf("%w: the configuration says %s: set role = \"auto\" there", ErrFixed, d.words.Config)
	}
	before, _ := d.words.decide()
	// keepalived may have moved the virtual IP while no daemon heard it. Where that agrees with
	// what it said, nothing has happened that it would speak of; once it does not, keepalived
	// speaks as well, or has not been heard since then.
	moved := d.old && by == ByVIP && role != "" && role != d.words.VRRP
	if moved {
		d.words.VRRP = ""
	}
	if moved || by == ByVRRP {
		d.old = false
	}
	for _, s := range d.words.said() {
		if s.by == by {
			if *s.role == role {
				return before, false, nil
			}
			*s.role = role
		}
	}
	d.decided(before)
	if by != ByVIP || moved {
		d.cfg.Memory.note(d.words.Verb, d.words.VRRP)
	}
	after, _ = d.words.decide()
	return after, true, nil
}

// decided tells of another role than before. d.mu is held.
func (d *Desk) decided(before Role) {
	role, by := d.words.decide()
	if role == before {
		return
	}
	d.since = time.Now()
	d.cfg.Log.Info("the role has changed", "role", role, "by", by)
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// Changed returns a channel that delivers after the role has changed, to one
// reader.
func (d *Desk) Changed() <-chan struct{} { return d.changed }

// Heard notes that a peer was authenticated by this node at that time.
func (d *Desk) Heard(at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.talk("peers talk to this node", at)
}

// talk notes what peers say to a standby. d.mu is held.
func (d *Desk) talk(detail string, at time.Time) {
	// What comes before the device is quiet is still the former active's.
	if role, _ := d.words.decide(); role == Standby && at.Sub(d.since) > settle {
		d.heard = at
		d.see(AlarmTraffic, detail, at, 0)
	}
}

// Dropped notes that so many packets have come to a standby's device that its gate has
// dropped. Nobody has authenticated them: a few may be a stranger's.
func (d *Desk) Dropped(packets int64, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if at.Sub(d.first) > trafficFor || d.first.Before(d.since.Add(settle)) {
		d.dropped, d.first = 0, at
	}
	if d.dropped += packets; d.dropped >= strangers {
		d.talk("what WireGuard sends comes to this node, and is dropped", at)
	}
}

// Alarms returns the alarms that are up.
func (d *Desk) Alarms() []Raised {
	d.mu.Lock()
	defer d.mu.Unlock()
	return raised(d.watches)
}

// vrrpWithin is how long keepalived may take for its first word. Until then the role
// is not known: as a standby, the daemon's first start would take the device from an
// active that peers rely on.
const vrrpWithin = 10 * time.Second

// lookEvery is how often the conditions of alarms are looked at.
const lookEvery = 250 * time.Millisecond

// Run looks after the alarms until ctx ends.
func (d *Desk) Run(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		d.look(time.Now(), d.cfg.Others())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look looks at the conditions of all alarms, with the nodes that say they are
// active.
func (d *Desk) look(now time.Time, actives []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if before, _ := d.words.decide(); d.words.wait && !d.cfg.VIP && now.Sub(d.started) > vrrpWithin {
		d.words.wait = false
		d.decided(before)
	}
	role, by := d.words.decide()
	detail := d.words.conflict()
	if detail != "" {
		detail = fmt.Sprintf("%s by %s, but %s", role, by, detail)
	}
	d.see(AlarmConflict, detail, now, settle)
	detail = ""
	if role == Active && len(actives) > 0 {
		detail = "also active: " + strings.Join(actives, ", ")
	}
	d.see(AlarmTwoActives, detail, now, settle)
	if role != Standby || d.heard.Before(d.since) || now.Sub(d.heard) > trafficFor {
		d.see(AlarmTraffic, "", now, 0)
	}
}

// see says once that an alarm came up or went. d.mu is held.
func (d *Desk) see(a Alarm, detail string, now time.Time, after time.Duration) {
	w := d.watches[a]
	if !w.see(detail, now, after) {
		return
	}
	if w.raised {
		d.cfg.Log.Error(advice[a], "alarm", a, "detail", detail)
	} else {
		d.cfg.Log.Info("an alarm is over", "alarm", a)
	}
}

// advice says what an alarm means.
var advice = map[Alarm]string{
	AlarmConflict:   "the sources of the role do not agree: correct the one that is wrong, or take the verb's word back with wgroam role auto",
	AlarmTwoActives: "two nodes are active and take the peers from each other: make one of them standby",
	AlarmTraffic:    "peers talk to this node, which is a standby: look where the virtual IP is, and who routes to this node",
}

// Advice says what an alarm means, and what to do about it.
func (a Alarm) Advice() string { return advice[a] }
