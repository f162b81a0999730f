// SPDX-License-Identifier: MIT

package feed

import (
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam"
)

// TestAskRepeated has pieces of an answer that come twice, late, or never.
func TestAskRepeated(t *testing.T) {
	k := testKeys(t)
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("nats-server is not ready")
	}
	l, err := New(Config{Name: "gw-z", Keys: k, External: External{URL: s.ClientURL()}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	up := make(chan struct{}, 1)
	l.OnEvent(func(e Event) {
		if e.Up {
			up <- struct{}{}
		}
	})
	l.Start()
	t.Cleanup(l.Close)
	<-up
	for _, tc := range []struct {
		seqs []uint64
		want int
		good bool
	}{
		{[]uint64{1, 2, 3}, 3, true},
		{[]uint64{1, 1, 2, 1, 2, 3}, 3, true},
		{[]uint64{1, 3}, 1, false},
		{[]uint64{2, 1, 3}, 0, false},
	} {
		nc, err := nats.Connect(s.ClientURL())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := nc.Subscribe(l.prefix+"q", func(m *nats.Msg) {
			h, body, err := k.open(m.Data, m.Subject, nil, kindRequest)
			if err != nil {
				t.Error(err)
				return
			}
			r, err := decodeRequest(h, body)
			if err != nil {
				t.Error(err)
				return
			}
			for _, seq := range tc.seqs {
				h := testHeader(kindReply, seq, wgroam.RecordSize, 1)
				if seq == 3 {
					h.flags = flagLast
				}
				_ = nc.Publish(m.Reply, k.seal(nil, h, appendRecords(nil, testRecords(1)), m.Reply, r.bind[:]))
			}
		}); err != nil {
			t.Fatal(err)
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		var got []uint64
		var failed error
		for u, err := range l.Ask(t.Context(), testNode, &wgroam.Digests{}) {
			if failed = err; err == nil {
				got = append(got, u.Seq)
			}
		}
		if (failed == nil) != tc.good || !slices.Equal(got, []uint64{1, 2, 3}[:tc.want]) {
			t.Errorf("pieces %v: got %v, %v", tc.seqs, got, failed)
		}
		nc.Close()
	}
}
