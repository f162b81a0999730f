// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

// Device is what a Keeper does with WireGuard: wg.Client, or something that fails
// as a kernel rarely does.
type Device interface {
	Device(name string) (wg.Device, error)
	SetKeepalives(name string, intervals []wg.Keepalive) error
}

// KeeperConfig describes a Keeper.
type KeeperConfig struct {
	Device  Device
	Name    string
	Ifindex int
	Space   *wg.Space // nil for the process's own
	Desk    *Desk
	Memory  *Memory
	// Silent keeps the link of a standby up, and only the gate shut.
	Silent bool
	// Fresh says that the link has just been made, and that who made it may still be at
	// work on it.
	Fresh bool
	// VIP are the addresses that an active sends from; nil leaves that to the routes.
	VIP []netip.Addr
	// Settled reports whether the device holds every endpoint that is known.
	Settled func() bool
	// Told reports whether Answered is called for what the peers answer.
	Told func() bool
	// Seen returns when the group last saw a peer; zero if never.
	Seen func(wgroam.Key) time.Time
	// Behind returns by how much this host's clock is behind the group's.
	Behind func() time.Duration
	// Progress is called with how far a promotion has come: when it begins, when it has
	// ended, and now and then. It must not wait.
	Progress func(Promotion)
	Log      *slog.Logger
}

// Keeper makes a device what the role asks for: one that nothing leaves and
// nothing reaches, or one that calls its peers. It is a reconciler: whatever it
// finds, after a crash or after somebody else's work, it goes on from there.
type Keeper struct {
	cfg  KeeperConfig
	gate *gate
	of   iface

	// Of Step alone.
	role   Role      // at the last step
	port   int       // at the last dump
	moved  time.Time // when it was another
	dumped time.Time // zero if not yet, or if it has become a standby since
	kernel bool      // the device is the kernel's; at the last dump
	asked  bool      // the gate itself, whether there is one
	down   bool      // the standby's link was found so
	lacks  error     // why a silent standby's link has not got all back; nil if it has
	low    bool      // the standby's link was down at the last look
	raised time.Time // when somebody set it up, or was last seen to go on
	begun  time.Time // when somebody set it up
	made   int       // addresses and routes that there were then
	known  []contact // of a standby, at the last dump
	told   time.Time // when the progress was last told
	heard  int64     // packets that the shut gate had dropped at the last step; negative if not known

	answers atomic.Pointer[wgroam.Changes] // not taken yet; nil unless peers are being called

	mu     sync.Mutex
	status Status
}

// The states of a device.
const (
	StateIdle      = "idle"      // there is no role
	StateQuiet     = "quiet"     // of a standby
	StatePromoting = "promoting" // the peers are being called
	StateOpen      = "open"      // of an active
)

// Status is what a Keeper can tell of itself.
type Status struct {
	State string
	Err   error     // why the device is not what it should be
	Last  Promotion // the last one, or the present; zero if there was none
	// Acts is the role that the device acts by: Standby once the gate is shut, Active
	// once peers have been called; empty in between.
	Acts Role
}

// NewKeeper returns a Keeper for one life of a link. Nothing is done before Step or
// Run.
func NewKeeper(cfg KeeperConfig) *Keeper {
	k := &Keeper{cfg: cfg, gate: newGate(cfg.Space, cfg.Name), of: iface{Ifindex: cfg.Ifindex}, status: Status{State: StateIdle}}
	// Where it cannot be had, the interface alone has to do.
	_ = cfg.Space.Do(func() (err error) {
		k.of.Netns, err = netnsCookie()
		return err
	})
	return k
}

// Status returns a copy of the current status.
func (k *Keeper) Status() Status {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.status
}

const (
	// keepEvery is how often link and gate are looked at, at least, whatever the
	// kernel tells.
	keepEvery = time.Second
	// dumpEvery is how often the device is read: nobody tells when somebody sets a
	// port or a keepalive. The gate holds without that.
	dumpEvery = 10 * time.Second
	// forgetPorts is how long a device has to have one port until those that it had
	// before are somebody else's.
	forgetPorts = time.Minute
	// raisedFor is how long a standby's link that somebody sets up is left alone, but for
	// the gate: wg-quick fails, and deletes the device, when the link is down again before
	// it has made its routes. It may take raisedMost, as long as some are added.
	raisedFor  = 3 * time.Second
	raisedMost = 5 * time.Minute
	// watchAgain is how long after a failure links or rules are watched again.
	watchAgain = 10 * time.Second
)

// Run keeps the device until ctx ends, and leaves it as it is then.
func (k *Keeper) Run(ctx context.Context) {
	if !k.cfg.Fresh { // or somebody may be probing
		if err := dropProbe(k.cfg.Space, k.cfg.Name); err != nil {
			k.cfg.Log.Warn("a rule for a port that a killed daemon had is still there: wgroam.probe."+k.cfg.Name+" of nftables", "err", err)
		}
	}
	news := make(chan struct{}, 1)
	wake := func() {
		select {
		case news <- struct{}{}:
		default:
		}
	}
	var watch sync.WaitGroup
	defer watch.Wait()
	watch.Go(func() {
		k.watch(ctx, "links", func() error {
			return k.cfg.Space.Do(func() error { return wg.WatchLinks(ctx, wake) })
		})
	})
	watch.Go(func() { k.watch(ctx, "nftables", func() error { return k.gate.watch(ctx, wake) }) })
	for {
		step, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() { defer close(done); k.Step(step) }()
		changed := false
		select {
		case <-done:
		case <-ctx.Done():
		case <-k.cfg.Desk.Changed():
			changed = true
		}
		cancel()
		<-done
		if changed {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-k.cfg.Desk.Changed():
		case <-news:
		case <-time.After(keepEvery):
		}
	}
}

// watch runs f, which tells of changes of what, until ctx ends. Where they cannot be
// watched, as without a file descriptor to be had, the keeper looks less often.
func (k *Keeper) watch(ctx context.Context, what string, f func() error) {
	for {
		err := f()
		if ctx.Err() != nil {
			return
		}
		k.cfg.Log.Warn("cannot watch "+what+"; trying again", "in", watchAgain, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(watchAgain):
		}
	}
}

// Step does once what the role asks for. A promotion ends early with ctx, and goes
// on with the next Step.
func (k *Keeper) Step(ctx context.Context) {
	role, _, _ := k.cfg.Desk.Role()
	if role != k.role {
		if role == Standby {
			// Fresh, it was down a moment ago.
			k.lacks = nil
			k.dumped, k.low, k.raised = time.Time{}, k.cfg.Fresh && k.role == "", time.Time{}
		}
		k.role, k.heard = role, -1
		k.acts("")
	}
	var (
		state string
		err   error
	)
	switch role {
	case Standby:
		state, err = StateQuiet, k.quiet()
	case Active:
		state, err = StateOpen, k.open(ctx, k.cfg.VIP)
	case Always:
		state, err = StateIdle, k.open(ctx, nil)
	default:
		return // not known yet
	}
	if ctx.Err() != nil {
		return
	}
	k.mu.Lock()
	before := k.status.Err
	k.status.State, k.status.Err = state, err
	k.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		k.cfg.Log.Error("the device is not what its role asks for; trying again", "role", role, "err", err)
	case err == nil && before != nil:
		k.cfg.Log.Info("the device is what its role asks for again", "role", role)
	}
	if err == nil {
		k.acts(role)
	}
}

func (k *Keeper) acts(role Role) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.status.Acts = role
}

// called is the interval that a peer without one gets for its call. Nobody else
// uses the longest there is, so that a peer with it is known to be one of ours,
// also after a crash.
const called = wg.MaxKeepalive

// errDown: nobody has said what a link that is down is to have.
var errDown = errors.New("the link was found down, and what it had is not known: set it up, with its addresses and routes")

// quiet makes the device one of a standby.
func (k *Keeper) quiet() error {
	link, err := k.link()
	if err != nil {
		return err
	}
	var dev wg.Device
	loud := link.Up && !k.cfg.Silent
	look := loud || k.port == 0 || time.Since(k.dumped) > dumpEvery
	if k.port != 0 {
		// Before the device is read, which takes time. It is done again below, as far as
		// it has to be.
		if k.shut() == nil {
			k.acts(Standby)
		}
	}
	if look {
		if dev, err = k.dump(); err != nil {
			return err
		}
		k.known = nil // until their intervals are known to the memory
	}
	// Shut, nothing passes, whatever happens then. A link that is down has no socket;
	// but it may be set up by somebody else.
	gateErr := k.shut()
	switch {
	case gateErr != nil && k.cfg.Silent:
		k.dumped = time.Time{}
		return fmt.Errorf(`the UDP port cannot be shut: %w; or set standby = "down"`, gateErr)
	case gateErr != nil:
		gateErr = fmt.Errorf("only the link keeps the device quiet, and whoever sets it up makes it speak: %w", gateErr)
	}
	k.listen()
	if link.Up && k.low {
		k.begun, k.raised = time.Now(), time.Now()
	}
	k.low = !link.Up
	if link.Up && gateErr == nil && time.Since(k.raised) < raisedFor {
		if now, err := k.settings(); err == nil && now.count() != k.made && time.Since(k.begun) < raisedMost {
			k.made, k.raised = now.count(), time.Now()
		}
		k.dumped = time.Time{} // to look then
		return nil
	}
	if look {
		if err := k.take(dev, link.Up); err != nil {
			k.dumped = time.Time{} // again at the next step
			return errors.Join(gateErr, err)
		}
		k.known = contacts(dev.Peers)
	}
	if k.down {
		gateErr = errors.Join(gateErr, errDown)
	}
	return errors.Join(gateErr, k.lacks, k.cfg.Memory.flush())
}

// listen tells the desk of peers that talk to a standby, which the gate keeps from the
// device. It shuts those of before out as well: the first count is where it begins.
func (k *Keeper) listen() {
	now, before := int64(k.gate.heard()), k.heard
	if k.heard = now; before >= 0 && now > before {
		k.cfg.Desk.Dropped(now-before, time.Now())
	}
}

// dump reads the device.
func (k *Keeper) dump() (wg.Device, error) {
	dev, err := k.cfg.Device.Device(k.cfg.Name)
	if err == nil {
		now := time.Now()
		if dev.Port != k.port {
			k.moved = now
		}
		k.port, k.kernel, k.dumped = dev.Port, dev.Kernel, now
	}
	return dev, err
}

// mostPorts is how many ports are shut at once.
const mostPorts = 4

// shut shuts the port of the device, and for a while those that it had before: one that
// is made anew, as by wg-quick, has a port that the kernel chose, until it is given the
// one that it had.
func (k *Keeper) shut() error {
	if k.port == 0 {
		return errors.New("the device has no listen port to shut: set one that stays the same, with wg set")
	}
	ports := []int{k.port}
	for _, port := range k.cfg.Memory.ports() {
		if port != k.port && len(ports) < mostPorts && time.Since(k.moved) < forgetPorts {
			ports = append(ports, port)
		}
	}
	return shutPorts(k.gate, k.cfg.Memory, ports)
}

func shutPorts(g *gate, m *Memory, ports []int) error {
	if g.says() == shut(ports...) {
		_ = m.keepGate(ports) // unless a daemon ended in between; flush says what is wrong
		return nil
	}
	// Memory or not, they are shut; and before it, for a disk may take its time.
	return errors.Join(g.shut(ports...), m.keepGate(ports))
}

// ShutAhead shuts the ports that a standby's device had, before there is a device again:
// who makes it may set it up before a Keeper has read its port. No Keeper may run
// meanwhile.
func ShutAhead(space *wg.Space, device string, m *Memory) error {
	ports := m.ports()
	if len(ports) == 0 {
		return nil
	}
	return shutPorts(newGate(space, device), m, ports)
}

// ShutAtBoot shuts the ports that a device had before the host was started, so that it is
// quiet until a Keeper knows its role. It does nothing once a Desk or a Keeper has had that
// memory since: then the gate is as they left it. Nothing is written into the memory, which
// may be another user's.
func ShutAtBoot(space *wg.Space, device string, m *Memory) (ports []int, err error) {
	if ports = m.ports(); !m.former || len(ports) == 0 {
		return nil, nil
	}
	return ports, newGate(space, device).shut(ports...)
}

// take takes from the device what must not act on a standby, and remembers it
// first.
func (k *Keeper) take(dev wg.Device, up bool) error {
	before := k.cfg.Memory.taken(k.of)
	t := before
	if t == nil || !t.Promoted.IsZero() {
		t = &taken{iface: k.of}
		if before != nil { // a promotion that did not end
			t.settings = before.settings
			if !before.Called { // or they are all back, and somebody may have set others
				t.Keepalives = before.Keepalives
			}
		}
	}
	if t.Keepalives == nil {
		t.Keepalives = make(map[wgroam.Key]time.Duration)
	}
	var off []wg.Keepalive
	grown := before == nil || before.Promoted != t.Promoted
	if down := !up && (before == nil || before.Down); down != t.Down {
		t.Down, grown = down, true
	}
	k.down = t.Down
	for _, p := range dev.Peers {
		if p.Keepalive == 0 {
			continue
		}
		off = append(off, wg.Keepalive{Peer: p.Key})
		if p.Keepalive != called && t.Keepalives[p.Key] != p.Keepalive {
			t.Keepalives[p.Key], grown = p.Keepalive, true
		}
	}
	// Down, it has neither socket nor sessions: those of another time would keep the
	// next promotion from making new ones.
	reset := up && (!k.cfg.Silent || !t.Reset)
	if reset {
		now, err := k.settings()
		if err != nil {
			return fmt.Errorf("read addresses and routes: %w", err)
		}
		n := t.count()
		t.add(now)
		grown = grown || t.count() != n
	}
	keep := k.cfg.Memory.flush
	if grown {
		keep = func() error { return k.cfg.Memory.keepTaken(t) }
	}
	if err := keep(); err != nil {
		return fmt.Errorf("nothing is taken from the device that could not be given back: %w", err)
	}
	if reset {
		if err := k.setLink(false); err != nil {
			return err
		}
		up = false
		if before == nil || !before.Promoted.IsZero() {
			k.cfg.Log.Info("standby: the device is quiet", "keepalives", len(t.Keepalives), "addresses", len(t.Addrs), "nexthops", len(t.Nexthops), "routes", len(t.Routes))
		}
	}
	if err := k.keepalives(off); err != nil {
		return err
	}
	if !k.cfg.Silent || t.Down {
		return nil
	}
	if !t.Reset {
		t.Reset = true
		if err := k.cfg.Memory.keepTaken(t); err != nil {
			return err
		}
	}
	if !up || k.lacks != nil {
		k.lacks = k.give(t)
	}
	return nil
}

// settings reads the addresses and routes that the link has.
func (k *Keeper) settings() (now settings, err error) {
	err = k.cfg.Space.Do(func() (err error) {
		now, err = readSettings(k.cfg.Ifindex)
		return err
	})
	return now, err
}

// give sets the link up, and gives it its addresses and routes.
func (k *Keeper) give(t *taken) error {
	return k.cfg.Space.Do(func() error {
		if err := setLink(k.cfg.Ifindex, true); err != nil {
			return err
		}
		return t.give(k.cfg.Ifindex)
	})
}

func (k *Keeper) setLink(up bool) error {
	return k.cfg.Space.Do(func() error { return setLink(k.cfg.Ifindex, up) })
}

func (k *Keeper) link() (link wg.Link, err error) {
	err = k.cfg.Space.Do(func() (err error) {
		link, err = wg.LinkByName(k.cfg.Name)
		return err
	})
	if err == nil && link.Ifindex != k.cfg.Ifindex {
		err = fmt.Errorf("%w: another one has the name %s by now", wg.ErrNoDevice, k.cfg.Name)
	}
	return link, err
}

// keepalives writes intervals, a chunk at a time.
func (k *Keeper) keepalives(all []wg.Keepalive) error {
	for len(all) > 0 {
		n := min(len(all), wg.ChunkPeers)
		if err := k.cfg.Device.SetKeepalives(k.cfg.Name, all[:n]); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// open makes the device one that is used, with vips for the source of what it
// sends.
func (k *Keeper) open(ctx context.Context, vips []netip.Addr) (err error) {
	t := k.cfg.Memory.taken(k.of)
	if t != nil && !t.Called {
		k.settle(ctx)
		if t.Promoted.IsZero() {
			t.Promoted = time.Now()
			if err := k.cfg.Memory.keepTaken(t); err != nil {
				k.cfg.Log.Error("going on without memory", "err", err)
			}
			if t.Down {
				k.cfg.Log.Error("promoted with what the device has now", "err", errDown)
			}
		}
		k.begin(t)
	}
	if ctx.Err() != nil {
		return nil
	}
	// Before the first packet can leave, and in one stroke where the gate was shut.
	haste, gateErr := k.unshut(vips)
	if haste {
		defer func() {
			if ctx.Err() == nil { // or it may have to be shut at once
				_, gateErr := k.unshut(vips)
				err = errors.Join(err, gateErr)
			}
		}()
	}
	if t == nil {
		err := k.cfg.Memory.flush()
		if link, linkErr := k.link(); linkErr == nil && !link.Up && k.role == Active {
			err = errors.Join(errDown, err)
		}
		return errors.Join(gateErr, err)
	}
	giveErr, keep := k.give(t), k.cfg.Memory.flush
	if !t.Called {
		if behind := k.cfg.Behind(); behind > 0 {
			k.cfg.Log.Error("this host's clock is behind the group's: peers ignore its handshakes for that long", "behind", behind.Round(time.Millisecond))
		}
		tended := time.Now()
		tend := func() {
			if time.Since(tended) < lookSeldom {
				return
			}
			tended = time.Now()
			if giveErr != nil { // an IPv6 address cannot be a route's source at once
				giveErr = k.give(t)
			}
			if len(vips) > 0 && k.gate.says() == "" { // somebody has flushed the ruleset
				_, gateErr = k.unshut(vips)
			}
		}
		if err := k.call(ctx, t, tend); err != nil || ctx.Err() != nil {
			return errors.Join(gateErr, giveErr, err)
		}
		t.Called = true
		keep = func() error { return k.cfg.Memory.keepTaken(t) }
	}
	if gateErr != nil || giveErr != nil {
		return errors.Join(gateErr, giveErr, keep())
	}
	return k.cfg.Memory.keepTaken(nil)
}

// Release gives the device all that was taken from it, removes the gate, and the
// memory. Nobody is called, but for those whose keepalives are back. No Keeper may run
// meanwhile.
func (k *Keeper) Release() error {
	err := errors.Join(k.gate.remove(), dropProbe(k.cfg.Space, k.cfg.Name))
	if t := k.cfg.Memory.taken(k.of); t != nil {
		if !t.Down {
			err = errors.Join(err, k.give(t))
		}
		dev, devErr := k.cfg.Device.Device(k.cfg.Name)
		if devErr == nil {
			devErr = k.restore(dev.Peers, t)
		}
		err = errors.Join(err, devErr)
	}
	if err != nil {
		return fmt.Errorf("not all could be given back; try again: %w", err)
	}
	return k.cfg.Memory.remove()
}

const (
	// settleFor is how long a promotion waits for endpoints on their way into the
	// device, and wholeFor for the rest of the virtual IPs: who moves them brings one
	// after the other, and an answer that comes to an address which is not here yet is
	// lost, and the call repeated 5 seconds later.
	settleFor = 2 * time.Second
	wholeFor  = 250 * time.Millisecond
)

func (k *Keeper) settle(ctx context.Context) {
	began := time.Now()
	settled := false
	for {
		settled = settled || k.cfg.Settled()
		if settled && (time.Since(began) >= wholeFor || !k.partial()) {
			return
		}
		if time.Since(began) > settleFor {
			k.cfg.Log.Warn("some endpoints are not in the device yet; going on")
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Millisecond):
		}
	}
}

// partial reports whether some of the virtual IPs are here, and not all.
func (k *Keeper) partial() bool {
	here := 0
	_ = k.cfg.Space.Do(func() error { // what cannot be read is not waited for
		addrs, err := addresses()
		for _, vip := range k.cfg.VIP {
			if slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return isOneOf([]netip.Addr{vip}, a) && isUsable(a) }) {
				here++
			}
		}
		return err
	})
	return here > 0 && here < len(k.cfg.VIP)
}

// unshut replaces what shuts the port: in haste, and for good when it is called again.
func (k *Keeper) unshut(vips []netip.Addr) (haste bool, err error) {
	var says string
	ours := k.cfg.Memory.gate()
	if len(vips) > 0 || ours || !k.asked {
		// Once the gate itself is asked: a daemon that could not write has left no memory of it.
		says, k.asked = k.gate.says(), true
	}
	// By the port that is shut: to read the device takes time.
	if strings.HasPrefix(says, standby) && k.port != 0 && k.gate.open(vips, k.port) == nil {
		return true, nil
	}
	if len(vips) > 0 && time.Since(k.dumped) > dumpEvery {
		if _, err := k.dump(); err != nil {
			return false, err
		}
	}
	switch {
	case len(vips) == 0 && (ours || says != ""):
		if err := k.gate.remove(); err != nil {
			return false, err
		}
		return false, k.cfg.Memory.noGate()
	case len(vips) == 0 || k.port == 0 || says == from(vips, k.port):
		return false, nil
	}
	return false, errors.Join(k.gate.from(vips, k.port), k.cfg.Memory.keepGate([]int{k.port}))
}
