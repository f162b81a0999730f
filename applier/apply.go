// SPDX-License-Identifier: MIT

// Package applier takes in what the other nodes know, and makes the local
// WireGuard device agree.
//
// It has two halves that share nothing but the Table. A Merger turns messages of
// the feed into records of the Table, and asks for those that went missing. An
// Applier compares the Table with the device and writes the difference; it is a
// reconciler, not a message handler, so that nothing depends on how the Table
// came to be what it is.
package applier

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

// Device is what the Applier writes to: wg.Client, or something that fails as a
// kernel rarely does.
type Device interface {
	SetEndpoints(name string, eps []wg.Endpoint) error
}

// How long a failed write waits before it is tried again, at first and at most.
const (
	retryFirst = 100 * time.Millisecond
	retryMost  = 30 * time.Second
)

// How long after a record of a peer that the device does not have the peer is
// looked for, at first and at most.
const (
	searchFirst = time.Second
	searchMost  = 64 * time.Second
)

// confirmWithin is how long the rest of a handshake may take, the time after
// which an initiator tries again (messages.h, REKEY_TIMEOUT).
const confirmWithin = 5 * time.Second

// Config describes an Applier.
type Config struct {
	Name   string // of the device
	Device Device
	Table  *wgroam.Table
	View   *wgroam.View
	// Missing, if set, is called while there are records of peers that the device
	// does not have as far as the View knows: a second after the last of them came,
	// then after two, four ... 64 more, and every 64 from then on. It must not
	// block.
	Missing func()
	// Written, if set, is told how long a record took from the Table into the
	// device. It must not block.
	Written func(time.Duration)
	Log     *slog.Logger
}

// State says whether the device holds what the Table says.
type State string

// The states of a peer.
const (
	// StateYes: the device holds the newest endpoint.
	StateYes State = "yes"
	// StateNo: not yet, or the write failed.
	StateNo State = "no"
	// StateWaiting: the device does not have the peer.
	StateWaiting State = "waiting"
	// StateOverridden: somebody configured another endpoint since.
	StateOverridden State = "overridden"
	// StateUnconfirmed: the device took another endpoint from the beginning of a
	// handshake. It may be a replay; if the end does not follow, it is undone.
	StateUnconfirmed State = "unconfirmed"
)

// Status is what an Applier can tell of itself.
type Status struct {
	// Applied and Errors count endpoints written, and failed to write. Undone are
	// those of Applied that took back what only the beginning of a handshake, perhaps
	// a replayed one, had brought into the device.
	Applied, Errors, Undone uint64
	// LastError is the newest failure; nil after a success.
	LastError error
}

// written is what the Applier last wrote for a peer, or found in the device.
type written struct {
	version  wgroam.Version
	since    time.Time      // when that version was new to us
	endpoint netip.AddrPort // zero unless it was written here
}

// Applier writes the endpoints of the Table into one device.
type Applier struct {
	cfg     Config
	changes *wgroam.Changes
	waits   *wgroam.Waits // since the record is in the Table

	mu     sync.Mutex
	peers  map[wgroam.Key]written
	status Status
	busy   bool // Run has taken peers from changes, or has some to write again
}

// New returns an Applier for all that is in the Table, and all that will be.
// Nothing is written before Run.
func New(cfg Config) *Applier {
	a := &Applier{cfg: cfg, changes: wgroam.NewChanges(), waits: wgroam.NewWaits(), peers: make(map[wgroam.Key]written)}
	cfg.Table.Notify(a.changes, func(r wgroam.Record) bool {
		a.waits.Begin(r.Peer, time.Now())
		return true
	})
	cfg.View.Notify(a.changes)
	for _, r := range cfg.Table.Records() {
		a.changes.Mark(r.Peer)
	}
	return a
}

// Run applies until ctx ends.
func (a *Applier) Run(ctx context.Context) {
	var (
		// What could not be written waits for the retry, or for news: the write
		// itself and its failure change the View, which is no reason to try again.
		failed = make(map[wgroam.Key]wgroam.Version)
		delay  = retryFirst
		retry  <-chan time.Time
		// Peers in the middle of a handshake, to look at again.
		doubts []wgroam.Key
		doubt  <-chan time.Time
		// Peers that the device does not have.
		missing = make(map[wgroam.Key]struct{})
		wait    time.Duration
		search  <-chan time.Time
	)
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.changes.Ready():
		case <-retry:
			retry = nil
			for k := range failed {
				a.changes.Mark(k)
			}
			clear(failed) // and still busy, until they have their turn
			continue
		case <-search:
			search = nil
			maps.DeleteFunc(missing, func(k wgroam.Key, _ struct{}) bool { return a.State(k) != StateWaiting })
			if len(missing) > 0 {
				a.cfg.Missing()
				wait = min(2*wait, searchMost)
				search = time.After(wait)
			}
			continue
		case <-doubt:
			doubt = nil
			for _, k := range doubts {
				a.changes.Mark(k)
			}
			doubts = nil
			continue
		}
		a.setBusy(true) // before any is taken
		records, unconfirmed, absent := a.batch(failed)
		for _, k := range absent {
			if _, known := missing[k]; !known && a.cfg.Missing != nil {
				missing[k] = struct{}{}
				// More of them do not put it off.
				if search == nil || wait > searchFirst {
					wait = searchFirst
					search = time.After(wait)
				}
			}
		}
		for _, r := range a.apply(records) {
			failed[r.Peer] = r.Version
		}
		if doubts = append(doubts, unconfirmed...); len(doubts) > 0 && doubt == nil {
			doubt = time.After(confirmWithin)
		}
		a.setBusy(len(failed) > 0)
		switch {
		case len(failed) > 0 && retry == nil:
			retry = time.After(delay)
			delay = min(2*delay, retryMost)
		case len(failed) == 0 && a.changes.Len() == 0:
			delay = retryFirst
		}
	}
}

// batch returns the next endpoints to write, at most wg.ChunkPeers, but for
// those that have failed, and of the peers that it has looked at those whose
// endpoint is unconfirmed, and those that the device does not have.
func (a *Applier) batch(failed map[wgroam.Key]wgroam.Version) (out []wgroam.Record, unconfirmed, absent []wgroam.Key) {
	var again []wgroam.Key
	for len(out) < wg.ChunkPeers {
		keys := a.changes.Take(wg.ChunkPeers - len(out))
		if len(keys) == 0 {
			break
		}
		for _, k := range keys {
			if slices.ContainsFunc(out, func(r wgroam.Record) bool { return r.Peer == k }) {
				// It has changed again meanwhile, and has its turn after this write.
				again = append(again, k)
				continue
			}
			r, state := a.decide(k)
			v, tried := failed[k]
			if state != StateNo {
				a.waits.End(k, time.Now()) // for nothing that we could write
				delete(failed, k)
			}
			switch {
			case state == StateUnconfirmed:
				unconfirmed = append(unconfirmed, k)
			case state == StateWaiting:
				absent = append(absent, k)
			case state == StateNo && (!tried || v != r.Version):
				out = append(out, r)
			}
		}
	}
	for _, k := range again {
		a.changes.Mark(k)
	}
	return out, unconfirmed, absent
}

// decide compares the Table and the device on one peer. The state is empty when
// the Table does not have it; only with StateNo there is something to write.
func (a *Applier) decide(k wgroam.Key) (wgroam.Record, State) {
	r, ok := a.cfg.Table.Get(k)
	if !ok {
		return r, ""
	}
	held, ok := a.cfg.View.Get(k)
	if !ok {
		a.mu.Lock()
		delete(a.peers, k) // what we wrote is gone with the peer
		a.mu.Unlock()
		return r, StateWaiting
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	last := a.peers[k]
	if held.Endpoint == r.Endpoint {
		// Writing it again would make the kernel forget the local address that
		// it learned for the peer.
		if r.Version != last.version {
			a.peers[k] = written{r.Version, time.Now(), last.endpoint}
		}
		return r, StateYes
	}
	switch {
	case r.Version.Compare(last.version) > 0:
		return r, StateNo // news
	case held.At.Before(last.since):
		return r, StateNo // was on its way to us when the record came
	case !held.Endpoint.IsValid():
		return r, StateNo // removed and added again
	case held.Cause == wgroam.CauseInitiation:
		if time.Since(held.At) < confirmWithin {
			return r, StateUnconfirmed
		}
		return r, StateNo
	case held.Cause == wgroam.CauseConfig && held.Endpoint == last.endpoint:
		return r, StateNo // our own write came down on something newer
	}
	// An administrator's endpoint stands until the peer is seen elsewhere.
	return r, StateOverridden
}

// apply writes the endpoints of records and returns those that failed.
func (a *Applier) apply(records []wgroam.Record) []wgroam.Record {
	if len(records) == 0 {
		return nil
	}
	err := a.write(records)
	if err == nil {
		return nil
	}
	if len(records) == 1 || errors.Is(err, wg.ErrNoDevice) || errors.Is(err, wg.ErrPrivilege) {
		a.mu.Lock()
		a.status.Errors += uint64(len(records))
		a.mu.Unlock()
		a.cfg.Log.Error("cannot write endpoints", "device", a.cfg.Name, "peers", len(records), "first", records[0].Peer, "err", err)
		return records
	}
	// One bad peer makes the kernel drop all that follow it in the message:
	// write them one by one.
	var failed []wgroam.Record
	for _, r := range records {
		failed = append(failed, a.apply([]wgroam.Record{r})...)
	}
	return failed
}

func (a *Applier) write(records []wgroam.Record) error {
	eps := make([]wg.Endpoint, len(records))
	before := make([]wgroam.Holding, len(records))
	news := make([]bool, len(records))
	now := time.Now()
	a.mu.Lock()
	for i, r := range records {
		eps[i] = wg.Endpoint{Peer: r.Peer, Endpoint: r.Endpoint}
		news[i] = a.peers[r.Peer].version != r.Version
		a.peers[r.Peer] = written{r.Version, now, r.Endpoint}
	}
	a.mu.Unlock()
	for i, r := range records {
		// Noted before it happens: a poll that comes in between would take it
		// for the peer's doing.
		before[i], _ = a.cfg.View.Set(r.Peer, wgroam.Holding{Endpoint: r.Endpoint, Cause: wgroam.CauseConfig, At: now})
	}
	err := a.cfg.Device.SetEndpoints(a.cfg.Name, eps)

	a.mu.Lock()
	defer a.mu.Unlock()
	a.status.LastError = err
	if err == nil {
		a.status.Applied += uint64(len(records))
		for i, r := range records {
			if !news[i] && before[i].Cause == wgroam.CauseInitiation {
				a.status.Undone++
				a.cfg.Log.Warn("took back an endpoint that no session has confirmed; the handshake may have been a replay",
					"device", a.cfg.Name, "peer", r.Peer, "was", before[i].Endpoint, "is", r.Endpoint)
			}
			if waited, ok := a.waits.End(r.Peer, time.Now()); ok && a.cfg.Written != nil {
				a.cfg.Written(waited)
			}
		}
		return nil
	}
	for i, r := range records {
		delete(a.peers, r.Peer)
		// Unless the device has learned something else meanwhile.
		if held, _ := a.cfg.View.Get(r.Peer); held.Endpoint == r.Endpoint && held.At.Equal(now) {
			a.cfg.View.Set(r.Peer, before[i])
		}
	}
	return err
}

func (a *Applier) setBusy(busy bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.busy = busy
}

// Settled reports whether there is nothing to write: no peer is in StateNo.
func (a *Applier) Settled() bool {
	// In this order: who is taken from changes makes it busy first.
	if a.changes.Len() > 0 {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return !a.busy
}

// Status returns a copy of the current status.
func (a *Applier) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status
}

// State returns how the device stands to the Table on one peer; empty when the
// Table does not have it.
func (a *Applier) State(k wgroam.Key) State {
	_, state := a.decide(k)
	return state
}
