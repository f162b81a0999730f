// SPDX-License-Identifier: MIT

package publisher_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/natsd"
	"github.com/wgroam/wgroam/publisher"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(patience)
	for !cond() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("not %s after %v", what, patience)
		}
	}
}

func next(t testing.TB, beats <-chan feed.Beat) feed.Beat {
	t.Helper()
	select {
	case b := <-beats:
		return b
	case <-time.After(patience):
		t.Fatalf("no beat after %v", patience)
		panic("unreachable")
	}
}

func groupKeys(t testing.TB) feed.Keys {
	t.Helper()
	k, err := feed.Derive([32]byte{8, 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func startServer(t testing.TB, addr string) *natsd.Server {
	t.Helper()
	s, err := natsd.Start(context.Background(), addr, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.AddGroup(groupKeys(t))
	t.Cleanup(s.Shutdown)
	return s
}

// node is a gateway's feed: a table, a link and a publisher. What arrives is
// merged.
type node struct {
	*feed.Link
	*publisher.Publisher
	table *wgroam.Table
	beats chan feed.Beat
	role  atomic.Uint32
	stop  func() time.Duration // asks Run to end, and waits for it
}

func startNode(t testing.TB, name string, server *natsd.Server, beat time.Duration, peers ...string) *node {
	t.Helper()
	k := groupKeys(t)
	cfg := feed.Config{Name: name, Keys: k, Peers: peers, Log: slog.New(slog.DiscardHandler)}
	if server != nil {
		cfg.Server = server
	}
	link, err := feed.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Link: link, table: wgroam.NewTable(k.DigestKey()), beats: make(chan feed.Beat, 10_000)}
	link.OnUpdate(func(u feed.Update) {
		for _, r := range u.Records {
			n.table.Merge(r)
		}
	})
	link.OnBeat(func(b feed.Beat) { n.beats <- b })
	n.Publisher = publisher.New(publisher.Config{
		Link: link, Table: n.table, Beat: beat, Log: cfg.Log,
		Role: func() feed.Role { return feed.Role(n.role.Load()) },
	})
	link.Start()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := n.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	n.stop = func() time.Duration {
		start := time.Now()
		cancel()
		wg.Wait()
		return time.Since(start)
	}
	t.Cleanup(func() { n.stop(); link.Close() })
	return n
}

func (n *node) ups(t testing.TB) {
	t.Helper()
	until(t, n.Name()+" connected", func() bool {
		return !slices.ContainsFunc(n.Status(), func(c feed.ConnStatus) bool { return !c.Connected })
	})
}

// mesh starts nodes that each have a server and connect to all others.
func mesh(t testing.TB, names ...string) []*node {
	t.Helper()
	var addrs []string
	var servers []*natsd.Server
	for range names {
		s := startServer(t, "127.0.0.1:0")
		servers, addrs = append(servers, s), append(addrs, s.Addr().String())
	}
	var nodes []*node
	for i, name := range names {
		nodes = append(nodes, startNode(t, name, servers[i], 0, slices.Delete(slices.Clone(addrs), i, i+1)...))
	}
	for _, n := range nodes {
		n.ups(t)
	}
	return nodes
}

// see merges what the kernel of this node would have reported.
func (n *node) see(peer, port, at int) {
	r := wgroam.Record{
		Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(peer >> 8), byte(peer)}), uint16(1+port%65535)),
		Cause:    wgroam.CauseData,
		Version:  wgroam.Version{HLC: wgroam.HLC(at + 1), Node: n.Self()},
	}
	binary.BigEndian.PutUint16(r.Peer[:], uint16(peer)) // the bucket
	binary.BigEndian.PutUint64(r.Peer[8:], uint64(peer))
	n.table.Merge(r)
}

func (n *node) has(want *wgroam.Table) func() bool {
	return func() bool { return n.table.Digests() == want.Digests() }
}

func (n *node) sync(t testing.TB) {
	t.Helper()
	have := n.table.Digests()
	for u, err := range n.Ask(t.Context(), 0, &have) {
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range u.Records {
			n.table.Merge(r)
		}
	}
}

func TestUpdateReachesAll(t *testing.T) {
	for _, names := range [][]string{{"gw-a", "gw-b"}, {"gw-a", "gw-b", "gw-c"}} {
		t.Run(fmt.Sprint(len(names)), func(t *testing.T) {
			nodes := mesh(t, names...)
			at := 0
			for range 10 {
				for i, from := range nodes {
					at++
					from.see(i, at, at)
					from.see(99, at, at) // a peer that all have seen
					for _, to := range nodes {
						until(t, "told "+to.Name(), to.has(from.table))
					}
				}
			}
			for _, n := range nodes {
				// Nobody repeats what he was told.
				if c := n.Counters(); c.SentRecords != 20 {
					t.Errorf("%s sent %d records, want 20", n.Name(), c.SentRecords)
				}
			}
		})
	}
}

func TestLateJoiner(t *testing.T) {
	for _, size := range []int{0, 1, 500, 10_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			s := startServer(t, "127.0.0.1:0")
			a := startNode(t, "gw-a", s, 0)
			a.ups(t)
			for i := range size {
				a.see(i, i, i)
			}
			until(t, "published", func() bool { return a.Waiting() == 0 })
			b := startNode(t, "gw-b", nil, 0, s.Addr().String())
			b.ups(t)
			start := time.Now()
			b.sync(t)
			t.Logf("%d records after %v", size, time.Since(start).Round(time.Millisecond))
			if !b.has(a.table)() {
				t.Errorf("has %d records of %d", b.table.Len(), a.table.Len())
			}
		})
	}
}

func TestStormCoalesces(t *testing.T) {
	const changes, peers = 100_000, 1000
	nodes := mesh(t, "gw-a", "gw-b")
	a, b := nodes[0], nodes[1]
	start := time.Now()
	for i := range changes {
		a.see(i%peers, i, i)
	}
	until(t, "told", b.has(a.table))
	c := a.Counters()
	t.Logf("%d changes of %d peers: %d records in %d messages, converged in %v",
		changes, peers, c.SentRecords, c.Sent, time.Since(start).Round(time.Millisecond))
	if c.SentRecords < peers || c.SentRecords > changes*9/10 {
		t.Errorf("sent %d records", c.SentRecords)
	}
	if c := b.Counters(); c.Dropped != 0 {
		t.Errorf("%d times dropped", c.Dropped)
	}
}

// TestDisconnected changes peers while nobody can be told.
func TestDisconnected(t *testing.T) {
	const changes, peers = 100_000, 1000
	s := startServer(t, "127.0.0.1:0")
	addr := s.Addr().String()
	a := startNode(t, "gw-a", nil, 0, addr)
	b := startNode(t, "gw-b", s, 0)
	a.ups(t)
	b.ups(t)
	a.see(0, 0, 0)
	until(t, "told", b.has(a.table))

	b.stop()
	b.Close()
	s.Shutdown()
	until(t, "disconnected", func() bool { return !a.Status()[0].Connected })
	sent := a.Counters().SentRecords
	for i := range changes {
		a.see(i%peers, i, i+1)
	}
	if got := a.Counters().SentRecords - sent; got != 0 {
		t.Errorf("sent %d records to nobody", got)
	}
	// Those that the flusher holds in its hands go back.
	until(t, "waiting", func() bool { return a.Waiting() == peers })

	again := startServer(t, addr)
	b = startNode(t, "gw-b", again, 0)
	until(t, "published", func() bool { return a.Waiting() == 0 })
	if got := a.Counters().SentRecords - sent; got != peers {
		t.Errorf("sent %d records, want %d", got, peers)
	}
	// The publisher may have been the first to connect.
	b.ups(t)
	b.sync(t)
	if !b.has(a.table)() {
		t.Error("tables differ")
	}
}

func TestBeats(t *testing.T) {
	const every = 20 * time.Millisecond
	s := startServer(t, "127.0.0.1:0")
	a := startNode(t, "gw-a", s, every)
	a.ups(t)
	b := startNode(t, "gw-b", nil, time.Hour, s.Addr().String())

	// A node is heard as soon as it is connected.
	if got := next(t, a.beats); got.Name != "gw-b" || got.Records != 0 {
		t.Errorf("got %+v", got)
	}

	a.role.Store(uint32(feed.RoleStandby))
	a.see(1, 1, 1)
	a.see(2, 2, 2)
	digests := a.table.Digests()
	var got feed.Beat
	until(t, "one with all in it", func() bool {
		got = next(t, b.beats)
		return got.Records == 2 && got.Role == feed.RoleStandby && got.Seq > 0
	})
	if got.Digest != digests.Sum() || got.Name != "gw-a" || got.Interval != every || time.Since(got.Time).Abs() > 5*time.Second {
		t.Errorf("got %+v", got)
	}
	first := got.Time
	const n = 25
	for range n {
		got = next(t, b.beats)
	}
	if mean := got.Time.Sub(first) / n; mean < every/2 || mean > 3*every {
		t.Errorf("%v between beats, want %v", mean, every)
	}
}

func TestLastWords(t *testing.T) {
	nodes := mesh(t, "gw-a", "gw-b")
	a, b := nodes[0], nodes[1]
	for i := range 500 { // three frames; the farewell is short
		a.see(i, i, i)
	}
	if d := a.stop(); d > time.Second {
		t.Errorf("took %v", d)
	}
	if n := a.Waiting(); n != 0 {
		t.Errorf("%d peers were left", n)
	}
	a.Close()
	until(t, "told", b.has(a.table))
}

func TestStopWithoutAnybody(t *testing.T) {
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }()
	a := startNode(t, "gw-a", nil, 0, mute.Addr().String())
	a.see(1, 1, 1)
	if d := a.stop(); d > time.Second {
		t.Errorf("took %v", d)
	}
	if a.Waiting() != 1 {
		t.Error("the peer is lost")
	}
}

// TestManyQuestions asks more often than anybody should.
func TestManyQuestions(t *testing.T) {
	s := startServer(t, "127.0.0.1:0")
	a := startNode(t, "gw-a", s, 0)
	b := startNode(t, "gw-b", nil, 0, s.Addr().String())
	a.ups(t)
	b.ups(t)
	a.see(1, 1, 1)
	const questions = 50
	var answered atomic.Int64
	start := time.Now()
	var wg sync.WaitGroup
	for range questions {
		wg.Go(func() {
			for _, err := range b.Ask(context.Background(), a.Self(), &wgroam.Digests{}) {
				if err == nil {
					answered.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n, most := answered.Load(), int64(10+1+time.Since(start)/(100*time.Millisecond)); n == 0 || n > most {
		t.Errorf("%d of %d were answered, want 1 to %d", n, questions, most)
	}
	if n := a.Counters().Requests; n != questions {
		t.Errorf("got %d requests", n)
	}
	// It is not held against it for long.
	until(t, "answered again", func() bool {
		for _, err := range b.Ask(context.Background(), a.Self(), &wgroam.Digests{}) {
			if err != nil {
				return false
			}
		}
		return true
	})
}

func BenchmarkLateJoiner(b *testing.B) {
	for _, size := range []int{1000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("records=%d", size), func(b *testing.B) {
			s := startServer(b, "127.0.0.1:0")
			from := startNode(b, "gw-a", s, 0)
			to := startNode(b, "gw-b", nil, 0, s.Addr().String())
			from.ups(b)
			to.ups(b)
			for i := range size {
				from.see(i, i, i)
			}
			until(b, "published", func() bool { return from.Waiting() == 0 && to.table.Len() == size })
			from.sync(b) // or it takes to for a recording, and answers it seldom
			for b.Loop() {
				table := wgroam.NewTable(groupKeys(b).DigestKey())
				ok := false
				for !ok { // as often as it is allowed to ask
					ok = true
					for u, err := range to.Ask(context.Background(), from.Self(), &wgroam.Digests{}) {
						if err != nil {
							ok = false
						}
						for _, r := range u.Records {
							table.Merge(r)
						}
					}
				}
				if table.Len() != size {
					b.Fatalf("got %d of %d", table.Len(), size)
				}
			}
		})
	}
}

// TestGreeting: who begins to beat hears the others at once, and so need not wait
// to ask for what it missed.
func TestGreeting(t *testing.T) {
	s := startServer(t, "127.0.0.1:0")
	a := startNode(t, "gw-a", s, time.Hour)
	a.ups(t)
	for _, name := range []string{"gw-b", "gw-c"} {
		n := startNode(t, name, nil, time.Hour, s.Addr().String())
		for next(t, n.beats).Name != "gw-a" {
		}
	}
}
