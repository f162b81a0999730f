// SPDX-License-Identifier: MIT

package test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/publisher"
)

// relay passes connections on to a server. While its gate is locked nothing comes
// from there.
type relay struct {
	net.Listener
	gate sync.Mutex
}

func startRelay(t testing.TB, to string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: l}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				_ = in.Close()
				continue
			}
			// What is held back fills the server's buffers, not ours.
			_ = out.(*net.TCPConn).SetReadBuffer(16 << 10)
			wg.Go(func() { _, _ = io.Copy(out, in); _ = out.Close() })
			wg.Go(func() { _, _ = io.Copy(in, gated{out, &r.gate}); _ = in.Close() })
		}
	})
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = l.Close() })
	return r
}

type gated struct {
	io.Reader
	gate *sync.Mutex
}

// Read implements io.Reader.
func (g gated) Read(p []byte) (int, error) {
	g.gate.Lock()
	g.gate.Unlock() //nolint:staticcheck // it is a gate
	return g.Reader.Read(p)
}

// gateway is a daemon's part in the feed: no device, but all else.
type gateway struct {
	link  *feed.Link
	table *wgroam.Table
}

func startGateway(t testing.TB, name, url string) gateway {
	t.Helper()
	keys, err := feed.Derive([32]byte{8, 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	link, err := feed.New(feed.Config{Name: name, Keys: keys, External: feed.External{URL: url}, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	g := gateway{link, wgroam.NewTable(keys.DigestKey())}
	merger := applier.NewMerger(applier.MergerConfig{
		Self: link.Self(), Table: g.table, Clock: wgroam.NewClock(10 * time.Second), View: wgroam.NewView(), Feed: link, Log: log,
	})
	link.OnUpdate(merger.Update)
	link.OnBeat(merger.Beat)
	link.OnEvent(func(e feed.Event) {
		if e.Up {
			merger.Up()
		}
	})
	pub := publisher.New(publisher.Config{Link: link, Table: g.table, Role: func() feed.Role { return feed.RoleAlways }, Log: log})
	link.Start()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { merger.Run(ctx) })
	wg.Go(func() { _ = pub.Run(ctx) }) // always nil
	t.Cleanup(func() { cancel(); wg.Wait(); link.Close() })
	return g
}

// TestSlowSubscriber: a node that does not read is cut off by the server, which
// throws away what waits for it. It has the newest of all as soon as it reads
// again.
func TestSlowSubscriber(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	ns, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true, MaxPending: 1 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	ns.Start()
	t.Cleanup(func() { ns.Shutdown(); ns.WaitForShutdown() })
	if !ns.ReadyForConnections(patience) {
		t.Fatal("nats-server is not ready")
	}
	front := startRelay(t, ns.Addr().String())
	a := startGateway(t, "gw-a", ns.ClientURL())
	b := startGateway(t, "gw-b", "nats://"+front.Addr().String())

	const peers = 5000
	clock := wgroam.NewClock(10 * time.Second)
	rounds := 0
	storm := func() {
		rounds++
		for i := range peers {
			r := wgroam.Record{
				Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}), uint16(rounds)),
				Cause:    wgroam.CauseData,
				Version:  wgroam.Version{HLC: clock.Stamp(time.Now()), Node: a.link.Self()},
			}
			r.Peer[0], r.Peer[1] = byte(i>>8), byte(i)
			a.table.Merge(r)
		}
	}
	equal := func() (bool, string) {
		x, y := a.table.Digests(), b.table.Digests()
		return x == y, ""
	}
	storm()
	await(t, "told", equal)

	front.gate.Lock()
	open := sync.OnceFunc(front.gate.Unlock)
	defer open()
	storm()
	nc, err := nats.Connect(ns.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	// Anybody's noise fills the buffers, and faster than a storm would: a node that
	// hears nothing for a second and a half hangs up itself.
	noise := make([]byte, 64<<10)
	await(t, "cut off", func() (bool, string) {
		for range 64 {
			if err := nc.Publish(strings.TrimSuffix(a.link.Subjects(), ">")+"u.x", noise); err != nil {
				t.Fatal(err)
			}
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		return ns.NumSlowConsumers() > 0, ""
	})
	storm() // and what it has not even been sent
	if same, _ := equal(); same {
		t.Fatal("nothing was held back")
	}
	open()
	began := time.Now()
	await(t, "told what it has missed", equal)
	t.Logf("%d storms of %d peers; equal %v after the node reads again", rounds, peers, time.Since(began).Round(time.Millisecond))
}
