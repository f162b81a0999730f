// SPDX-License-Identifier: MIT

package tracker

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/wgroam/wgroam"
)

// TestPlaces: wherever peers go, those at an endpoint are found, and nobody else.
func TestPlaces(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := make(places)
		var all []*peer
		for i := range 4 {
			all = append(all, &peer{key: wgroam.Key{byte(1 + i)}})
		}
		endpoint := rapid.Custom(func(t *rapid.T) netip.AddrPort {
			if i := rapid.IntRange(0, 3).Draw(t, "endpoint"); i > 0 {
				return at(i)
			}
			return none
		})
		t.Repeat(map[string]func(*rapid.T){
			"move": func(t *rapid.T) {
				p, to := rapid.SampledFrom(all).Draw(t, "peer"), endpoint.Draw(t, "to")
				if m.move(p, to); p.endpoint != to {
					t.Fatalf("is at %v, not at %v", p.endpoint, to)
				}
			},
			"": func(t *rapid.T) {
				for i := range 4 {
					want := make(map[*peer]bool)
					for _, p := range all {
						if p.endpoint == at(i) {
							want[p] = true
						}
					}
					found := 0
					for p := m[at(i)]; p != nil; p = p.next {
						if found++; !want[p] || found > len(all) {
							t.Fatalf("%v is not at %v", p.key, at(i))
						}
					}
					k, ok := m.only(at(i))
					if found != len(want) || ok != (len(want) == 1) {
						t.Fatalf("found %d of %d, the only one: %v", found, len(want), ok)
					}
					for _, p := range all {
						if others := len(want) > 1 || len(want) == 1 && !want[p]; m.others(p.key, at(i)) != others {
							t.Fatalf("others than %v at %v: %v", p.key, at(i), !others)
						}
						if ok && want[p] && k != p.key {
							t.Fatalf("%v is the only one, not %v", p.key, k)
						}
					}
				}
				if len(m) > 3 || m[none] != nil {
					t.Fatalf("%d places", len(m))
				}
			},
		})
	})
}
