// SPDX-License-Identifier: MIT

package applier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

const (
	self  wgroam.NodeID = 1
	other wgroam.NodeID = 2
)

// askFunc is an Asker.
type askFunc func(ctx context.Context, node wgroam.NodeID, have *wgroam.Digests) ([]wgroam.Record, error)

func (f askFunc) Ask(ctx context.Context, node wgroam.NodeID, have *wgroam.Digests) iter.Seq2[feed.Update, error] {
	return func(yield func(feed.Update, error) bool) {
		records, err := f(ctx, node, have)
		for len(records) > 0 {
			n := min(len(records), 2)
			if !yield(feed.Update{Records: records[:n]}, nil) {
				return
			}
			records = records[n:]
		}
		if err != nil {
			yield(feed.Update{}, err)
		}
	}
}

func newMerger(ask askFunc) *Merger {
	return NewMerger(MergerConfig{
		Self: self, Table: wgroam.NewTable([32]byte{}), Clock: wgroam.NewClock(10 * time.Second), View: wgroam.NewView(),
		Feed: ask, VIP: []netip.Addr{netip.MustParseAddr("203.0.113.10")}, Log: quiet(),
	})
}

func update(boot, seq uint64, records ...wgroam.Record) feed.Update {
	return feed.Update{Header: feed.Header{Node: other, Boot: boot, Seq: seq}, Records: records}
}

func beat(boot, seq, digest uint64) feed.Beat {
	return feed.Beat{Header: feed.Header{Node: other, Boot: boot, Seq: seq}, Name: "gw-b", Time: time.Now(), Digest: digest}
}

// seen is a record of now.
func seen(n int) wgroam.Record {
	r := record(key(n), at(n), 0)
	r.Version.HLC = wgroam.HLCAt(time.Now())
	return r
}

func (m *Merger) sum() uint64 {
	d := m.cfg.Table.Digests()
	return d.Sum()
}

// asks reports whether the merger wants to ask the other node.
func asks(m *Merger) bool {
	if m.next() != other {
		return false
	}
	m.nodes[other].asking = false
	return true
}

// known has a merger that has heard of the other node and has no reason to ask.
func known(t *testing.T, ask askFunc) *Merger {
	t.Helper()
	m := newMerger(ask)
	m.Beat(beat(1, 0, m.sum()))
	if asks(m) {
		t.Fatal("asks a node whose table is the same")
	}
	return m
}

func TestRefused(t *testing.T) {
	now := time.Now()
	tests := map[string]struct {
		why  string
		edit func(*wgroam.Record)
	}{
		"no endpoint":  {"endpoint", func(r *wgroam.Record) { r.Endpoint = netip.AddrPort{} }},
		"port 0":       {"endpoint", func(r *wgroam.Record) { r.Endpoint = netip.AddrPortFrom(r.Endpoint.Addr(), 0) }},
		"loopback":     {"endpoint", func(r *wgroam.Record) { r.Endpoint = netip.MustParseAddrPort("127.0.0.1:1") }},
		"link-local":   {"endpoint", func(r *wgroam.Record) { r.Endpoint = netip.MustParseAddrPort("[fe80::1]:1") }},
		"virtual IP":   {"endpoint", func(r *wgroam.Record) { r.Endpoint = netip.MustParseAddrPort("203.0.113.10:1") }},
		"future":       {"skew", func(r *wgroam.Record) { r.Version.HLC = wgroam.HLCAt(now.Add(time.Minute)) }},
		"end of times": {"skew", func(r *wgroam.Record) { r.Version.HLC = ^wgroam.HLC(0) }},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMerger(nil)
			r := seen(1)
			test.edit(&r)
			m.Update(update(1, 1, r, r))
			if m.cfg.Table.Len() != 0 {
				t.Error("the table has it")
			}
			if diff := cmp.Diff(map[string]uint64{test.why: 2}, m.Refused()); diff != "" {
				t.Errorf("refused (-want +got):\n%s", diff)
			}
			// Our own clock is not led astray: what is seen here and now is not in
			// the future.
			if ahead := m.cfg.Clock.Stamp(now).Time().Sub(now); ahead > time.Second {
				t.Errorf("our clock went %v ahead", ahead)
			}
			// The good ones of the same update are taken.
			m.Update(update(1, 2, r, seen(2)))
			if _, ok := m.cfg.Table.Get(key(2)); !ok {
				t.Error("a good record beside a bad one is missing")
			}
		})
	}
}

// TestFull: strangers cannot fill the memory, nor keep out those that we serve.
func TestFull(t *testing.T) {
	m := newMerger(nil)
	const strangers = spareRecords + 10
	for i := range strangers {
		r := seen(i)
		r.Peer[5] = 7
		m.Update(update(1, uint64(i+1), r))
	}
	if n := m.cfg.Table.Len(); n != spareRecords {
		t.Errorf("%d records, want %d", n, spareRecords)
	}
	if n := m.Refused()["full"]; n != strangers-spareRecords {
		t.Errorf("%d refused, want %d", n, strangers-spareRecords)
	}
	ours := seen(1)
	m.cfg.View.Set(ours.Peer, wgroam.Holding{})
	m.Update(update(1, strangers+1, ours))
	if _, ok := m.cfg.Table.Get(ours.Peer); !ok {
		t.Error("the record of a peer of ours was refused")
	}
	// A stranger that is known already may roam.
	r := seen(3)
	r.Peer[5] = 7
	r.Endpoint, r.Version.HLC = at(77), wgroam.HLCAt(time.Now().Add(time.Second))
	m.Update(update(1, strangers+2, r))
	if got, _ := m.cfg.Table.Get(r.Peer); got != r {
		t.Errorf("record %+v, want %+v", got, r)
	}
}

// TestGap: a missing sequence number is asked for at once; repetitions, and what
// comes late, are not.
func TestGap(t *testing.T) {
	m := known(t, nil)
	for _, step := range []struct {
		seq  uint64
		want bool
	}{{1, false}, {2, false}, {2, false}, {4, true}, {3, false}, {5, false}, {5, false}, {9, true}, {10, false}} {
		m.Update(update(1, step.seq, seen(int(step.seq))))
		if got := asks(m); got != step.want {
			t.Errorf("update %d: asks %v, want %v", step.seq, got, step.want)
		}
	}
}

// TestLastMissing: nothing follows the update that went missing but a beat.
func TestLastMissing(t *testing.T) {
	m := known(t, nil)
	m.Update(update(1, 1, seen(1)))
	m.Beat(beat(1, 1, m.sum()))
	m.Beat(beat(1, 2, 42))
	if !asks(m) {
		t.Error("does not ask for the update before the beat")
	}
	// An update that brought nothing new is not missed.
	m.Beat(beat(1, 3, m.sum()))
	if asks(m) {
		t.Error("asks although the tables are the same")
	}
}

// TestReconnect: after a connection came up, the next beat decides.
func TestReconnect(t *testing.T) {
	m := known(t, nil)
	m.Up()
	m.Beat(beat(1, 0, m.sum()))
	if asks(m) {
		t.Error("asks although the tables are the same")
	}
	m.Up()
	if asks(m) {
		t.Error("asks before the beat")
	}
	m.Beat(beat(1, 0, 42))
	if !asks(m) {
		t.Error("does not ask")
	}
}

// TestFirstHeard: a node that joins asks whoever it hears first, by beat or by
// update.
func TestFirstHeard(t *testing.T) {
	m := newMerger(nil)
	m.Beat(beat(1, 7, 42))
	if !asks(m) {
		t.Error("does not ask after the first beat")
	}
	m = newMerger(nil)
	m.Update(update(1, 7, seen(1)))
	m.Beat(beat(1, 7, 42))
	if !asks(m) {
		t.Error("does not ask after the first update and beat")
	}
}

// TestNewBoot: a node that restarts counts from 1 again, and may have lost or
// found something.
func TestNewBoot(t *testing.T) {
	m := known(t, nil)
	m.Update(update(1, 1, seen(1)))
	m.Update(update(1, 2, seen(2)))
	m.Beat(beat(2, 0, 42))
	if !asks(m) {
		t.Error("does not ask a node that has restarted")
	}
	m.Update(update(2, 1, seen(3)))
	if asks(m) {
		t.Error("takes the first update for a gap")
	}
	// What is left of its former life says nothing of its present one.
	m.Update(update(1, 99, seen(4)))
	if _, ok := m.cfg.Table.Get(key(4)); !ok {
		t.Error("a late record is missing")
	}
	late := beat(1, 99, 42)
	late.Unproven = true
	m.Beat(late)
	asks(m)
	m.Update(update(2, 3, seen(5)))
	if !asks(m) {
		t.Error("does not see the gap after a late update of the former life")
	}
}

// TestRecording: beats that nobody answers for, because they were recorded in an
// earlier life of the node, are no signs of life, and say nothing of the present
// one.
func TestRecording(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMerger(func(context.Context, wgroam.NodeID, *wgroam.Digests) ([]wgroam.Record, error) {
			return nil, errors.New("no answer")
		})
		recorded := beat(9, 7, 42)
		recorded.Unproven = true
		replay := func() (asked int) {
			for range 41 {
				m.Beat(recorded)
				for asks(m) {
					asked++
					m.sync(t.Context(), other, nil)
				}
				time.Sleep(250 * time.Millisecond)
			}
			return asked
		}
		if n := replay(); n != 4 {
			t.Errorf("asked %d times in ten seconds, want 4, ever more seldom", n)
		}
		if n := m.Nodes(); len(n) != 0 {
			t.Errorf("nodes %+v", n)
		}
		// One that has answered: an earlier boot, since its clock was set back.
		m.Beat(beat(5, 3, m.sum()))
		m.Update(update(5, 4, seen(1)))
		for range 10 {
			m.Beat(recorded)
			m.Update(update(9, 8, seen(2)))
		}
		asks(m)
		m.Update(update(5, 6, seen(3)))
		if !asks(m) {
			t.Error("a recording hides a gap")
		}
		replay()
		if n := m.Nodes(); len(n) != 1 || n[0].State != NodeStale || time.Since(n[0].Heard) < 10*time.Second {
			t.Errorf("nodes %+v, want one that is stale", n)
		}
	})
}

// TestStill: digests of tables that move mean nothing; of tables that stand
// still they do, and of those that never stand still, now and then.
func TestStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const every = 250 * time.Millisecond
		m := known(t, nil)
		m.Beat(beat(1, 0, 42))
		if asks(m) {
			t.Error("asks at the first difference")
		}
		m.Beat(beat(1, 0, 42))
		if !asks(m) {
			t.Error("does not ask at the second beat of tables that stand still")
		}
		m.Beat(beat(1, 0, m.sum()))

		// Theirs moves.
		var asked []time.Duration
		began := time.Now()
		for i := range 60 {
			m.Beat(beat(1, 0, uint64(100+i)))
			if asks(m) {
				asked = append(asked, time.Since(began))
			}
			time.Sleep(every)
		}
		want := []time.Duration{churnSync + every, 2 * (churnSync + every)}
		if diff := cmp.Diff(want, asked); diff != "" {
			t.Errorf("asked while their table moved (-want +got):\n%s", diff)
		}
		m.Beat(beat(1, 0, m.sum()))

		// Ours moves.
		asked, began = nil, time.Now()
		for i := range 20 {
			m.Beat(beat(1, 0, 42))
			if asks(m) {
				asked = append(asked, time.Since(began))
			}
			m.cfg.Table.Merge(seen(i))
			time.Sleep(every)
		}
		if len(asked) != 0 {
			t.Errorf("asked while our table moved, after %v", asked)
		}
	})
}

// TestFutile: an answer without anything new is not asked for again, until one
// of the tables has changed.
func TestFutile(t *testing.T) {
	answers := 0
	m := known(t, func(context.Context, wgroam.NodeID, *wgroam.Digests) ([]wgroam.Record, error) {
		answers++
		r := seen(1)
		r.Endpoint = netip.MustParseAddrPort("127.0.0.1:1") // theirs to keep, not ours
		return []wgroam.Record{r}, nil
	})
	beats := func(digest uint64) {
		for range 5 {
			m.Beat(beat(1, 0, digest))
			for asks(m) {
				m.sync(t.Context(), other, nil)
			}
		}
	}
	for i, step := range []func(){
		func() { beats(42) },
		func() { beats(43) },
		func() { m.cfg.Table.Merge(seen(2)); beats(43) },
		func() { m.Up(); m.Beat(beat(2, 0, 44)); beats(44) },
	} {
		step()
		if answers != i+1 {
			t.Errorf("step %d: %d answers, want %d", i, answers, i+1)
		}
	}
}

// TestRefusedForNow: a record that was refused because it came from the future
// is taken when that has come.
func TestRefusedForNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := seen(1)
		r.Version.HLC = wgroam.HLCAt(time.Now().Add(30 * time.Second))
		answers := 0
		m := known(t, func(context.Context, wgroam.NodeID, *wgroam.Digests) ([]wgroam.Record, error) {
			answers++
			return []wgroam.Record{r}, nil
		})
		for range 100 {
			time.Sleep(time.Second)
			m.Beat(beat(1, 0, 42))
			if asks(m) {
				m.sync(t.Context(), other, nil)
			}
			if m.cfg.Table.Len() > 0 {
				break
			}
		}
		if m.cfg.Table.Len() == 0 {
			t.Error("the record is missing long after it stopped to be from the future")
		}
		if most := int(30*time.Second/futileFor) + 2; answers > most {
			t.Errorf("asked %d times, want %d at most", answers, most)
		}
	})
}

// TestNewsDuringAnswer: the other table gets a record of a third node while its
// answer, which has nothing new, is on the way. A beat tells of it before the
// answer ends, but it is not the table that was answered from.
func TestNewsDuringAnswer(t *testing.T) {
	var m *Merger
	news, answers := seen(3), 0
	m = known(t, func(context.Context, wgroam.NodeID, *wgroam.Digests) ([]wgroam.Record, error) {
		if answers++; answers == 1 {
			m.Beat(beat(1, 0, 43))
			return nil, nil
		}
		return []wgroam.Record{news}, nil
	})
	for _, digest := range []uint64{42, 42, 43, 43, 43} {
		m.Beat(beat(1, 0, digest))
		for asks(m) {
			m.sync(t.Context(), other, nil)
		}
	}
	if _, ok := m.cfg.Table.Get(news.Peer); !ok {
		t.Errorf("the record is missing after %d answers", answers)
	}
}

// TestAskFails: a node that does not answer is asked again at its next beat, not
// before.
func TestAskFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var (
			mu    sync.Mutex
			asked int
			fail  = true
		)
		m := known(t, func(ctx context.Context, node wgroam.NodeID, _ *wgroam.Digests) ([]wgroam.Record, error) {
			mu.Lock()
			defer mu.Unlock()
			asked++
			if node != other {
				t.Errorf("asks %v", node)
			}
			if fail {
				return []wgroam.Record{seen(asked)}, errors.New("no answer")
			}
			return []wgroam.Record{seen(100)}, nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { m.Run(ctx); close(done) }()
		m.Update(update(1, 2))
		synctest.Wait()
		time.Sleep(time.Second)
		synctest.Wait()
		mu.Lock()
		if asked != 1 {
			t.Errorf("asked %d times without a beat, want 1", asked)
		}
		mu.Unlock()
		if _, ok := m.cfg.Table.Get(key(1)); !ok {
			t.Error("what came before the error is missing")
		}
		for i := range 3 {
			m.Beat(beat(1, 2, uint64(42+i)))
			synctest.Wait()
			mu.Lock()
			if asked != i+2 {
				t.Errorf("asked %d times after %d beats, want %d", asked, i+1, i+2)
			}
			mu.Unlock()
		}
		mu.Lock()
		fail = false
		mu.Unlock()
		m.Beat(beat(1, 2, 50))
		synctest.Wait()
		m.Beat(beat(1, 2, m.sum()))
		if n := m.Nodes(); n[0].State != NodeSynced {
			t.Errorf("node %+v, want it synced", n[0])
		}
		cancel()
		<-done
	})
}

// TestManyRecordings: many names that nobody answers for keep neither an alarm from
// ending nor a node that answers from being asked.
func TestManyRecordings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const names = 12
		var mu sync.Mutex
		asked := map[wgroam.NodeID]int{}
		m := newMerger(func(_ context.Context, id wgroam.NodeID, _ *wgroam.Digests) ([]wgroam.Record, error) {
			mu.Lock()
			asked[id]++
			mu.Unlock()
			if id == other {
				return []wgroam.Record{seen(1)}, nil
			}
			time.Sleep(250 * time.Millisecond)
			return nil, errors.New("no answer")
		})
		r := seen(2)
		r.Version.HLC = wgroam.HLCAt(time.Now().Add(time.Hour))
		m.Update(update(1, 1, r))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { m.Run(ctx); close(done) }()
		const seconds = 60
		for i := range 4 * seconds {
			for n := range names {
				b := beat(1, 0, 42)
				b.Node, b.Unproven = wgroam.NodeID(10+n), true
				m.Beat(b)
			}
			if i == 4*seconds/2 {
				m.Beat(beat(2, 0, 42))
			}
			time.Sleep(250 * time.Millisecond)
		}
		cancel()
		<-done
		if m.Future() != nil {
			t.Error("the alarm has not ended")
		}
		if asked[other] != 1 {
			t.Errorf("asked the node that answers %d times, want 1", asked[other])
		}
		for id, n := range asked {
			if id != other && (n < 4 || n > 4+seconds/int(proveMost/time.Second)) {
				t.Errorf("asked %v %d times", id, n)
			}
		}
	})
}

// TestSilentNodes: nodes that say nothing when they are asked do not keep one that
// answers waiting.
func TestSilentNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const silent = 8
		began := time.Now()
		var took time.Duration
		m := newMerger(func(_ context.Context, id wgroam.NodeID, _ *wgroam.Digests) ([]wgroam.Record, error) {
			if id == other {
				took = time.Since(began)
				return []wgroam.Record{seen(1)}, nil
			}
			time.Sleep(time.Hour)
			return nil, errors.New("no answer")
		})
		for n := range silent {
			b := beat(1, 0, 42)
			b.Node = wgroam.NodeID(10 + n)
			m.Beat(b)
		}
		m.Beat(beat(1, 0, 42))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { m.Run(ctx); close(done) }()
		time.Sleep(time.Second)
		synctest.Wait()
		if took == 0 || took > silent*stalled {
			t.Errorf("asked after %v (zero: never), want %v at most", took, silent*stalled)
		}
		cancel()
		<-done
	})
}

// TestRunEnds: also in the middle of an answer that does not come.
func TestRunEnds(t *testing.T) {
	m := newMerger(func(ctx context.Context, _ wgroam.NodeID, _ *wgroam.Digests) ([]wgroam.Record, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { m.Run(ctx); close(done) }()
	m.Beat(beat(1, 0, 42))
	cancel()
	<-done
}

// TestOwnRecordComesBack: what this node said before its restart, out of the
// others' tables.
func TestOwnRecordComesBack(t *testing.T) {
	now := time.Now()
	old := wgroam.Record{
		Peer: key(1), Endpoint: at(1), Cause: wgroam.CauseData,
		Version: wgroam.Version{HLC: wgroam.HLCAt(now.Add(-time.Second)), Node: self},
	}
	tests := map[string]struct {
		held   wgroam.Holding
		edit   func(*wgroam.Record)
		wantEP netip.AddrPort
	}{
		"the session has lived on elsewhere": {
			held:   wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseSnapshot, At: now.Add(-time.Minute)},
			wantEP: at(2),
		},
		"the session has lived on in place": {
			held:   wgroam.Holding{Endpoint: at(1), Cause: wgroam.CauseSnapshot, At: now.Add(-time.Minute)},
			wantEP: at(1),
		},
		"the session is dead": {
			held:   wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseSnapshot, At: now.Add(-sessionLife - time.Second)},
			wantEP: at(1),
		},
		"somebody configured another endpoint": {
			held:   wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseConfig, At: now.Add(-time.Minute)},
			wantEP: at(1),
		},
		"another node's record": {
			held:   wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseSnapshot, At: now.Add(-time.Minute)},
			edit:   func(r *wgroam.Record) { r.Version.Node = other },
			wantEP: at(1),
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMerger(nil)
			m.cfg.View.Set(key(1), test.held)
			if test.held.Cause == wgroam.CauseSnapshot {
				m.cfg.Table.Merge(wgroam.Record{
					Peer: key(1), Endpoint: test.held.Endpoint, Cause: wgroam.CauseSnapshot,
					Version: wgroam.Version{HLC: wgroam.HLCAt(test.held.At), Node: self},
				})
			}
			r := old
			if test.edit != nil {
				test.edit(&r)
			}
			m.Update(update(1, 1, r))
			got, _ := m.cfg.Table.Get(key(1))
			if got.Endpoint != test.wantEP {
				t.Fatalf("table has %+v, want %v", got, test.wantEP)
			}
			if test.wantEP != r.Endpoint && got.Version.Compare(r.Version) <= 0 {
				t.Errorf("version %+v does not win against %+v at the others", got.Version, r.Version)
			}
			since := wgroam.Version{HLC: wgroam.HLCAt(now.Add(-500 * time.Millisecond)), Node: other}
			if got.Version.Compare(since) >= 0 {
				t.Errorf("version %+v wins against what another node saw while this one was down", got.Version)
			}
			// It comes back from every node; the answer is given once.
			m.Update(update(1, 2, r, r))
			if again, _ := m.cfg.Table.Get(key(1)); again != got {
				t.Errorf("table has %+v after a repetition, %+v before", again, got)
			}
		})
	}
}

func TestNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMerger(nil)
		if got := m.NameOf(other); got != other.String() {
			t.Errorf("name %q of a node that nobody heard", got)
		}
		state := func(want NodeState) {
			t.Helper()
			if got := m.Nodes(); len(got) != 1 || got[0].State != want {
				t.Errorf("nodes %+v, want one that is %s", got, want)
			}
		}
		b := beat(1, 0, m.sum())
		b.Time, b.Role, b.Records = time.Now().Add(3*time.Second), feed.RoleActive, 7
		m.Beat(b)
		want := []Node{{
			ID: other, Name: "gw-b", Role: feed.RoleActive, State: NodeSynced,
			Heard: time.Now(), Skew: 3 * time.Second, Records: 7,
		}}
		if diff := cmp.Diff(want, m.Nodes()); diff != "" {
			t.Errorf("nodes (-want +got):\n%s", diff)
		}
		if got := m.NameOf(other); got != "gw-b" {
			t.Errorf("name %q", got)
		}
		m.Beat(beat(1, 0, 42))
		state(NodeSyncing)
		time.Sleep(b.Silence() + time.Millisecond)
		state(NodeStale)
		slow := beat(1, 0, m.sum())
		slow.Interval = 3 * time.Second
		m.Beat(slow)
		time.Sleep(10 * time.Second)
		state(NodeSynced)
		time.Sleep(3 * time.Second)
		state(NodeStale)
		m.Beat(beat(1, 0, m.sum()))
		state(NodeSynced)
		m.Up()
		state(NodeSyncing)
	})
}

// TestMergerConcurrent is for the race detector, and for locks.
func TestMergerConcurrent(t *testing.T) {
	theirs := wgroam.NewTable([32]byte{})
	m := newMerger(func(_ context.Context, _ wgroam.NodeID, have *wgroam.Digests) ([]wgroam.Record, error) {
		return theirs.Differing(have), nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	var run, wg sync.WaitGroup
	run.Go(func() { m.Run(ctx) })
	const nodes, each = 4, 300
	for n := range nodes {
		wg.Go(func() {
			for i := range each {
				r := seen(i)
				r.Version.Node = wgroam.NodeID(10 + n)
				theirs.Merge(r)
				h := feed.Header{Node: r.Version.Node, Boot: 1, Seq: uint64(i + 1)}
				if i%3 != 0 {
					m.Update(feed.Update{Header: h, Records: []wgroam.Record{r}})
				}
				digests := theirs.Digests()
				m.Beat(feed.Beat{Header: h, Name: fmt.Sprint(n), Time: time.Now(), Digest: digests.Sum()})
				m.cfg.View.Set(r.Peer, wgroam.Holding{Endpoint: r.Endpoint, Cause: wgroam.CauseData})
				if i%50 == 0 {
					m.Up()
				}
				m.Nodes()
				m.NameOf(h.Node)
				m.Refused()
			}
		})
	}
	wg.Wait()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for theirs.Digests() != m.cfg.Table.Digests() {
		select {
		case <-deadline:
			t.Fatalf("%d records, want %d: %+v", m.cfg.Table.Len(), theirs.Len(), m.Nodes())
		case <-tick.C:
		}
		digests := theirs.Digests()
		m.Beat(feed.Beat{Header: feed.Header{Node: 10, Boot: 1, Seq: each}, Time: time.Now(), Digest: digests.Sum()})
	}
	cancel()
	run.Wait()
}

// end is one of two nodes that are joined in memory.
type end struct {
	*Merger
	id        wgroam.NodeID
	boot, seq uint64
	to        []any // messages on their way to the other end
}

// TestMergersConverge: two nodes whose messages are lost, repeated and reordered
// end up with the same table.
func TestMergersConverge(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var ends [2]*end
		failing := false
		for i := range ends {
			e := &end{id: wgroam.NodeID(10 + i), boot: 1}
			e.Merger = NewMerger(MergerConfig{
				Self: e.id, Table: wgroam.NewTable([32]byte{}), Clock: wgroam.NewClock(10 * time.Second),
				View: wgroam.NewView(), Log: quiet(),
				// What one of the two refuses must not keep the rest from it.
				VIP: []netip.Addr{at(i + 1).Addr()},
				Feed: askFunc(func(_ context.Context, _ wgroam.NodeID, have *wgroam.Digests) ([]wgroam.Record, error) {
					records := ends[1-i].cfg.Table.Differing(have)
					if failing {
						return records[:len(records)/2], errors.New("no answer")
					}
					return records, nil
				}),
			})
			ends[i] = e
		}
		draw := func(n int, what string) int { return rapid.IntRange(0, n-1).Draw(rt, what) }
		pick := func() *end { return ends[draw(2, "node")] }
		tell := func(e *end) {
			d := e.cfg.Table.Digests()
			e.to = append(e.to, feed.Beat{Header: feed.Header{Node: e.id, Boot: e.boot, Seq: e.seq}, Time: time.Now(), Digest: d.Sum()})
		}
		deliver := func(from *end, i int) {
			to := ends[0]
			if from == to {
				to = ends[1]
			}
			switch msg := from.to[i].(type) {
			case feed.Update:
				to.Update(msg)
			case feed.Beat:
				to.Beat(msg)
			}
		}
		ask := func(e *end) {
			for id := e.next(); id != 0; id = e.next() {
				e.sync(t.Context(), id, nil)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"sees a peer": func(*rapid.T) {
				e := pick()
				r := wgroam.Record{
					Peer: key(draw(5, "peer")), Endpoint: at(draw(6, "endpoint")), Cause: wgroam.CauseData,
					Version: wgroam.Version{HLC: e.cfg.Clock.Stamp(time.Now()), Node: e.id},
				}
				e.cfg.Table.Merge(r)
				e.seq++
				e.to = append(e.to, feed.Update{Header: feed.Header{Node: e.id, Boot: e.boot, Seq: e.seq}, Records: []wgroam.Record{r}})
			},
			"beats": func(*rapid.T) { tell(pick()) },
			"a message arrives": func(*rapid.T) {
				if e := pick(); len(e.to) > 0 {
					i := draw(len(e.to), "message")
					deliver(e, i)
					e.to = append(e.to[:i:i], e.to[i+1:]...)
				}
			},
			"a message arrives, and will again": func(*rapid.T) {
				if e := pick(); len(e.to) > 0 {
					deliver(e, draw(len(e.to), "message"))
				}
			},
			"a message is lost": func(*rapid.T) {
				if e := pick(); len(e.to) > 0 {
					i := draw(len(e.to), "message")
					e.to = append(e.to[:i:i], e.to[i+1:]...)
				}
			},
			"asks":                   func(*rapid.T) { ask(pick()) },
			"asks without an answer": func(*rapid.T) { failing = true; pick().syncOnce(t); failing = false },
			"restarts":               func(*rapid.T) { e := pick(); e.boot++; e.seq = 0 },
			"reconnects":             func(*rapid.T) { pick().Up() },
		})
		// From here on, nothing but beats, in good order.
		for range 4 {
			for _, e := range ends {
				e.to = nil
				tell(e)
				deliver(e, 0)
			}
			for _, e := range ends {
				ask(e)
			}
		}
		for i, e := range ends {
			for _, r := range ends[1-i].cfg.Table.Records() {
				got, ok := e.cfg.Table.Get(r.Peer)
				if r.Endpoint.Addr() == e.cfg.VIP[0] {
					continue // refused here, and rightly
				}
				if !ok || got.Version.Compare(r.Version) < 0 {
					rt.Errorf("node %d has %+v (%v), the other one %+v", i, got, ok, r)
				}
			}
		}
	})
}

// TestForeignView: two nodes, of which one has no room for all that the other keeps,
// because its device has other peers, do not ask each other for ever. What is new still
// arrives.
func TestForeignView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const more, seconds = 100, 30
		var (
			ends  [2]*Merger
			asked [2]atomic.Int64
			came  [2]atomic.Int64
		)
		for i := range ends {
			ends[i] = NewMerger(MergerConfig{
				Self: wgroam.NodeID(1 + i), Table: wgroam.NewTable([32]byte{}), Clock: wgroam.NewClock(10 * time.Second),
				View: wgroam.NewView(), Log: quiet(),
				Feed: askFunc(func(_ context.Context, _ wgroam.NodeID, have *wgroam.Digests) ([]wgroam.Record, error) {
					asked[i].Add(1)
					records := ends[1-i].cfg.Table.Differing(have)
					came[i].Add(int64(len(records)))
					return records, nil
				}),
			})
		}
		peer := func(n int) wgroam.Record {
			r := seen(1)
			r.Peer = wgroam.Key{byte(n >> 8), byte(n), 1}
			r.Version.Node = 1
			return r
		}
		for n := range spareRecords + more {
			ends[0].cfg.Table.Merge(peer(n))
			ends[0].cfg.View.Set(peer(n).Peer, wgroam.Holding{})
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for _, m := range ends {
			running.Go(func() { m.Run(ctx) })
		}
		var seq uint64
		var roamed wgroam.Record
		for beat := range 4 * seconds {
			if beat == 2*seconds {
				// A peer that both know roams, and the other node does not hear of it.
				roamed = ends[1].cfg.Table.Records()[0]
				roamed.Endpoint, roamed.Version.HLC = at(77), wgroam.HLCAt(time.Now())
				ends[0].cfg.Table.Merge(roamed)
				seq++
			}
			for i, m := range ends {
				d := m.cfg.Table.Digests()
				b := feed.Beat{Header: feed.Header{Node: wgroam.NodeID(1 + i), Boot: 1}, Name: "gw", Time: time.Now(), Digest: d.Sum()}
				if i == 0 {
					b.Seq = seq
				}
				ends[1-i].Beat(b)
			}
			time.Sleep(250 * time.Millisecond)
		}
		cancel()
		running.Wait()
		if r, _ := ends[1].cfg.Table.Get(roamed.Peer); r != roamed {
			t.Errorf("the roam has not arrived: %+v, want %+v", r, roamed)
		}
		if n := ends[1].cfg.Table.Len(); n != spareRecords {
			t.Errorf("%d records of peers that the device does not have, want %d", n, spareRecords)
		}
		for i := range ends {
			n := asked[i].Load()
			t.Logf("node %d asked %d times in %d s, and got %d records", 1+i, n, seconds, came[i].Load())
			if limit := int64(4 + seconds/int(futileFor/time.Second)); n > limit {
				t.Errorf("node %d asked %d times, want %d at most", 1+i, n, limit)
			}
		}
	})
}

// syncOnce asks once if there is reason to.
func (e *end) syncOnce(t *testing.T) {
	if id := e.next(); id != 0 {
		e.sync(t.Context(), id, nil)
	}
}

// TestFuture: records from the future raise an alarm once, for as long as they come.
func TestFuture(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		m := known(t, nil)
		m.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		refuse := func() {
			r := seen(1)
			r.Version.HLC = wgroam.HLCAt(time.Now().Add(30 * time.Second))
			m.Update(update(1, 1, r))
		}
		check := func(step string, alarm bool, lines int) {
			t.Helper()
			if err := m.Future(); errors.Is(err, wgroam.ErrSkew) != alarm || alarm && !strings.Contains(err.Error(), "gw-b") {
				t.Errorf("%s: alarm %v", step, err)
			}
			if n := strings.Count(log.String(), "\n"); n != lines {
				t.Errorf("%s: %d lines, want %d:\n%s", step, n, lines, &log)
			}
		}
		check("nothing yet", false, 0)
		for range 10 {
			refuse()
			m.calm(time.Now())
			check("they come", true, 1)
			time.Sleep(futureFor / 2)
		}
		time.Sleep(futureFor)
		m.calm(time.Now())
		check("they have stopped", false, 2)
		refuse()
		check("they come again", true, 3)
		if n := m.Refused()["skew"]; n != 11 {
			t.Errorf("%d refused, want 11", n)
		}
	})
}

// TestOtherAge: of nodes that keep records for different times, the one that refuses
// what the other has says so once.
func TestOtherAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		now, old := seen(1), seen(2)
		old.Version.HLC = wgroam.HLCAt(time.Now().Add(-2 * time.Hour))
		m := known(t, func(context.Context, wgroam.NodeID, *wgroam.Digests) ([]wgroam.Record, error) {
			return []wgroam.Record{now, old}, nil
		})
		m.cfg.Table.KeepFor(time.Hour)
		m.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		lines := func() int { return strings.Count(log.String(), "feed.max_age") }
		beats := func(d time.Duration, digest uint64) {
			for range d / feed.DefaultInterval {
				time.Sleep(feed.DefaultInterval)
				m.Beat(beat(1, 0, digest))
				if asks(m) {
					m.sync(t.Context(), other, nil)
				}
			}
		}
		beats(futileFor, 42)
		if lines() != 0 {
			t.Errorf("took an accident for a habit: %s", &log)
		}
		beats(time.Minute, 42)
		if lines() != 1 {
			t.Errorf("%d lines in a minute, want 1:\n%s", lines(), &log)
		}
	})
}

// TestFailedLines: a node that goes on to fail is not a line for every beat.
func TestFailedLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		m := known(t, func(context.Context, wgroam.NodeID, *wgroam.Digests) ([]wgroam.Record, error) {
			return nil, errors.New("no answer")
		})
		m.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		for range 3 * failedLines / feed.DefaultInterval {
			m.Beat(beat(2, 0, 42))
			if asks(m) {
				m.sync(t.Context(), other, nil)
			}
			time.Sleep(feed.DefaultInterval)
		}
		if n := strings.Count(log.String(), "sync failed"); n != 3 {
			t.Errorf("%d lines in %v, want 3", n, 3*failedLines)
		}
	})
}

// TestForget: nodes that have long been silent are forgotten.
func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := known(t, nil)
		m.forget(time.Now().Add(forgetAfter))
		if len(m.Nodes()) != 1 {
			t.Error("forgot a node that may come back")
		}
		m.forget(time.Now().Add(forgetAfter + time.Second))
		if len(m.Nodes()) != 0 {
			t.Error("remembers a node that is gone")
		}
	})
}

// TestAged: nodes forget old records at the same record, whatever their clocks say,
// and are quiet then: what one has forgotten is not asked for again.
func TestAged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const age = time.Hour
		var ends [2]*Merger
		asked := 0
		for i := range ends {
			table := wgroam.NewTable([32]byte{})
			table.KeepFor(age)
			ends[i] = NewMerger(MergerConfig{
				Self: wgroam.NodeID(10 + i), Table: table, Clock: wgroam.NewClock(10 * time.Second), View: wgroam.NewView(), Log: quiet(),
				Feed: askFunc(func(_ context.Context, _ wgroam.NodeID, have *wgroam.Digests) ([]wgroam.Record, error) {
					asked++
					return ends[1-i].cfg.Table.Differing(have), nil
				}),
			})
		}
		sees := func(i, peer int) wgroam.Record {
			r := record(key(peer), at(peer), 0)
			r.Version = wgroam.Version{HLC: wgroam.HLCAt(time.Now()), Node: ends[i].cfg.Self}
			ends[i].cfg.Table.Merge(r)
			return r
		}
		beats := func(rounds int) {
			for range rounds {
				time.Sleep(feed.DefaultInterval)
				for i, from := range ends {
					to := ends[1-i]
					to.Beat(feed.Beat{Header: feed.Header{Node: from.cfg.Self, Boot: 1}, Time: time.Now(), Digest: from.sum()})
					for id := to.next(); id != 0; id = to.next() {
						to.sync(t.Context(), id, nil)
					}
				}
			}
		}
		old := sees(0, 1)
		beats(4)
		sees(0, 2)
		beats(4)
		if n := ends[1].cfg.Table.Len(); n != 2 {
			t.Fatalf("the other one has %d records of 2", n)
		}
		time.Sleep(2 * age)
		beats(4) // nothing is new, and nothing forgotten
		if n := ends[0].cfg.Table.Len(); n != 2 {
			t.Errorf("%d records of a group that has slept, want 2", n)
		}
		sees(1, 3)
		beats(4)
		asked = 0
		beats(1000)
		for i, m := range ends {
			if records := m.cfg.Table.Records(); len(records) != 1 || records[0].Peer != key(3) || m.sum() != ends[0].sum() {
				t.Errorf("node %d has %+v, want the newest alone", i, records)
			}
			m.Restore([]wgroam.Record{old}) // as from a snapshot of long ago
			if n := m.Refused()["aged"]; n == 0 || m.cfg.Table.Len() != 1 {
				t.Errorf("node %d took an old record back", i)
			}
		}
		if asked != 0 {
			t.Errorf("asked %d times with equal tables", asked)
		}
	})
}
