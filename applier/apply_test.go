// SPDX-License-Identifier: MIT

package applier

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/wg"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func key(n int) wgroam.Key { return wgroam.Key{byte(n >> 8), byte(n), 1} }

func at(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)}), 51820)
}

// record says that a peer was seen at an endpoint, by node 2.
func record(peer wgroam.Key, ep netip.AddrPort, hlc int) wgroam.Record {
	return wgroam.Record{Peer: peer, Endpoint: ep, Cause: wgroam.CauseData, Version: wgroam.Version{HLC: wgroam.HLC(hlc), Node: 2}}
}

var errDevice = errors.New("device is out of order")

// fakeDevice is a WireGuard device, and the tracker that keeps a View equal to
// it. It checks what it is asked to do.
type fakeDevice struct {
	t    testing.TB
	view *wgroam.View
	// fail says why a call, or one of its endpoints, cannot be carried out; nil
	// for never. It is called before anything is written.
	fail func(eps []wg.Endpoint) error

	mu     sync.Mutex
	held   map[wgroam.Key]netip.AddrPort
	calls  int
	writes int
}

func (d *fakeDevice) SetEndpoints(name string, eps []wg.Endpoint) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls++
	if name != "wg0" || len(eps) == 0 || len(eps) > wg.ChunkPeers {
		d.t.Errorf("write of %d endpoints to %q", len(eps), name)
	}
	seen := map[wgroam.Key]bool{}
	for _, e := range eps {
		if seen[e.Peer] {
			d.t.Errorf("peer %v twice in one write", e.Peer)
		}
		seen[e.Peer] = true
	}
	if d.fail != nil {
		if err := d.fail(eps); err != nil {
			return err
		}
	}
	for _, e := range eps {
		was, ok := d.held[e.Peer]
		if !ok {
			continue // UpdateOnly
		}
		if was == e.Endpoint {
			d.t.Errorf("peer %v was at %v already", e.Peer, was)
		}
		d.writes++
		d.held[e.Peer] = e.Endpoint
	}
	return nil
}

// has gives the device a peer.
func (d *fakeDevice) has(peer wgroam.Key, ep netip.AddrPort, cause wgroam.Cause) {
	d.mu.Lock()
	d.held[peer] = ep
	d.mu.Unlock()
	d.view.Set(peer, wgroam.Holding{Endpoint: ep, Cause: cause, At: time.Now()})
}

func (d *fakeDevice) endpoints() map[wgroam.Key]netip.AddrPort {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.held)
}

func (d *fakeDevice) counts() (calls, writes int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls, d.writes
}

var sameEndpoint = cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })

func newApplier(t testing.TB) (*Applier, *fakeDevice, *wgroam.Table) {
	view, table := wgroam.NewView(), wgroam.NewTable([32]byte{})
	d := &fakeDevice{t: t, view: view, held: make(map[wgroam.Key]netip.AddrPort)}
	return New(Config{Name: "wg0", Device: d, Table: table, View: view, Log: quiet()}), d, table
}

// run runs the applier until the test ends.
func run(t *testing.T, a *Applier) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { a.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait() })
}

func wantState(t *testing.T, a *Applier, peer wgroam.Key, want State) {
	t.Helper()
	if got := a.State(peer); got != want {
		t.Errorf("state of %v is %q, want %q", peer, got, want)
	}
}

func wantSettled(t *testing.T, a *Applier, want bool) {
	t.Helper()
	if got := a.Settled(); got != want {
		t.Errorf("settled is %v, want %v", got, want)
	}
}

// TestApply: what is in the table when the applier starts, and what comes later,
// ends in the device.
func TestApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		view, table := wgroam.NewView(), wgroam.NewTable([32]byte{})
		d := &fakeDevice{t: t, view: view, held: make(map[wgroam.Key]netip.AddrPort)}
		want := make(map[wgroam.Key]netip.AddrPort)
		const peers = 100
		for i := range peers {
			d.has(key(i), netip.AddrPort{}, 0)
			table.Merge(record(key(i), at(i), 1))
			want[key(i)] = at(i)
		}
		a := New(Config{Name: "wg0", Device: d, Table: table, View: view, Log: quiet()})
		if calls, _ := d.counts(); calls != 0 {
			t.Errorf("%d writes before Run", calls)
		}
		wantSettled(t, a, false)
		run(t, a)
		synctest.Wait()
		wantSettled(t, a, true)
		if diff := cmp.Diff(want, d.endpoints(), sameEndpoint); diff != "" {
			t.Errorf("device (-want +got):\n%s", diff)
		}
		if calls, _ := d.counts(); calls != 4 {
			t.Errorf("%d calls for %d peers, want 4", calls, peers)
		}
		if s := a.Status(); s != (Status{Applied: peers}) {
			t.Errorf("status %+v", s)
		}

		// Later, in two steps of which only the last counts.
		table.Merge(record(key(7), at(1007), 2))
		table.Merge(record(key(7), at(2007), 3))
		wantSettled(t, a, false)
		want[key(7)] = at(2007)
		synctest.Wait()
		if diff := cmp.Diff(want, d.endpoints(), sameEndpoint); diff != "" {
			t.Errorf("device after a roam (-want +got):\n%s", diff)
		}
		wantState(t, a, key(7), StateYes)
		if state := a.State(key(5000)); state != "" {
			t.Errorf("state of a peer that nobody knows is %q", state)
		}

		// Old news and repetitions write nothing.
		calls, _ := d.counts()
		table.Merge(record(key(7), at(1007), 2))
		table.Merge(record(key(8), at(8), 9))
		d.has(key(9), at(9), wgroam.CauseData)
		synctest.Wait()
		if again, _ := d.counts(); again != calls {
			t.Errorf("%d more calls for what the device holds", again-calls)
		}
	})
}

// TestChurn: peers that change faster than they can be looked at. No write has a
// peer twice, and the last word counts.
func TestChurn(t *testing.T) {
	a, d, table := newApplier(t)
	const peers, changes = 4, 3000
	for i := range peers {
		d.has(key(i), netip.AddrPort{}, 0)
	}
	run(t, a)
	var wg sync.WaitGroup
	for i := range peers {
		wg.Go(func() {
			for n := range changes {
				table.Merge(record(key(i), at(n+1), n+1))
			}
		})
	}
	wg.Wait()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for i := range peers {
		for a.State(key(i)) != StateYes || d.endpoints()[key(i)] != at(changes) {
			select {
			case <-tick.C:
			case <-deadline:
				t.Fatalf("peer %d is at %v, want %v", i, d.endpoints()[key(i)], at(changes))
			}
		}
	}
}

// TestWaiting: a record of a peer that the device does not have waits for it.
func TestWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, d, table := newApplier(t)
		run(t, a)
		table.Merge(record(key(1), at(1), 1))
		synctest.Wait()
		wantState(t, a, key(1), StateWaiting)
		wantSettled(t, a, true)
		if calls, _ := d.counts(); calls != 0 {
			t.Errorf("%d writes for a peer that is not there", calls)
		}
		d.has(key(1), netip.AddrPort{}, 0)
		synctest.Wait()
		wantState(t, a, key(1), StateYes)

		// Removed, and added again without an endpoint.
		d.mu.Lock()
		delete(d.held, key(1))
		d.mu.Unlock()
		d.view.Keep(func(wgroam.Key) bool { return false })
		wantState(t, a, key(1), StateWaiting)
		d.has(key(1), netip.AddrPort{}, 0)
		synctest.Wait()
		if got := d.endpoints()[key(1)]; got != at(1) {
			t.Errorf("the peer that came back is at %v, want %v", got, at(1))
		}
	})
}

// TestAlwaysFails: a device that fails is tried ever more rarely, and used as
// soon as it works.
func TestAlwaysFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, d, table := newApplier(t)
		ctx, cancel := context.WithCancel(t.Context())
		var (
			began    = time.Now()
			attempts []time.Duration
		)
		d.fail = func([]wg.Endpoint) error {
			if attempts = append(attempts, time.Since(began)); len(attempts) > 1000 {
				cancel() // else time stands still for ever
			}
			return errDevice
		}
		before := wgroam.Holding{Endpoint: at(9), Cause: wgroam.CauseData, At: began.Add(-time.Hour)}
		d.held[key(1)] = at(9)
		d.view.Set(key(1), before)
		done := make(chan struct{})
		go func() { a.Run(ctx); close(done) }()
		table.Merge(record(key(1), at(1), 1))

		select {
		case <-time.After(2 * time.Minute):
		case <-done:
		}
		synctest.Wait()
		var want []time.Duration
		for at, delay := time.Duration(0), retryFirst; at < 2*time.Minute; at, delay = at+delay, min(2*delay, retryMost) {
			want = append(want, at)
		}
		if diff := cmp.Diff(want, attempts[:min(len(attempts), 50)]); diff != "" {
			t.Fatalf("attempts (-want +got):\n%s", diff)
		}
		wantState(t, a, key(1), StateNo)
		wantSettled(t, a, false)
		if held, _ := d.view.Get(key(1)); held != before {
			t.Errorf("after failed writes the view has %+v, want %+v", held, before)
		}
		if s := a.Status(); s.Applied != 0 || s.Errors != uint64(len(attempts)) || !errors.Is(s.LastError, errDevice) {
			t.Errorf("status %+v", s)
		}

		// News of the same peer are tried at once, whatever the delay.
		n := len(attempts)
		table.Merge(record(key(1), at(2), 2))
		synctest.Wait()
		if len(attempts) != n+1 {
			t.Errorf("%d attempts at news, want 1", len(attempts)-n)
		}

		d.mu.Lock()
		d.fail = nil
		d.mu.Unlock()
		time.Sleep(retryMost)
		synctest.Wait()
		wantState(t, a, key(1), StateYes)
		wantSettled(t, a, true)
		if s := a.Status(); s.Applied != 1 || s.LastError != nil {
			t.Errorf("status %+v", s)
		}

		// The next failure starts with the short delay again.
		d.mu.Lock()
		d.fail = func([]wg.Endpoint) error { return errDevice }
		d.mu.Unlock()
		table.Merge(record(key(1), at(3), 3))
		synctest.Wait()
		d.mu.Lock()
		d.fail = nil
		d.mu.Unlock()
		time.Sleep(retryFirst)
		synctest.Wait()
		wantState(t, a, key(1), StateYes)
		cancel()
		<-done
	})
}

// TestOneBadPeer: a peer that cannot be written does not keep the others from
// being written, and is tried again by itself.
func TestOneBadPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, d, table := newApplier(t)
		bad := key(5)
		d.fail = func(eps []wg.Endpoint) error {
			if d.calls > 1000 {
				d.fail = nil // else time stands still for ever
			}
			for _, e := range eps {
				if e.Peer == bad {
					return errDevice
				}
			}
			return nil
		}
		const peers = 40
		for i := range peers {
			d.has(key(i), netip.AddrPort{}, 0)
			table.Merge(record(key(i), at(i), 1))
		}
		run(t, a)
		synctest.Wait()
		for i := range peers {
			if key(i) == bad {
				wantState(t, a, key(i), StateNo)
				continue
			}
			if got := d.endpoints()[key(i)]; got != at(i) {
				t.Errorf("peer %d is at %v, want %v", i, got, at(i))
			}
			wantState(t, a, key(i), StateYes)
		}
		// A batch with the bad one, 32 alone, a batch without.
		if calls, _ := d.counts(); calls != 34 {
			t.Errorf("%d calls, want 34", calls)
		}
		time.Sleep(retryFirst)
		synctest.Wait()
		if calls, _ := d.counts(); calls != 35 {
			t.Errorf("%d calls after the first retry, want 35", calls)
		}
		if s := a.Status(); s.Applied != peers-1 || s.Errors != 2 {
			t.Errorf("status %+v", s)
		}
		d.mu.Lock()
		d.fail = nil
		d.mu.Unlock()
		time.Sleep(2 * retryFirst)
		synctest.Wait()
		wantState(t, a, key(5), StateYes)
	})
}

// TestGone: a device that is not there is not asked once per peer.
func TestGone(t *testing.T) {
	for _, gone := range []error{wg.ErrNoDevice, wg.ErrPrivilege} {
		t.Run(gone.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, d, table := newApplier(t)
				d.fail = func([]wg.Endpoint) error { return fmt.Errorf("%w: wg0", gone) }
				const peers = 320
				for i := range peers {
					d.has(key(i), netip.AddrPort{}, 0)
					table.Merge(record(key(i), at(i), 1))
				}
				run(t, a)
				synctest.Wait()
				if calls, _ := d.counts(); calls > 10 {
					t.Errorf("%d calls, want 10", calls)
				}
				if s := a.Status(); s.Errors != peers {
					t.Errorf("%d errors, want %d", s.Errors, peers)
				}
				d.mu.Lock()
				d.fail = nil
				d.mu.Unlock()
				time.Sleep(time.Second)
				synctest.Wait()
				for i := range peers {
					wantState(t, a, key(i), StateYes)
				}
			})
		})
	}
}

// TestUnconfirmed: an endpoint from the beginning of a handshake stands until the
// end should have followed.
func TestUnconfirmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, d, table := newApplier(t)
		run(t, a)
		d.has(key(1), netip.AddrPort{}, 0)
		table.Merge(record(key(1), at(1), 1))
		synctest.Wait()
		time.Sleep(time.Second)

		// A handshake that is completed: the record comes before the time is up.
		d.has(key(1), at(2), wgroam.CauseInitiation)
		synctest.Wait()
		wantState(t, a, key(1), StateUnconfirmed)
		time.Sleep(confirmWithin / 2)
		table.Merge(record(key(1), at(2), 2))
		synctest.Wait()
		wantState(t, a, key(1), StateYes)
		calls, _ := d.counts()
		time.Sleep(2 * confirmWithin)
		if after, _ := d.counts(); after != calls || a.Status().Undone != 0 {
			t.Errorf("%d writes after a completed handshake, %d undone", after-calls, a.Status().Undone)
		}

		// One that is not: a replay.
		d.has(key(1), at(3), wgroam.CauseInitiation)
		synctest.Wait()
		wantState(t, a, key(1), StateUnconfirmed)
		time.Sleep(confirmWithin + time.Second)
		synctest.Wait()
		wantState(t, a, key(1), StateYes)
		if got := d.endpoints()[key(1)]; got != at(2) {
			t.Errorf("device has %v, want %v back", got, at(2))
		}
		if n := a.Status().Undone; n != 1 {
			t.Errorf("%d undone, want 1", n)
		}
	})
}

// TestOverride: an administrator's endpoint stands until the peer is seen
// elsewhere.
func TestOverride(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, d, table := newApplier(t)
		run(t, a)
		d.has(key(1), netip.AddrPort{}, 0)
		table.Merge(record(key(1), at(1), 1))
		synctest.Wait()

		// Somebody asks before the event of it is here.
		time.Sleep(time.Millisecond)
		override := wgroam.Holding{Endpoint: at(99), Cause: wgroam.CauseConfig, At: time.Now()}
		d.mu.Lock()
		d.held[key(1)] = at(99)
		d.mu.Unlock()
		time.Sleep(time.Millisecond)
		wantState(t, a, key(1), StateYes)
		d.view.Set(key(1), override)
		synctest.Wait()
		wantState(t, a, key(1), StateOverridden)
		if got := d.endpoints()[key(1)]; got != at(99) {
			t.Errorf("device has %v, want the administrator's %v", got, at(99))
		}
		// Digests, restarts of others, whatever: old records come again.
		table.Merge(record(key(1), at(1), 1))
		synctest.Wait()
		wantState(t, a, key(1), StateOverridden)

		table.Merge(record(key(1), at(2), 2))
		synctest.Wait()
		wantState(t, a, key(1), StateYes)
		if got := d.endpoints()[key(1)]; got != at(2) {
			t.Errorf("device has %v, want the news %v", got, at(2))
		}
		// The same place seen again is news too, if it is not where the device
		// points.
		d.has(key(1), at(99), wgroam.CauseConfig)
		table.Merge(record(key(1), at(2), 3))
		synctest.Wait()
		wantState(t, a, key(1), StateYes)
	})
}

// TestLateWrite: the peer speaks to this device from a newer address while we
// write an older one. The newer one wins, in either order of the two.
func TestLateWrite(t *testing.T) {
	for name, order := range map[string][]string{
		"the table hears of it first": {"learn", "publish", "land"},
		"the write lands first":       {"learn", "land", "publish"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, d, table := newApplier(t)
				d.has(key(1), at(1), wgroam.CauseData)
				table.Merge(record(key(1), at(1), 1))
				writing, land := make(chan struct{}), make(chan struct{})
				d.fail = func([]wg.Endpoint) error {
					close(writing)
					d.mu.Unlock()
					<-land
					d.mu.Lock()
					d.fail = nil
					return nil
				}
				run(t, a)
				table.Merge(record(key(1), at(2), 2))
				<-writing
				for _, step := range order {
					switch step {
					case "learn":
						d.has(key(1), at(3), wgroam.CauseData)
					case "publish":
						table.Merge(record(key(1), at(3), 3))
					case "land":
						close(land)
						synctest.Wait()
						// What the hook says of our own write.
						d.view.Set(key(1), wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseConfig, At: time.Now()})
					}
					time.Sleep(time.Millisecond)
					synctest.Wait()
				}
				if got := d.endpoints()[key(1)]; got != at(3) {
					t.Errorf("device has %v, want %v", got, at(3))
				}
				wantState(t, a, key(1), StateYes)
			})
		})
	}
}

// TestLateEvent: the device was given another endpoint, and before we hear of it
// a newer record comes that agrees with what we know. It wins when we do hear.
func TestLateEvent(t *testing.T) {
	for _, cause := range []wgroam.Cause{wgroam.CauseData, wgroam.CauseConfig} {
		t.Run(cause.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, d, table := newApplier(t)
				run(t, a)
				d.has(key(1), at(1), wgroam.CauseData)
				table.Merge(record(key(1), at(1), 1))
				synctest.Wait()

				time.Sleep(time.Second)
				changed := time.Now()
				d.mu.Lock()
				d.held[key(1)] = at(2)
				d.mu.Unlock()
				time.Sleep(time.Millisecond)
				table.Merge(record(key(1), at(1), 3))
				synctest.Wait()
				wantState(t, a, key(1), StateYes)

				time.Sleep(time.Millisecond)
				a.State(key(1)) // asking changes nothing
				d.view.Set(key(1), wgroam.Holding{Endpoint: at(2), Cause: cause, At: changed})
				if cause.Observed() {
					table.Merge(record(key(1), at(2), 2))
				}
				synctest.Wait()
				if got := d.endpoints()[key(1)]; got != at(1) {
					t.Errorf("device has %v, want %v", got, at(1))
				}
				wantState(t, a, key(1), StateYes)
			})
		})
	}
}

// TestFailedWriteKeepsNews: what the device learned during a write that failed
// is not forgotten.
func TestFailedWriteKeepsNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, d, table := newApplier(t)
		d.has(key(1), at(1), wgroam.CauseData)
		news := wgroam.Holding{Endpoint: at(3), Cause: wgroam.CauseData, At: time.Now().Add(time.Millisecond)}
		d.fail = func([]wg.Endpoint) error {
			d.held[key(1)] = at(3)
			d.view.Set(key(1), news)
			return errDevice
		}
		table.Merge(record(key(1), at(2), 2))
		records, _, _ := a.batch(nil)
		if failed := a.apply(records); len(failed) != 1 {
			t.Fatalf("%d failed, want 1", len(failed))
		}
		if held, _ := d.view.Get(key(1)); held != news {
			t.Errorf("view has %+v, want %+v", held, news)
		}
	})
}

// TestApplierConverges: whatever happens in whatever order, the device ends up
// where the table says, unless an administrator said otherwise last.
func TestApplierConverges(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		view, table := wgroam.NewView(), wgroam.NewTable([32]byte{})
		d := &model{view: view, table: table, peers: make(map[wgroam.Key]*modelPeer), clock: 10}
		a := New(Config{Name: "wg0", Device: d, Table: table, View: view, Log: quiet()})
		waiting := map[wgroam.Key]bool{}
		step := func() {
			records, _, _ := a.batch(nil)
			for _, r := range a.apply(records) {
				waiting[r.Peer] = true
			}
		}
		peer := func() wgroam.Key { return key(rapid.IntRange(1, 3).Draw(rt, "peer")) }
		endpoint := func() netip.AddrPort { return at(rapid.IntRange(1, 4).Draw(rt, "endpoint")) }
		rt.Repeat(map[string]func(*rapid.T){
			"record from another node": func(rt *rapid.T) {
				d.clock++
				age := rapid.IntRange(0, 3).Draw(rt, "age")
				r := record(peer(), endpoint(), 10*d.clock-10*age-5)
				table.Merge(r)
			},
			"the peer speaks": func(rt *rapid.T) { d.learn(peer(), endpoint()) },
			"an administrator writes": func(rt *rapid.T) {
				k := peer()
				if p := d.peers[k]; p != nil {
					d.configure(k, endpoint())
					r, _ := table.Get(k)
					p.override = r.Version
				}
			},
			"the peer is added": func(*rapid.T) {
				k := peer()
				if d.peers[k] == nil {
					d.peers[k] = &modelPeer{}
					view.Set(k, wgroam.Holding{})
				}
			},
			"the peer is removed": func(*rapid.T) {
				k := peer()
				delete(d.peers, k)
				view.Keep(func(other wgroam.Key) bool { return other != k })
			},
			"an event arrives": func(*rapid.T) { d.deliver() },
			"apply":            func(*rapid.T) { step() },
			"apply, but the device fails": func(*rapid.T) {
				d.failing = true
				step()
				d.failing = false
			},
			"apply, while the peer speaks": func(rt *rapid.T) {
				d.during = func() { d.learn(peer(), endpoint()) }
				step()
				d.during = nil
			},
			"retry": func(*rapid.T) {
				for k := range waiting {
					a.changes.Mark(k)
				}
				clear(waiting)
			},
		})
		for k := range waiting {
			a.changes.Mark(k)
		}
		for rounds := 0; ; rounds++ {
			for d.deliver() {
			}
			if a.changes.Len() == 0 {
				break
			}
			if rounds > 50 {
				rt.Fatalf("no rest after %d rounds", rounds)
			}
			step()
		}
		for k, p := range d.peers {
			held, _ := view.Get(k)
			if held.Endpoint != p.endpoint {
				rt.Errorf("peer %v: view has %v, device %v", k, held.Endpoint, p.endpoint)
			}
			r, ok := table.Get(k)
			if ok && p.endpoint != r.Endpoint && r.Version.Compare(p.override) > 0 {
				rt.Errorf("peer %v is at %v (%v), the table says %v: %s", k, p.endpoint, held.Cause, r.Endpoint, a.State(k))
			}
		}
	})
}

// model is a device whose events take their time, and the rest of the node:
// what the device learns ends in the table, after it is in the view.
type model struct {
	view    *wgroam.View
	table   *wgroam.Table
	peers   map[wgroam.Key]*modelPeer
	events  []func()
	clock   int
	failing bool
	during  func() // before a write lands
}

type modelPeer struct {
	endpoint netip.AddrPort
	override wgroam.Version // of the record that an administrator's write superseded
}

// event puts a change into the queue. The peer may be gone when it arrives.
func (m *model) event(k wgroam.Key, ep netip.AddrPort, cause wgroam.Cause) {
	p := m.peers[k]
	m.clock++
	stamp, when := 10*m.clock, time.Now()
	m.events = append(m.events, func() {
		if m.peers[k] == p {
			m.view.Set(k, wgroam.Holding{Endpoint: ep, Cause: cause, At: when})
		}
		if cause.Observed() {
			m.table.Merge(record(k, ep, stamp))
		}
	})
}

func (m *model) deliver() bool {
	if len(m.events) == 0 {
		return false
	}
	e := m.events[0]
	m.events = m.events[1:]
	e()
	return true
}

func (m *model) learn(k wgroam.Key, ep netip.AddrPort) {
	if p := m.peers[k]; p != nil && p.endpoint != ep {
		p.endpoint = ep
		m.event(k, ep, wgroam.CauseData)
	}
}

func (m *model) configure(k wgroam.Key, ep netip.AddrPort) {
	if p := m.peers[k]; p != nil && p.endpoint != ep {
		p.endpoint = ep
		m.event(k, ep, wgroam.CauseConfig)
	}
}

func (m *model) SetEndpoints(_ string, eps []wg.Endpoint) error {
	if m.during != nil {
		m.during()
	}
	if m.failing {
		return errDevice
	}
	for _, e := range eps {
		m.configure(e.Peer, e.Endpoint)
	}
	return nil
}

// TestMissing: a peer that the device does not have is looked for soon, and then
// ever more rarely, until it is there; one that is gone is looked for again.
func TestMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, d, table := newApplier(t)
		var looks []time.Duration
		began := time.Now()
		a.cfg.Missing = func() { looks = append(looks, time.Since(began)) }
		run(t, a)
		want := func(what string, want ...time.Duration) {
			t.Helper()
			synctest.Wait()
			for i := range want {
				want[i] *= time.Second
			}
			if !slices.Equal(looks, want) {
				t.Errorf("%s: looked after %v, want %v", what, looks, want)
			}
			looks, began = nil, time.Now()
		}
		d.has(key(2), at(2), 0)
		table.Merge(record(key(2), at(2), 1))
		time.Sleep(time.Hour)
		want("no peer is missing")

		table.Merge(record(key(1), at(1), 1))
		time.Sleep(10 * time.Second)
		table.Merge(record(key(1), at(3), 2)) // it is known to be missing
		time.Sleep(200 * time.Second)
		want("a peer is missing", 1, 3, 7, 15, 31, 63, 127, 191)

		d.has(key(1), netip.AddrPort{}, 0)
		time.Sleep(time.Hour)
		want("it is there")

		d.mu.Lock()
		delete(d.held, key(1))
		d.mu.Unlock()
		d.view.Keep(func(k wgroam.Key) bool { return k != key(1) })
		time.Sleep(10 * time.Second)
		want("it is gone", 1, 3, 7)
		for i := range 3 {
			table.Merge(record(key(10+i), at(1), 1))
			time.Sleep(400 * time.Millisecond)
		}
		time.Sleep(2 * time.Second)
		want("more and more are missing", 1, 3)
		// Configuration management brings it back with what it knows.
		d.has(key(1), at(9), wgroam.CauseConfig)
		synctest.Wait()
		if got := d.endpoints()[key(1)]; got != at(3) {
			t.Errorf("the peer that came back is at %v, want %v", got, at(3))
		}
	})
}
