// SPDX-License-Identifier: MIT

package wgroam

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// gateway is a node of TestConverge: what a daemon is without kernel and
// network.
type gateway struct {
	id    NodeID
	skew  time.Duration
	clock *Clock
	table *Table
	inbox []Record
}

// observe is what happens when the kernel of g accepts a packet.
func (g *gateway) observe(peer Key, r Record, now time.Duration) Record {
	r.Peer = peer
	r.Version = Version{HLC: g.clock.Stamp(moment(now, g.skew)), Node: g.id}
	g.table.Merge(r)
	return r
}

// receive is what happens when a record comes in.
func (g *gateway) receive(r Record, now time.Duration) error {
	if err := g.clock.Merge(r.Version.HLC, moment(now, g.skew)); err != nil {
		return err
	}
	g.table.Merge(r)
	return nil
}

// TestConverge lets nodes with clocks of their own observe peers while a bad
// network reorders, repeats and loses what they tell each other, then lets each
// pair sync once per round. All must hold the same then: per peer, the newest
// record that anybody made; and newest agrees with cause and effect.
func TestConverge(t *testing.T) {
	const maxSkew = 10 * time.Second
	rapid.Check(t, func(t *rapid.T) {
		var (
			now    time.Duration
			nodes  []*gateway
			made   []Record
			latest = map[Key]Record{} // by the time of day, which nobody knows
			skewed = rapid.Bool().Draw(t, "skewed")
		)
		for i := range rapid.IntRange(2, 5).Draw(t, "nodes") {
			g := &gateway{id: NodeIDOf(fmt.Sprint("gw-", i)), clock: NewClock(maxSkew), table: NewTable(digestKey)}
			if skewed {
				g.skew = time.Duration(rapid.IntRange(-4000, 4000).Draw(t, "skew ms")) * time.Millisecond
			}
			nodes = append(nodes, g)
		}
		node := rapid.Map(rapid.IntRange(0, len(nodes)-1), func(i int) *gateway { return nodes[i] })

		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) { now += time.Duration(rapid.IntRange(1, 50).Draw(t, "ms")) * time.Millisecond },
			"observe": func(t *rapid.T) {
				g, peer := node.Draw(t, "node"), genPeer.Draw(t, "peer")
				known, _ := g.table.Get(peer)
				r := g.observe(peer, Record{Endpoint: genEndpoint.Draw(t, "endpoint"), Cause: genCause.Draw(t, "cause")}, now)
				if r.Version.Compare(known.Version) <= 0 {
					t.Fatalf("%+v, made in the knowledge of %+v, does not supersede it", r, known)
				}
				made = append(made, r)
				latest[peer] = r
				for _, other := range nodes {
					if other != g {
						other.inbox = append(other.inbox, r)
					}
				}
			},
			"deliver": func(t *rapid.T) {
				g := node.Draw(t, "node")
				if len(g.inbox) == 0 {
					return
				}
				i := rapid.IntRange(0, len(g.inbox)-1).Draw(t, "which")
				if err := g.receive(g.inbox[i], now); err != nil {
					t.Fatal(err)
				}
				if !rapid.Bool().Draw(t, "again later") {
					g.inbox = slices.Delete(g.inbox, i, i+1)
				}
			},
			"lose": func(t *rapid.T) {
				g := node.Draw(t, "node")
				if len(g.inbox) > 0 {
					i := rapid.IntRange(0, len(g.inbox)-1).Draw(t, "which")
					g.inbox = slices.Delete(g.inbox, i, i+1)
				}
			},
			"sync": func(t *rapid.T) { pull(t, node.Draw(t, "to"), node.Draw(t, "from"), now) },
		})

		// All that is under way is lost. One after the other asks its neighbour,
		// twice around.
		for range 2 {
			for i := range nodes {
				a, b := nodes[i], nodes[(i+1)%len(nodes)]
				pull(t, b, a, now)
				pull(t, a, b, now)
			}
		}

		want := contents(tableOf(made...))
		for i, g := range nodes {
			if diff := cmp.Diff(want, contents(g.table), cmpAddrPort); diff != "" {
				t.Errorf("gw-%d (-newest +got):\n%s", i, diff)
			}
			if g.table.Digests() != nodes[0].table.Digests() {
				t.Errorf("gw-%d has other digests than gw-0", i)
			}
		}
		if !skewed {
			for peer, r := range latest {
				if got, _ := nodes[0].table.Get(peer); got != r {
					t.Errorf("with clocks that agree: %+v, want the latest %+v", got, r)
				}
			}
		}
	})
}

// pull is half of a pairwise sync.
func pull(t *rapid.T, to, from *gateway, now time.Duration) {
	digests := to.table.Digests()
	for _, r := range from.table.Differing(&digests) {
		if err := to.receive(r, now); err != nil {
			t.Fatal(err)
		}
	}
}
