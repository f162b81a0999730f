// SPDX-License-Identifier: MIT

package wgroam

import (
	"maps"
	"net/netip"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// genHeld is genEndpoint, and what only a device holds.
var genHeld = rapid.OneOf(genEndpoint, rapid.SampledFrom([]netip.AddrPort{
	netip.MustParseAddrPort("[fe80::1%eth0]:1"), netip.MustParseAddrPort("[fe80::1%7]:1"), netip.MustParseAddrPort("[fe80::1]:1"),
	netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("[::ffff:192.0.2.1]:1"),
}))

// TestView: a view is a map that says which of its entries change.
func TestView(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v, changes := NewView(), NewChanges()
		v.Notify(changes)
		want, now := map[Key]Holding{}, time.Now()
		t.Repeat(map[string]func(*rapid.T){
			"": func(t *rapid.T) {
				if got := v.Peers(); !maps.Equal(got, want) || v.Len() != len(want) {
					t.Fatalf("got %v (Len %d), want %v", got, v.Len(), want)
				}
			},
			"set": func(t *rapid.T) {
				k := genPeer.Draw(t, "peer")
				h := Holding{}
				if rapid.Bool().Draw(t, "has an endpoint") {
					h = Holding{Endpoint: genHeld.Draw(t, "endpoint"), Cause: genCause.Draw(t, "cause")}
					if rapid.Bool().Draw(t, "has a time") {
						h.At = now.Add(time.Duration(rapid.IntRange(-2, 2).Draw(t, "at")) * time.Hour)
					}
				}
				old, had := want[k]
				before, known := v.Set(k, h)
				if before != old || known != had {
					t.Fatalf("Set returns %v, %v, want %v, %v", before, known, old, had)
				}
				want[k] = h
				if marked := len(changes.Take(9)) == 1; marked != (!had || old != h) {
					t.Fatalf("from %v, %v to %v: marked %v", old, had, h, marked)
				}
			},
			"keep": func(t *rapid.T) {
				gone := genPeer.Draw(t, "gone")
				v.Keep(func(k Key) bool { return k != gone })
				_, had := want[gone]
				delete(want, gone)
				if marked := len(changes.Take(9)) == 1; marked != had {
					t.Fatalf("%v, known %v, is gone: marked %v", gone, had, marked)
				}
				if _, ok := v.Get(gone); ok {
					t.Fatalf("%v is still there", gone)
				}
			},
			"get": func(t *rapid.T) {
				k := genPeer.Draw(t, "peer")
				got, ok := v.Get(k)
				if w, wok := want[k]; got != w || ok != wok {
					t.Fatalf("Get returns %v, %v, want %v, %v", got, ok, w, wok)
				}
			},
		})
	})
}

// TestViewCopies: what Peers returns is the caller's.
func TestViewCopies(t *testing.T) {
	v := NewView()
	v.Set(Key{1}, Holding{})
	clear(v.Peers())
	if _, ok := v.Get(Key{1}); !ok {
		t.Error("the caller has emptied the view")
	}
}

// TestViewTimes: an At is the instant that it was, with a monotonic reading or without.
func TestViewTimes(t *testing.T) {
	v, now := NewView(), time.Now()
	for i, at := range []time.Time{{}, now.Round(0), now, now.Add(-time.Hour), now.Round(0).Add(time.Hour), {}} {
		k := Key{byte(i)}
		v.Set(k, Holding{At: at})
		if got, _ := v.Get(k); !got.At.Equal(at) {
			t.Errorf("%v has become %v", at, got.At)
		}
	}
	if got, ok := v.Get(Key{99}); ok || got != (Holding{}) {
		t.Errorf("an unknown peer has %v, %v", got, ok)
	}
}

// TestViewConcurrently is for the race detector. Nobody listens here.
func TestViewConcurrently(t *testing.T) {
	v := NewView()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for j := range 1000 {
				v.Set(Key{byte(i), byte(j)}, Holding{Endpoint: netip.MustParseAddrPort("198.51.100.7:1"), Cause: CauseData})
				v.Get(Key{byte(j)})
				if j%100 == 0 {
					v.Peers()
					v.Keep(func(k Key) bool { return k[0] == byte(i) })
				}
			}
		})
	}
	wg.Wait()
}
