// SPDX-License-Identifier: MIT

package feed_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/natsd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

func groupKeys(t testing.TB, seed byte) feed.Keys {
	t.Helper()
	k, err := feed.Derive([32]byte{8, seed}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func startServer(t testing.TB, addr string, groups ...feed.Keys) *natsd.Server {
	t.Helper()
	s, err := natsd.Start(context.Background(), addr, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	for _, k := range groups {
		s.AddGroup(k)
	}
	return s
}

// node is a Link with everything that comes out of it.
type node struct {
	*feed.Link
	updates  chan feed.Update
	beats    chan feed.Beat
	requests chan *feed.Request
	events   chan feed.Event
	log      *lines
}

func startNode(t testing.TB, cfg feed.Config) *node {
	t.Helper()
	n := &node{
		updates:  make(chan feed.Update, 1000),
		beats:    make(chan feed.Beat, 1000),
		requests: make(chan *feed.Request, 1000),
		events:   make(chan feed.Event, 1000),
		log:      &lines{},
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(n.log, nil))
	}
	l, err := feed.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.Link = l
	l.OnUpdate(func(u feed.Update) { n.updates <- u })
	l.OnBeat(func(b feed.Beat) { n.beats <- b })
	l.OnRequest(func(r *feed.Request) { n.requests <- r })
	l.OnEvent(func(e feed.Event) { n.events <- e })
	l.Start()
	t.Cleanup(l.Close)
	return n
}

// ups waits until all connections of the node are up.
func (n *node) ups(t testing.TB) {
	t.Helper()
	until(t, n.Name()+" connected", func() bool {
		return !slices.ContainsFunc(n.Status(), func(c feed.ConnStatus) bool { return !c.Connected })
	})
}

// mesh starts nodes that each have a server and connect to all others.
func mesh(t testing.TB, k feed.Keys, names ...string) []*node {
	t.Helper()
	servers := make([]*natsd.Server, len(names))
	addrs := make([]string, len(names))
	for i := range names {
		servers[i] = startServer(t, "127.0.0.1:0", k)
		addrs[i] = servers[i].Addr().String()
	}
	nodes := make([]*node, len(names))
	for i, name := range names {
		peers := slices.Delete(slices.Clone(addrs), i, i+1)
		nodes[i] = startNode(t, feed.Config{Name: name, Keys: k, Server: servers[i], Peers: peers})
	}
	for _, n := range nodes {
		n.ups(t)
	}
	return nodes
}

// until waits for a condition.
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

func next[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("no %s after %v", what, patience)
		panic("unreachable")
	}
}

type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// with returns the lines that contain text.
func (l *lines) with(text string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for line := range strings.Lines(l.b.String()) {
		if strings.Contains(line, text) {
			out = append(out, line)
		}
	}
	return out
}

func record(i int, by wgroam.NodeID) wgroam.Record {
	r := wgroam.Record{
		Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 51820),
		Cause:    wgroam.CauseData,
		Version:  wgroam.Version{HLC: wgroam.HLC(i + 1), Node: by},
	}
	binary.BigEndian.PutUint16(r.Peer[:], uint16(i)) // the bucket
	binary.BigEndian.PutUint64(r.Peer[8:], uint64(i))
	return r
}

func fill(table *wgroam.Table, n int, by wgroam.NodeID) {
	for i := range n {
		table.Merge(record(i, by))
	}
}

var sameRecord = cmp.Comparer(func(a, b wgroam.Record) bool { return a == b })

func TestMesh(t *testing.T) {
	for _, names := range [][]string{{"gw-a", "gw-b"}, {"gw-a", "gw-b", "gw-c"}} {
		t.Run(fmt.Sprint(len(names)), func(t *testing.T) {
			nodes := mesh(t, groupKeys(t, 1), names...)
			for i, from := range nodes {
				for seq := uint64(1); seq <= 2; seq++ {
					want := []wgroam.Record{record(i, from.Self()), record(i+100, from.Self())}[:seq]
					if err := from.Publish(want); err != nil {
						t.Fatal(err)
					}
					now := time.Now()
					if err := from.Beat(feed.Beat{Time: now, Role: feed.RoleActive, Digest: 7, Records: 2}); err != nil {
						t.Fatal(err)
					}
					for _, to := range nodes {
						if to == from {
							continue
						}
						got := next(t, "update", to.updates)
						if diff := cmp.Diff(want, got.Records, sameRecord); diff != "" {
							t.Errorf("(-want +got)\n%s", diff)
						}
						if got.Node != from.Self() || got.Seq != seq || got.Boot == 0 {
							t.Errorf("got %+v, want seq %d of %v", got.Header, seq, from.Self())
						}
						b := next(t, "beat", to.beats)
						wantBeat := feed.Beat{
							Header: got.Header, Number: seq, Unproven: true, Name: from.Name(), Time: time.Unix(0, now.UnixNano()),
							Role: feed.RoleActive, Digest: 7, Records: 2, MinVersion: 1, MaxVersion: 1,
						}
						if b != wantBeat {
							t.Errorf("got %+v, want %+v", b, wantBeat)
						}
					}
				}
			}
			for _, n := range nodes {
				if len(n.updates)+len(n.beats) > 0 {
					t.Errorf("%s got more than there was", n.Name())
				}
				c := n.Counters()
				others := uint64(len(nodes) - 1)
				want := feed.Counters{Sent: 4, SentRecords: 3, Updates: 2 * others, Records: 3 * others, Beats: 2 * others}
				want.Traffic = feed.Traffic{FramesSent: 4, BytesSent: c.BytesSent, FramesReceived: 4 * others, BytesReceived: c.BytesSent * others}
				if c.BytesSent == 0 {
					t.Errorf("%s: no bytes counted", n.Name())
				}
				if c != want {
					t.Errorf("%s: counters %+v, want %+v", n.Name(), c, want)
				}
			}
		})
	}
}

// TestWithoutServer has one node without a server among two that have one: it
// publishes on both.
func TestWithoutServer(t *testing.T) {
	k := groupKeys(t, 1)
	sa, sb := startServer(t, "127.0.0.1:0", k), startServer(t, "127.0.0.1:0", k)
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, Server: sa, Peers: []string{sb.Addr().String()}})
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, Server: sb})
	c := startNode(t, feed.Config{Name: "gw-c", Keys: k, Peers: []string{sa.Addr().String(), sb.Addr().String()}})
	for _, n := range []*node{a, b, c} {
		n.ups(t)
	}
	for _, from := range []*node{a, b, c} {
		if err := from.Publish([]wgroam.Record{record(1, from.Self())}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		to   *node
		want []wgroam.NodeID
	}{
		// a hears c on its own server and on b's.
		{a, []wgroam.NodeID{b.Self(), c.Self(), c.Self()}},
		// b connects to nobody, so it does not hear a.
		{b, []wgroam.NodeID{c.Self()}},
		{c, []wgroam.NodeID{a.Self(), b.Self()}},
	} {
		var got []wgroam.NodeID
		for range tc.want {
			got = append(got, next(t, "update for "+tc.to.Name(), tc.to.updates).Node)
		}
		slices.Sort(got)
		slices.Sort(tc.want)
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tc.to.Name(), diff)
		}
	}
}

func TestAlone(t *testing.T) {
	n := startNode(t, feed.Config{Name: "gw-a", Keys: groupKeys(t, 1)})
	if err := n.Publish([]wgroam.Record{record(1, n.Self())}); !errors.Is(err, feed.ErrNoLink) {
		t.Errorf("publish: %v", err)
	}
	if err := n.Beat(feed.Beat{}); !errors.Is(err, feed.ErrNoLink) {
		t.Errorf("beat: %v", err)
	}
	for _, err := range n.Ask(t.Context(), 0, &wgroam.Digests{}) {
		if !errors.Is(err, feed.ErrNoLink) {
			t.Errorf("ask: %v", err)
		}
	}
	if err := n.Flush(t.Context()); err != nil {
		t.Errorf("flush: %v", err)
	}
	if n.Status() == nil || len(n.Status()) != 0 {
		t.Errorf("status: %v", n.Status())
	}
}

// serve answers requests from a table.
func (n *node) serve(t testing.TB, table *wgroam.Table) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case r := <-n.requests:
				if _, err := n.Answer(ctx, r, table.Differing(&r.Have)); err != nil && ctx.Err() == nil {
					t.Errorf("answer: %v", err)
				}
			}
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// beatTo sends beats until to has got one.
func (n *node) beatTo(t testing.TB, to *node, records uint32) {
	t.Helper()
	until(t, n.Name()+" heard by "+to.Name(), func() bool {
		if err := n.Beat(feed.Beat{Records: records}); err != nil {
			t.Fatal(err)
		}
		select {
		case b := <-to.beats:
			return b.Node == n.Self()
		case <-time.After(50 * time.Millisecond):
			return false
		}
	})
}

func (n *node) sync(ctx context.Context, who wgroam.NodeID, table *wgroam.Table) (got int, err error) {
	have := table.Digests()
	for u, err := range n.Ask(ctx, who, &have) {
		if err != nil {
			return got, err
		}
		for _, r := range u.Records {
			table.Merge(r)
		}
		got += len(u.Records)
	}
	return got, nil
}

func TestAsk(t *testing.T) {
	const size = 10_000
	k := groupKeys(t, 1)
	nodes := mesh(t, k, "gw-a", "gw-b")
	full := wgroam.NewTable(k.DigestKey())
	fill(full, size, nodes[0].Self())
	nodes[0].serve(t, full)
	nodes[0].beatTo(t, nodes[1], size)
	mine := wgroam.NewTable(k.DigestKey())

	start := time.Now()
	got, err := nodes[1].sync(t.Context(), 0, mine)
	if err != nil || got != size || mine.Digests() != full.Digests() {
		t.Fatalf("empty table: got %d records, %v", got, err)
	}
	t.Logf("%d records in %v", size, time.Since(start).Round(time.Millisecond))

	if got, err := nodes[1].sync(t.Context(), nodes[0].Self(), mine); err != nil || got != 0 {
		t.Errorf("equal tables: got %d records, %v", got, err)
	}

	full.Merge(record(size, nodes[0].Self()))
	if got, err := nodes[1].sync(t.Context(), nodes[0].Self(), mine); err != nil || got < 1 || got > 100 || mine.Digests() != full.Digests() {
		t.Errorf("one record more: got %d records, %v", got, err)
	}

	have := wgroam.Digests{}
	for u, err := range nodes[1].Ask(t.Context(), 0, &have) {
		if err != nil || u.Node != nodes[0].Self() || len(u.Records) != feed.MaxRecords || u.Seq != 1 {
			t.Errorf("first piece: %+v, %v", u.Header, err)
		}
		break // enough
	}
	if c := nodes[1].Counters(); c.Auth+c.Malformed+c.Type+c.Dropped != 0 {
		t.Errorf("counters %+v", c)
	}
}

// TestAskEveryWay asks over own and foreign servers, heard and unheard.
func TestAskEveryWay(t *testing.T) {
	k := groupKeys(t, 1)
	s := startServer(t, "127.0.0.1:0", k)
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, Server: s})
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, Peers: []string{s.Addr().String()}})
	a.ups(t)
	b.ups(t)
	full := wgroam.NewTable(k.DigestKey())
	fill(full, 3, a.Self())
	a.serve(t, full)
	b.serve(t, full)
	for range 2 {
		for _, pair := range [][2]*node{{a, b}, {b, a}} {
			for _, who := range []wgroam.NodeID{0, pair[1].Self()} {
				if got, err := pair[0].sync(t.Context(), who, wgroam.NewTable(k.DigestKey())); err != nil || got != 3 {
					t.Errorf("%s asks %v: %d, %v", pair[0].Name(), who, got, err)
				}
			}
		}
		a.beatTo(t, b, 3)
		b.beatTo(t, a, 3)
	}
}

func TestAskFallsBack(t *testing.T) {
	k := groupKeys(t, 1)
	nodes := mesh(t, k, "gw-a", "gw-b", "gw-c")
	table := wgroam.NewTable(k.DigestKey())
	fill(table, 5, nodes[1].Self())
	nodes[1].serve(t, table)
	nodes[1].beatTo(t, nodes[0], 5)
	nodes[2].beatTo(t, nodes[0], 9) // is asked first, and never answers

	start := time.Now()
	mine := wgroam.NewTable(k.DigestKey())
	if got, err := nodes[0].sync(t.Context(), 0, mine); err != nil || got != 5 {
		t.Errorf("got %d records, %v", got, err)
	}
	if d := time.Since(start); d < 200*time.Millisecond || d > 2*time.Second {
		t.Errorf("took %v", d)
	}
	if r := next(t, "request", nodes[2].requests); r.Node != nodes[0].Self() || r.Seq != 1 {
		t.Errorf("got %+v", r.Header)
	}
	if _, err := nodes[0].sync(t.Context(), nodes[2].Self(), mine); !errors.Is(err, feed.ErrNoAnswer) {
		t.Errorf("a node that does not answer: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := nodes[0].sync(ctx, nodes[2].Self(), mine); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestPeerDownAndUp(t *testing.T) {
	k := groupKeys(t, 1)
	sa := startServer(t, "127.0.0.1:0", k)
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, Server: sa})
	if e := next(t, "event", a.events); e != (feed.Event{Conn: "own", Up: true}) {
		t.Errorf("got %+v", e)
	}
	addr := sa.Addr().String()
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, Peers: []string{addr}})
	if e := next(t, "event", b.events); e != (feed.Event{Conn: addr, Up: true}) {
		t.Errorf("got %+v", e)
	}
	since := b.Status()[0].Since
	for range 2 {
		a.Close()
		sa.Shutdown()
		e := next(t, "event", b.events)
		if e.Conn != addr || e.Up || e.Err == nil {
			t.Errorf("got %+v", e)
		}
		if err := b.Publish([]wgroam.Record{record(1, b.Self())}); !errors.Is(err, feed.ErrNoLink) {
			t.Errorf("publish: %v", err)
		}
		until(t, "refused", func() bool { return strings.Contains(b.Status()[0].LastError, "connection refused") })
		st := b.Status()[0]
		if st.Connected || !st.Since.After(since) || st.Name != addr || st.URL != "nats://"+addr {
			t.Errorf("status %+v", st)
		}
		sa = startServer(t, addr, k)
		a = startNode(t, feed.Config{Name: "gw-a", Keys: k, Server: sa})
		if e := next(t, "event", b.events); e != (feed.Event{Conn: addr, Up: true}) {
			t.Errorf("got %+v", e)
		}
		if st := b.Status()[0]; !st.Connected || !st.Since.After(since) {
			t.Errorf("status %+v", st)
		}
		a.ups(t)
		if err := b.Publish([]wgroam.Record{record(1, b.Self())}); err != nil {
			t.Error(err)
		}
		next(t, "update", a.updates)
	}
	if got := b.log.with("WARN"); len(got) != 2 {
		t.Errorf("two breaks are %d lines: %v", len(got), got)
	}
}

// TestUnreachablePeers has peers that are not there, in all the ways a peer can
// be not there. None may hold up the others.
func TestUnreachablePeers(t *testing.T) {
	k := groupKeys(t, 1)
	s := startServer(t, "127.0.0.1:0", k)
	stranger := startServer(t, "127.0.0.1:0", groupKeys(t, 2))
	mute, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = gone.Close()
	plain := startNATS(t, &server.Options{})

	peers := []string{
		mute.Addr().String(), gone.Addr().String(), stranger.Addr().String(), plain.Addr().String(),
		s.Addr().String(),
	}
	begin := time.Now()
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, Peers: peers})
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, Server: s})
	b.ups(t)
	if e := next(t, "event", a.events); !e.Up || e.Conn != s.Addr().String() {
		t.Errorf("got %+v", e)
	}
	if d := time.Since(begin); d > 1500*time.Millisecond {
		t.Errorf("connected after %v", d)
	}
	if err := a.Publish([]wgroam.Record{record(1, a.Self())}); err != nil {
		t.Error(err)
	}
	next(t, "update", b.updates)

	for i, want := range []string{
		"no TLS there", "connection refused", "does not know this group", "TLS", "",
	} {
		until(t, "an error for "+peers[i], func() bool {
			begin := time.Now()
			st := a.Status()[i]
			if d := time.Since(begin); d > time.Second {
				t.Fatalf("Status took %v", d)
			}
			return strings.Contains(st.LastError, want)
		})
		t.Log(a.Status()[i].LastError)
	}
	// Long enough for each to be tried again many times.
	for range 20 {
		if err := b.Beat(feed.Beat{}); err != nil {
			t.Fatal(err)
		}
		next(t, "beat", a.beats)
		<-time.After(20 * time.Millisecond)
	}
	for _, p := range peers {
		if got := a.log.with("conn=" + p); len(got) != 1 {
			t.Errorf("%s: %d lines: %v", p, len(got), got)
		}
	}
	begin = time.Now()
	a.Close()
	if d := time.Since(begin); d > time.Second {
		t.Errorf("Close took %v", d)
	}
}

func startNATS(t testing.TB, opts *server.Options) *server.Server {
	t.Helper()
	opts.Host, opts.Port = "127.0.0.1", server.RANDOM_PORT
	opts.NoLog, opts.NoSigs = true, true
	return runNATS(t, opts)
}

func runNATS(t testing.TB, opts *server.Options) *server.Server {
	t.Helper()
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(patience) {
		t.Fatal("nats-server is not ready")
	}
	return s
}

// TestGarbage has a client on the bus that has not the key.
func TestGarbage(t *testing.T) {
	k := groupKeys(t, 1)
	s := startNATS(t, &server.Options{})
	ext := feed.External{URL: s.ClientURL()}
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: ext})
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, External: ext})
	a.ups(t)
	b.ups(t)
	mallory, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer mallory.Close()
	wire, err := mallory.SubscribeSync("wgroam.v1." + k.Group() + ".>")
	if err != nil {
		t.Fatal(err)
	}
	if err := mallory.Flush(); err != nil {
		t.Fatal(err)
	}
	prefix := "wgroam.v1." + k.Group() + "."

	// What is genuine comes through, and its like on the wire says nothing.
	rec := record(1, a.Self())
	if err := errors.Join(a.Publish([]wgroam.Record{rec}), a.Beat(feed.Beat{})); err != nil {
		t.Fatal(err)
	}
	next(t, "update", b.updates)
	next(t, "beat", b.beats)
	var frames []*nats.Msg
	for range 2 {
		m, err := wire.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(m.Data, rec.Peer[:8]) || bytes.Contains(m.Data, rec.Endpoint.Addr().AsSlice()) || bytes.Contains(m.Data, []byte("gw-a")) {
			t.Errorf("readable on the bus: %x", m.Data)
		}
		frames = append(frames, m)
	}
	update, beat := frames[0], frames[1]
	before := b.Counters()

	post := func(subject, reply string, data []byte) {
		t.Helper()
		if err := mallory.PublishMsg(&nats.Msg{Subject: subject, Reply: reply, Data: data}); err != nil {
			t.Fatal(err)
		}
	}
	flip := func(m *nats.Msg, at int) []byte {
		d := bytes.Clone(m.Data)
		d[at] ^= 1
		return d
	}
	post(update.Subject, "", nil)                              // short
	post(update.Subject, "", update.Data[:75])                 // short
	post(update.Subject, "", []byte(strings.Repeat("A", 500))) // version
	post(update.Subject, "", flip(update, 0))                  // version
	post(update.Subject, "", flip(update, 6))                  // key id
	post(update.Subject, "", flip(update, 20))                 // auth: another boot
	post(update.Subject, "", flip(update, 100))                // auth: another record
	post(update.Subject, "", update.Data[:len(update.Data)-1]) // auth
	post(update.Subject, "", beat.Data)                        // type
	post(beat.Subject, "", update.Data)                        // type
	post(prefix+"u.0000000000000000", "", update.Data)         // auth: another writer
	post(prefix+"x.y", "", update.Data)                        // type: no such subject
	post(prefix+"q", prefix+"r.x.y", update.Data)              // type
	post(prefix+"q", "", nil)                                  // short
	post(prefix+"whatever", "", update.Data)                   // not even looked at
	want := before
	want.Short, want.Version, want.KeyID, want.Auth, want.Type = 3, 2, 1, 4, 4
	until(t, "all counted", func() bool {
		got := b.Counters()
		got.Traffic = want.Traffic
		return got == want || t.Failed()
	})

	// A recording comes through again: the table knows better. Ours comes back
	// to us, and stays out.
	post(update.Subject, "", update.Data)
	if u := next(t, "update", b.updates); u.Records[0] != rec {
		t.Errorf("got %+v", u)
	}
	until(t, "our echo counted", func() bool { return a.Counters().OwnEcho == 1 })
	if len(a.updates)+len(b.updates)+len(b.beats)+len(b.requests) != 0 {
		t.Error("something came through that should not have")
	}
	if got := b.log.with("refused a message"); len(got) != 1 {
		t.Errorf("%d lines: %v", len(got), got)
	}
}

// TestForgedAnswers has answers on the bus that belong to another request.
func TestForgedAnswers(t *testing.T) {
	k := groupKeys(t, 1)
	s := startNATS(t, &server.Options{})
	ext := feed.External{URL: s.ClientURL()}
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: ext})
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, External: ext})
	a.ups(t)
	b.ups(t)
	mallory, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer mallory.Close()
	prefix := "wgroam.v1." + k.Group() + "."
	answers, err := mallory.SubscribeSync(prefix + "r.>")
	if err != nil {
		t.Fatal(err)
	}
	asked, err := mallory.SubscribeSync(prefix + "q")
	if err != nil {
		t.Fatal(err)
	}
	if err := mallory.Flush(); err != nil {
		t.Fatal(err)
	}

	ask := func() chan error {
		done := make(chan error, 1)
		go func() {
			_, err := b.sync(context.Background(), a.Self(), wgroam.NewTable(k.DigestKey()))
			done <- err
		}()
		return done
	}
	first := ask()
	r := next(t, "request", a.requests)
	if _, err := a.Answer(t.Context(), r, []wgroam.Record{record(1, a.Self())}); err != nil {
		t.Fatal(err)
	}
	if err := next(t, "end", first); err != nil {
		t.Fatal(err)
	}
	old, err := answers.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	oldRequest, err := asked.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	// The answer to the first request is given to the second.
	second := ask()
	m, err := asked.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if err := mallory.Publish(m.Reply, old.Data); err != nil {
		t.Fatal(err)
	}
	if err := next(t, "end", second); !errors.Is(err, feed.ErrNoAnswer) {
		t.Errorf("got %v", err)
	}
	if c := b.Counters(); c.Auth != 1 {
		t.Errorf("counters %+v", c)
	}
	next(t, "request", a.requests)
	// A request is sent again with another address for the answer, which goes
	// where the request itself says.
	if err := mallory.PublishRequest(prefix+"q", prefix+"r.mallory", oldRequest.Data); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Answer(t.Context(), next(t, "request", a.requests), nil); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{m.Reply, oldRequest.Reply} { // the forged one was seen here, too
		if got, err := answers.NextMsg(patience); err != nil || got.Subject != want {
			t.Errorf("answer on %v, %v, want %s", got, err, want)
		}
	}
}

// TestReplayedBeats has a client on the bus that keeps the beats of a node and plays
// them back, to one that has heard them and to one that has not.
func TestReplayedBeats(t *testing.T) {
	k := groupKeys(t, 1)
	s := startNATS(t, &server.Options{})
	ext := feed.External{URL: s.ClientURL()}
	start := func(name string) *node {
		n := startNode(t, feed.Config{Name: name, Keys: k, External: ext})
		n.ups(t)
		return n
	}
	table := wgroam.NewTable(k.DigestKey())
	a, b := start("gw-a"), start("gw-b")
	a.serve(t, table)
	mallory, err := nats.Connect(s.ClientURL(), nats.NoEcho())
	if err != nil {
		t.Fatal(err)
	}
	defer mallory.Close()
	tap, err := mallory.SubscribeSync("wgroam.v1." + k.Group() + ".b." + a.Self().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := mallory.Flush(); err != nil {
		t.Fatal(err)
	}
	var tape []*nats.Msg
	says := func(from, to *node, unproven bool) {
		t.Helper()
		if err := from.Beat(feed.Beat{}); err != nil {
			t.Fatal(err)
		}
		if got := next(t, "beat", to.beats); got.Node != from.Self() || got.Unproven != unproven {
			t.Errorf("got %+v, want unproven %v", got, unproven)
		}
		m, err := tap.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		tape = append(tape, m)
	}
	replay := func() {
		for _, m := range tape {
			if err := mallory.Publish(m.Subject, m.Data); err != nil {
				t.Fatal(err)
			}
		}
		if err := mallory.Flush(); err != nil {
			t.Fatal(err)
		}
	}

	says(a, b, true)
	says(a, b, true)
	if _, err := b.sync(t.Context(), a.Self(), table); err != nil {
		t.Fatal(err)
	}
	says(a, b, false)
	for i := range tape {
		replay()
		until(t, "refused", func() bool { return b.Counters().Old == uint64((i+1)*len(tape)) })
	}
	says(a, b, false)
	a.Close()

	c := start("gw-c")
	replay()
	for range tape {
		if got := next(t, "beat", c.beats); !got.Unproven {
			t.Errorf("took a recording for a sign of life: %+v", got)
		}
	}
	if _, err := c.sync(t.Context(), a.Self(), table); !errors.Is(err, feed.ErrNoAnswer) {
		t.Errorf("a dead node: %v", err)
	}

	// It starts again, and is not mistaken for what it was.
	a = start("gw-a")
	a.serve(t, table)
	says(a, b, true)
	if _, err := b.sync(t.Context(), a.Self(), table); err != nil {
		t.Fatal(err)
	}
	replay()
	for got := next(t, "beat", b.beats); got.Number < uint64(len(tape)-1); got = next(t, "beat", b.beats) {
		if !got.Unproven {
			t.Errorf("took the former life for the present: %+v", got)
		}
	}
	says(a, b, false)
}

func TestNameClash(t *testing.T) {
	k := groupKeys(t, 1)
	s := startNATS(t, &server.Options{})
	ext := feed.External{URL: s.ClientURL()}
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: ext})
	b := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: ext})
	a.ups(t)
	b.ups(t)
	for range 3 {
		if err := a.Beat(feed.Beat{}); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "noticed", func() bool { return b.Counters().NameClash == 3 })
	if got := b.log.with(`give each node its own name`); len(got) != 1 {
		t.Errorf("%d lines: %v", len(got), got)
	}
	if len(b.beats) != 0 {
		t.Error("took the other for somebody else")
	}
}

func TestTwoGroupsOnOneServer(t *testing.T) {
	k1, k2 := groupKeys(t, 1), groupKeys(t, 2)
	s := startServer(t, "127.0.0.1:0", k1)
	addr := []string{s.Addr().String()}
	a1 := startNode(t, feed.Config{Name: "gw-a", Keys: k1, Server: s})
	b1 := startNode(t, feed.Config{Name: "gw-b", Keys: k1, Peers: addr})
	b2 := startNode(t, feed.Config{Name: "gw-b", Keys: k2, Peers: addr})
	a1.ups(t)
	b1.ups(t)
	until(t, "refused", func() bool { return strings.Contains(b2.Status()[0].LastError, "does not know this group") })
	s.AddGroup(k2) // its device appears
	a2 := startNode(t, feed.Config{Name: "gw-a", Keys: k2, Server: s})
	a2.ups(t)
	b2.ups(t)
	for _, p := range [][2]*node{{a1, b1}, {b2, a2}, {b1, a1}, {a2, b2}} {
		if err := p[0].Publish([]wgroam.Record{record(1, p[0].Self())}); err != nil {
			t.Fatal(err)
		}
		next(t, "update", p[1].updates)
	}
	for _, n := range []*node{a1, a2, b1, b2} {
		if len(n.updates) != 0 {
			t.Error("heard another group")
		}
	}
}

// TestExternal connects in the ways that a configuration can name.
func TestExternal(t *testing.T) {
	k := groupKeys(t, 1)
	only := &server.SubjectPermission{Allow: []string{"wgroam.v1." + k.Group() + ".>"}}
	s := startNATS(t, &server.Options{Users: []*server.User{
		{Username: "wgroam", Password: "sesame", Permissions: &server.Permissions{Publish: only, Subscribe: only}},
		{Username: "other", Password: "sesame", Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Deny: []string{">"}}, Subscribe: &server.SubjectPermission{Deny: []string{">"}},
		}},
	}})
	addr := s.Addr().String()
	home := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", home)
	dir := filepath.Join(home, "nats", "context")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"hq":    `{"description": "x", "url": "nats://` + addr + `", "user": "wgroam", "password": "sesame", "inbox_prefix": ""}`,
		"empty": `{}`,
		"bad":   `{`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name+".json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: feed.External{
		// The first of the servers is down.
		URL: "nats://127.0.0.1:1, nats://wgroam:sesame@" + addr,
	}})
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, External: feed.External{Context: "hq"}})
	a.ups(t)
	b.ups(t)
	if st := a.Status()[0]; st.Name != "nats" || st.URL != "nats://127.0.0.1:1,nats://"+addr {
		t.Errorf("status %+v", st)
	}
	if err := a.Publish([]wgroam.Record{record(1, a.Self())}); err != nil {
		t.Fatal(err)
	}
	next(t, "update", b.updates)
	table := wgroam.NewTable(k.DigestKey())
	fill(table, 1, a.Self())
	a.serve(t, table)
	if got, err := b.sync(t.Context(), a.Self(), wgroam.NewTable(k.DigestKey())); err != nil || got != 1 {
		t.Errorf("ask with the least permissions: %d, %v", got, err)
	}

	c := startNode(t, feed.Config{Name: "gw-c", Keys: k, External: feed.External{URL: "nats://wgroam:wrong@" + addr}})
	until(t, "refused", func() bool { return strings.Contains(c.Status()[0].LastError, "Authorization Violation") })
	d := startNode(t, feed.Config{Name: "gw-d", Keys: k, External: feed.External{URL: "nats://other:sesame@" + addr}})
	d.ups(t)
	until(t, "forbidden", func() bool { return len(d.log.with("allow publish and subscribe on wgroam.v1."+k.Group()+".>")) == 1 })

	for name, tc := range map[string]struct {
		cfg  feed.Config
		want string
	}{
		"no such context":     {feed.Config{External: feed.External{Context: "nope"}}, "nats context ls"},
		"context of a path":   {feed.Config{External: feed.External{Context: "../x"}}, "not a path"},
		"context without url": {feed.Config{External: feed.External{Context: "empty"}}, "no url"},
		"malformed context":   {feed.Config{External: feed.External{Context: "bad"}}, "bad.json"},
		"no such creds":       {feed.Config{External: feed.External{URL: addr, Creds: "/nonexistent"}}, "/nonexistent"},
		"no such nkey":        {feed.Config{External: feed.External{URL: addr, NKey: "/nonexistent"}}, "/nonexistent"},
		"no such ca":          {feed.Config{External: feed.External{URL: addr, CA: "/nonexistent"}}, "/nonexistent"},
		"no such cert":        {feed.Config{External: feed.External{URL: addr, Cert: "/nonexistent", Key: "/nonexistent"}}, "/nonexistent"},
		"cert without key":    {feed.Config{External: feed.External{URL: addr, Cert: "/nonexistent"}}, "set both"},
		"creds and nkey":      {feed.Config{External: feed.External{URL: addr, Creds: os.Args[0], NKey: os.Args[0]}}, "remove one"},
		"peers and url":       {feed.Config{External: feed.External{URL: addr}, Peers: []string{addr}}, "remove"},
		"peer without port":   {feed.Config{Peers: []string{"10.0.0.1"}}, "host:port"},
		"long name":           {feed.Config{Name: strings.Repeat("x", 65)}, "64 bytes"},
	} {
		if tc.cfg.Name == "" {
			tc.cfg.Name = "gw-x"
		}
		tc.cfg.Keys = k
		if _, err := feed.New(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q in it", name, err, tc.want)
		}
	}
}

// TestSupercluster has a node in each of two clusters, with a gateway between.
func TestSupercluster(t *testing.T) {
	k := groupKeys(t, 1)
	east := startNATS(t, &server.Options{Gateway: server.GatewayOpts{Name: "east", Host: "127.0.0.1", Port: -1}})
	remote := &server.RemoteGatewayOpts{Name: "east", URLs: []*url.URL{{Scheme: "nats", Host: east.GatewayAddr().String()}}}
	west := startNATS(t, &server.Options{Gateway: server.GatewayOpts{
		Name: "west", Host: "127.0.0.1", Port: -1, Gateways: []*server.RemoteGatewayOpts{remote},
	}})
	until(t, "joined", func() bool { return east.NumOutboundGateways() == 1 && west.NumOutboundGateways() == 1 })
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, External: feed.External{URL: east.ClientURL()}})
	b := startNode(t, feed.Config{Name: "gw-b", Keys: k, External: feed.External{URL: west.ClientURL()}})
	a.ups(t)
	b.ups(t)
	full := wgroam.NewTable(k.DigestKey())
	fill(full, 1000, a.Self())
	a.serve(t, full)
	a.beatTo(t, b, 1000)
	if got, err := b.sync(t.Context(), a.Self(), wgroam.NewTable(k.DigestKey())); err != nil || got != 1000 {
		t.Errorf("got %d, %v", got, err)
	}
	if c := a.Counters(); c.Malformed != 0 {
		t.Errorf("counters %+v", c)
	}
}

// TestSilence cuts a connection so that neither end is told.
func TestSilence(t *testing.T) {
	k := groupKeys(t, 1)
	s := startServer(t, "127.0.0.1:0", k)
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var cut atomic.Bool
	var wg sync.WaitGroup
	copyUntilCut := func(to, from net.Conn) {
		defer wg.Done()
		buf := make([]byte, 4096)
		for {
			n, err := from.Read(buf)
			if err != nil {
				_ = to.Close()
				return
			}
			if !cut.Load() {
				_, _ = to.Write(buf[:n])
			}
		}
	}
	wg.Go(func() {
		for {
			in, err := front.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", s.Addr().String())
			if err != nil {
				_ = in.Close()
				continue
			}
			wg.Add(2)
			go copyUntilCut(out, in)
			go copyUntilCut(in, out)
		}
	})
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = front.Close() })

	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, Peers: []string{front.Addr().String()}})
	if e := next(t, "event", a.events); !e.Up {
		t.Fatalf("got %+v", e)
	}
	cut.Store(true)
	start := time.Now()
	if e := next(t, "event", a.events); e.Up || !errors.Is(e.Err, nats.ErrStaleConnection) {
		t.Errorf("got %+v", e)
	}
	t.Logf("noticed after %v", time.Since(start).Round(10*time.Millisecond))
	cut.Store(false)
	if e := next(t, "event", a.events); !e.Up {
		t.Errorf("got %+v", e)
	}
}

// TestSlowCallback blocks the callback until messages are lost.
func TestSlowCallback(t *testing.T) {
	k := groupKeys(t, 1)
	s := startServer(t, "127.0.0.1:0", k)
	a := startNode(t, feed.Config{Name: "gw-a", Keys: k, Server: s})
	log := &lines{}
	b, err := feed.New(feed.Config{
		Name: "gw-b", Keys: k, Peers: []string{s.Addr().String()}, Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	block := make(chan struct{})
	var seqs []uint64
	b.OnUpdate(func(u feed.Update) {
		<-block
		seqs = append(seqs, u.Seq)
	})
	b.Start()
	defer b.Close()
	a.ups(t)
	until(t, "connected", func() bool { return b.Status()[0].Connected })
	records := make([]wgroam.Record, feed.MaxRecords)
	for i := range records {
		records[i] = record(i, a.Self())
	}
	for range 6000 { // of 14.5 KB each
		if err := a.Publish(records); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "overrun", func() bool { return b.Counters().Dropped > 0 })
	close(block)
	until(t, "caught up", func() bool { return b.Counters().Updates > 3000 })
	if n := len(log.with("too slow")); n != 1 {
		t.Errorf("%d lines", n)
	}
}
