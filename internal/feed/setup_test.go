// SPDX-License-Identifier: MIT

package feed_test

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

// TestAskSetups: an answer arrives whole, however long it is.
func TestAskSetups(t *testing.T) {
	k := groupKeys(t, 1)
	a, b := startServer(t, "127.0.0.1:0", k), startServer(t, "127.0.0.1:0", k)
	answers := make(chan wgroam.Setups, 1)
	answering, err := feed.New(feed.Config{Name: "gw-a", Keys: k, Server: a, Peers: []string{b.Addr().String()}, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	answering.OnSetupRequest(func(r *feed.Request) {
		theirs := <-answers
		go func() {
			if _, err := answering.AnswerSetups(context.Background(), r, theirs.Differing(&r.Have, feed.MaxSetups)); err != nil {
				t.Error(err)
			}
		}()
	})
	answering.Start()
	t.Cleanup(answering.Close)
	asking := startNode(t, feed.Config{Name: "gw-b", Keys: k, Server: b, Peers: []string{a.Addr().String()}})
	asking.ups(t)
	if err := answering.Beat(feed.Beat{}); err != nil {
		t.Fatal(err)
	}
	next(t, "beat", asking.beats)

	ours := wgroam.NewSetups(51820, nil)
	have := ours.Digests()
	for _, n := range []int{0, 1, feed.MaxRecords, feed.MaxRecords + 1, 4000, feed.MaxSetups + 5000} {
		var list []wgroam.Setup
		for i := range n {
			list = append(list, wgroam.Setup{Peer: wgroam.Key{byte(i >> 8), byte(i)}, AllowedIPs: uint64(i), PresharedKey: 1})
		}
		theirs := wgroam.NewSetups(n, list)
		answers <- theirs
		got, err := asking.AskSetups(t.Context(), answering.Self(), &have)
		if err != nil {
			t.Fatalf("%d peers: %v", n, err)
		}
		if diff := cmp.Diff(theirs.Differing(&have, feed.MaxSetups), got); diff != "" {
			t.Errorf("%d peers (-sent +got):\n%s", n, diff)
		}
	}
	if _, err := asking.AskSetups(t.Context(), 99, &have); !errors.Is(err, feed.ErrNoAnswer) {
		t.Errorf("a node that has not been heard: %v", err)
	}
	// A node of a former version does not listen there.
	ctx, cancel := context.WithCancel(t.Context())
	silent := startNode(t, feed.Config{Name: "gw-c", Keys: k, Server: a})
	silent.ups(t)
	if err := silent.Beat(feed.Beat{}); err != nil {
		t.Fatal(err)
	}
	next(t, "beat", asking.beats)
	cancel()
	if _, err := asking.AskSetups(ctx, silent.Self(), &have); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody answers: %v", err)
	}
}
