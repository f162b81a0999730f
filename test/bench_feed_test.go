// SPDX-License-Identifier: MIT

package test

import (
	"context"
	wire "encoding/binary" // node_test.go has a function binary
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/natsd"
	"github.com/wgroam/wgroam/publisher"
)

const stormPeers = 100_000

// member is a node without a device: all of the daemon that lies between the
// tracker and the applier, wired as in cmd/wgroam.
type member struct {
	table *wgroam.Table
	clock *wgroam.Clock
	link  *feed.Link
	close func()
}

// startMember starts a node that has peers in its device, and what it knew when it
// ended, until the benchmark ends or it is closed. The server may be nil.
func startMember(b testing.TB, name string, keys feed.Keys, server *natsd.Server, nodes []string, peers []wgroam.Key, known ...wgroam.Record) *member {
	b.Helper()
	log := slog.New(slog.DiscardHandler)
	cfg := feed.Config{Name: name, Keys: keys, Peers: nodes, Log: log}
	if server != nil {
		cfg.Server = server
	}
	link, err := feed.New(cfg)
	if err != nil {
		b.Fatal(err)
	}
	m := &member{table: wgroam.NewTable(keys.DigestKey()), clock: wgroam.NewClock(10 * time.Second), link: link}
	view := wgroam.NewView()
	for _, k := range peers {
		view.Set(k, wgroam.Holding{})
	}
	merger := applier.NewMerger(applier.MergerConfig{
		Self: link.Self(), Table: m.table, Clock: m.clock, View: view, Feed: link, Log: log,
	})
	link.OnUpdate(merger.Update)
	link.OnBeat(merger.Beat)
	link.OnEvent(func(e feed.Event) {
		if e.Up {
			merger.Up()
		}
	})
	pub := publisher.New(publisher.Config{
		Table: m.table, Link: link, Role: func() feed.Role { return feed.RoleAlways }, Log: log,
	})
	merger.Restore(known)
	link.Start()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { merger.Run(ctx) })
	running.Go(func() { _ = pub.Run(ctx) }) // always nil
	m.close = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		link.Close()
	})
	b.Cleanup(m.close)
	return m
}

// observe makes a record as the daemon does for an event of its kernel.
func (m *member) observe(k wgroam.Key, ep netip.AddrPort) {
	m.table.Merge(wgroam.Record{
		Peer: k, Endpoint: ep, Cause: wgroam.CauseData,
		Version: wgroam.Version{HLC: m.clock.Stamp(time.Now()), Node: m.link.Self()},
	})
}

// holds waits until a member's table is another's.
func (m *member) holds(b *testing.B, other *member) {
	b.Helper()
	await(b, "tables are equal", func() (bool, string) {
		return m.table.Digests() == other.table.Digests(), fmt.Sprintf("%d of %d records", m.table.Len(), other.table.Len())
	})
}

// connected waits until all connections of a member are up.
func (m *member) connected(b *testing.B) {
	b.Helper()
	await(b, m.link.Name()+" is connected", func() (bool, string) {
		conns := m.link.Status()
		return !slices.ContainsFunc(conns, func(c feed.ConnStatus) bool { return !c.Connected }), fmt.Sprintf("%+v", conns)
	})
}

// twoServers starts the servers of two nodes on loopback.
func twoServers(b *testing.B) (feed.Keys, [2]*natsd.Server) {
	b.Helper()
	keys, err := feed.Derive([32]byte{8}, nil)
	if err != nil {
		b.Fatal(err)
	}
	var servers [2]*natsd.Server
	for i := range servers {
		s, err := natsd.Start(b.Context(), "127.0.0.1:0", slog.New(slog.DiscardHandler))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(s.Shutdown)
		s.AddGroup(keys)
		servers[i] = s
	}
	return keys, servers
}

// twoMembers starts two nodes with these servers.
func twoMembers(b *testing.B, keys feed.Keys, servers [2]*natsd.Server, peers []wgroam.Key) (from, to *member) {
	b.Helper()
	from = startMember(b, "gw-a", keys, servers[0], []string{servers[1].Addr().String()}, peers)
	to = startMember(b, "gw-h", keys, servers[1], []string{servers[0].Addr().String()}, peers)
	from.connected(b)
	to.connected(b)
	return from, to
}

// rawPath is bare NATS on the way between two members: published at the server
// of the one, in process, and received there by the other, over TLS.
type rawPath struct {
	subject string
	out     *nats.Conn
	got     chan uint32 // number of a message
}

func newRawPath(b *testing.B, keys feed.Keys, server *natsd.Server) *rawPath {
	b.Helper()
	r := &rawPath{subject: "wgroam.v1." + keys.Group() + ".bench", got: make(chan uint32, 1<<16)}
	var err error
	if r.out, err = nats.Connect("", nats.InProcessServer(server), nats.UserInfo(keys.Group(), "")); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(r.out.Close)
	in, err := nats.Connect("nats://"+server.Addr().String(), nats.Secure(keys.TLS()), nats.TLSHandshakeFirst())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(in.Close)
	_, err = in.Subscribe(r.subject, func(m *nats.Msg) { r.got <- wire.BigEndian.Uint32(m.Data) })
	if err == nil {
		err = in.Flush()
	}
	if err != nil {
		b.Fatal(err)
	}
	return r
}

// send sends a message with a number in its first four bytes.
func (r *rawPath) send(b *testing.B, n uint32, msg []byte) {
	b.Helper()
	wire.BigEndian.PutUint32(msg, n)
	if err := r.out.Publish(r.subject, msg); err != nil {
		b.Error(err)
	}
}

// kvPath is the same job done by a JetStream key-value bucket: every record is put
// under the peer's key, by a client in the server's process, and a watcher is
// connected over loopback, without TLS. The bucket is in memory.
type kvPath struct {
	server  *server.Server
	js      jetstream.JetStream
	subject string
	updates <-chan jetstream.KeyValueEntry
}

func newKVPath(b *testing.B) *kvPath {
	b.Helper()
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: b.TempDir(), NoLog: true, NoSigs: true,
	})
	if err != nil {
		b.Fatal(err)
	}
	s.Start()
	b.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(patience) {
		b.Fatal("no NATS with JetStream")
	}
	out, err := nats.Connect("", nats.InProcessServer(s))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(out.Close)
	k := &kvPath{server: s, subject: "$KV.roams."}
	if k.js, err = jetstream.New(out, jetstream.WithPublishAsyncMaxPending(stormPeers)); err != nil {
		b.Fatal(err)
	}
	cfg := jetstream.KeyValueConfig{Bucket: "roams", Storage: jetstream.MemoryStorage}
	if _, err = k.js.CreateKeyValue(b.Context(), cfg); err != nil {
		b.Fatal(err)
	}
	k.updates, _ = k.watch(b)
	if <-k.updates != nil {
		b.Fatal("the bucket is not empty")
	}
	return k
}

// watch watches the bucket from a connection of its own.
func (k *kvPath) watch(b *testing.B) (updates <-chan jetstream.KeyValueEntry, end func()) {
	b.Helper()
	in, err := nats.Connect(k.server.ClientURL())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(in.Close)
	js, err := jetstream.New(in)
	if err != nil {
		b.Fatal(err)
	}
	kv, err := js.KeyValue(b.Context(), "roams")
	if err != nil {
		b.Fatal(err)
	}
	w, err := kv.WatchAll(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	return w.Updates(), in.Close
}

// put is what KeyValue.Put does, without waiting for the answer.
func (k *kvPath) put(b *testing.B, r wgroam.Record) {
	b.Helper()
	value, _ := r.AppendBinary(nil) // never fails
	if _, err := k.js.PublishAsync(k.subject+hex.EncodeToString(r.Peer[:]), value); err != nil {
		b.Error(err)
	}
}

// frameSize is the length of a frame of n records: header, nonce and tag around
// them (internal/feed/frame.go).
func frameSize(n int) int { return 36 + 24 + n*wgroam.RecordSize + 16 }

// BenchmarkHop measures one record from one node's table to another's, while
// nothing else happens.
func BenchmarkHop(b *testing.B) {
	const samples, pause = 300, 3 * time.Millisecond
	keys, servers := twoServers(b)
	peer := wgroam.Key{1}
	from, to := twoMembers(b, keys, servers, []wgroam.Key{peer})
	raw := newRawPath(b, keys, servers[0])
	arrived := wgroam.NewChanges()
	to.table.Notify(arrived, nil)

	kv := newKVPath(b)

	var hop, bare, watched []time.Duration
	msg := make([]byte, frameSize(1))
	for i := range samples {
		<-time.After(pause)
		start := time.Now()
		from.observe(peer, netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, 1}), uint16(1024+i)))
		<-arrived.Ready()
		hop = append(hop, time.Since(start))
		arrived.Take(1)

		<-time.After(pause)
		start = time.Now()
		raw.send(b, uint32(i), msg)
		<-raw.got
		bare = append(bare, time.Since(start))

		<-time.After(pause)
		r, _ := from.table.Get(peer)
		start = time.Now()
		kv.put(b, r)
		<-kv.updates
		watched = append(watched, time.Since(start))
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(quantile(hop, 0.5).Seconds()*1e6, "us-p50")
	b.ReportMetric(quantile(hop, 0.99).Seconds()*1e6, "us-p99")
	b.ReportMetric(quantile(hop, 0.5).Seconds()/quantile(bare, 0.5).Seconds(), "ratio")
	b.Logf("%s\nOne record: Table, publisher, NATS server, merger, Table. Two nodes in one process, a server each, connected both ways\n"+
		"over loopback with TLS, idle; %d times, by turns with a bare NATS message of as many bytes over the same server and\n"+
		"the same kinds of connections, and with a JetStream key-value bucket in memory and a watcher over loopback without TLS.\n"+
		"No device is written.\n%s",
		kernel(), samples, plot(latencies{"wgroam", hop}, latencies{"bare NATS", bare}, latencies{"JetStream KV", watched}))
}
