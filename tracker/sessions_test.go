// SPDX-License-Identifier: MIT

package tracker

import (
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/wgroam/wgroam"
)

// TestSessions: whatever indexes come and go, the newest of a peer are known
// unless another peer has them since, and there are never many.
func TestSessions(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSessions()
		given := make(map[wgroam.Key][]uint32) // the newest first, each once
		keys := rapid.Custom(func(t *rapid.T) wgroam.Key { return wgroam.Key{1 + rapid.Byte().Draw(t, "key")%3} })
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				k, i := keys.Draw(t, "peer"), rapid.Uint32Range(0, 20).Draw(t, "index")
				owner, known := s.local[i]
				if news := s.addLocal(k, i); news != (!known || owner != k) {
					t.Fatalf("news: %v", news)
				}
				if known && owner == k {
					return // the same message, on another link
				}
				for other := range given {
					given[other] = slices.DeleteFunc(given[other], func(x uint32) bool { return x == i })
				}
				given[k] = append([]uint32{i}, given[k]...)
				if !s.newestLocal(k, i) {
					t.Fatalf("%d is not the newest", i)
				}
			},
			"forget": func(t *rapid.T) {
				k := keys.Draw(t, "peer")
				s.forget(k)
				delete(given, k)
			},
			"": func(t *rapid.T) {
				if len(s.peers) > 3 || len(s.local) > keep*len(s.peers) {
					t.Fatalf("%d indexes of %d peers", len(s.local), len(s.peers))
				}
				for i, k := range s.local {
					if !slices.Contains(given[k], i) {
						t.Fatalf("%d is not %v's", i, k)
					}
				}
				for k, list := range given {
					if len(list) > 0 && s.local[list[0]] != k && s.newestLocal(k, list[0]) {
						t.Fatalf("%v has lost its newest index", k)
					}
				}
			},
		})
	})
}

// TestSessionsShared: an index that several peers have chosen is nobody's, until none
// of them has it.
func TestSessionsShared(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSessions()
		has := make(map[wgroam.Key][]uint32) // the newest first
		was := make(map[uint32]bool)         // shared since the last time that nobody had it
		keys := rapid.Custom(func(t *rapid.T) wgroam.Key { return wgroam.Key{1 + rapid.Byte().Draw(t, "key")%3} })
		owners := func(i uint32) (n int) {
			for _, list := range has {
				if slices.Contains(list, i) {
					n++
				}
			}
			return n
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				k, i := keys.Draw(t, "peer"), rapid.Uint32Range(0, 9).Draw(t, "index")
				if !slices.Contains(has[k], i) {
					has[k] = append([]uint32{i}, has[k]...)
					has[k] = has[k][:min(len(has[k]), keep)]
				}
				s.addRemote(k, i)
			},
			"forget": func(t *rapid.T) {
				k := keys.Draw(t, "peer")
				s.forget(k)
				delete(has, k)
			},
			"": func(t *rapid.T) {
				for i := range uint32(10) {
					n := owners(i)
					was[i] = n > 1 || n == 1 && was[i]
					k, ok := s.remote[i]
					if ok != (n == 1 && !was[i]) || ok && !slices.Contains(has[k], i) {
						t.Fatalf("%d is of %v (%v), %d peers have it, shared: %v", i, k, ok, n, was[i])
					}
					if (s.shared[i] > 0) != was[i] {
						t.Fatalf("%d is shared by %d, want %v", i, s.shared[i], was[i])
					}
				}
				if len(s.remote)+len(s.shared) > 10 {
					t.Fatalf("%d indexes", len(s.remote)+len(s.shared))
				}
			},
		})
	})
}
