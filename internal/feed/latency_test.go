// SPDX-License-Identifier: MIT

package feed_test

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/publisher"
)

// BenchmarkLatency measures one update at a time, 1000 a second, from a client
// inside the server's process to one over TCP: plain core NATS with a payload
// of one frame's size, a Link, and from table to table.
func BenchmarkLatency(b *testing.B) {
	measure := func(b *testing.B, arrived <-chan struct{}, send func(i int)) {
		b.Helper()
		var took []time.Duration
		i := 0
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for b.Loop() {
			<-tick.C // what is seldom is slower: everything sleeps
			start := time.Now()
			send(i)
			select {
			case <-arrived:
			case <-time.After(patience):
				b.Fatal("did not arrive")
			}
			took = append(took, time.Since(start))
			i++
		}
		slices.Sort(took)
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
		b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	}

	b.Run("plain", func(b *testing.B) {
		s := startNATS(b, &server.Options{})
		from, err := nats.Connect("", nats.InProcessServer(s))
		if err != nil {
			b.Fatal(err)
		}
		defer from.Close()
		to, err := nats.Connect(s.ClientURL())
		if err != nil {
			b.Fatal(err)
		}
		defer to.Close()
		arrived := make(chan struct{}, 1)
		if _, err := to.Subscribe("u.*", func(*nats.Msg) { arrived <- struct{}{} }); err != nil {
			b.Fatal(err)
		}
		if err := to.Flush(); err != nil {
			b.Fatal(err)
		}
		payload := make([]byte, 148)
		measure(b, arrived, func(int) {
			if err := from.Publish("u.1", payload); err != nil {
				b.Fatal(err)
			}
		})
	})

	b.Run("link", func(b *testing.B) {
		k := groupKeys(b, 1)
		s := startServer(b, "127.0.0.1:0", k)
		from := startNode(b, feed.Config{Name: "gw-a", Keys: k, Server: s})
		to, err := feed.New(feed.Config{Name: "gw-b", Keys: k, Peers: []string{s.Addr().String()}, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			b.Fatal(err)
		}
		arrived := make(chan struct{}, 1)
		to.OnUpdate(func(feed.Update) { arrived <- struct{}{} })
		to.Start()
		defer to.Close()
		from.ups(b)
		until(b, "connected", func() bool { return to.Status()[0].Connected })
		records := []wgroam.Record{record(1, from.Self())}
		measure(b, arrived, func(int) {
			if err := from.Publish(records); err != nil {
				b.Fatal(err)
			}
		})
	})

	b.Run("table", func(b *testing.B) {
		k := groupKeys(b, 1)
		s := startServer(b, "127.0.0.1:0", k)
		log := slog.New(slog.DiscardHandler)
		from, err := feed.New(feed.Config{Name: "gw-a", Keys: k, Server: s, Log: log})
		if err != nil {
			b.Fatal(err)
		}
		to, err := feed.New(feed.Config{Name: "gw-b", Keys: k, Peers: []string{s.Addr().String()}, Log: log})
		if err != nil {
			b.Fatal(err)
		}
		mine, theirs := wgroam.NewTable(k.DigestKey()), wgroam.NewTable(k.DigestKey())
		arrived := make(chan struct{}, 1)
		to.OnUpdate(func(u feed.Update) {
			for _, r := range u.Records {
				theirs.Merge(r)
			}
			arrived <- struct{}{}
		})
		pub := publisher.New(publisher.Config{Link: from, Table: mine, Role: func() feed.Role { return feed.RoleActive }, Log: log})
		from.Start()
		defer from.Close()
		to.Start()
		defer to.Close()
		until(b, "connected", func() bool { return from.Status()[0].Connected && to.Status()[0].Connected })
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { _ = pub.Run(ctx) })
		defer wg.Wait()
		defer cancel()
		measure(b, arrived, func(i int) {
			r := record(1, from.Self())
			r.Version.HLC = wgroam.HLC(i + 1)
			mine.Merge(r)
		})
	})
}
