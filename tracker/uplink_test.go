// SPDX-License-Identifier: MIT

package tracker

import (
	"testing"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/wg"
)

// atPort is a tracker on the rung port that a test feeds.
func atPort(t testing.TB) *fed { return newFed(t, RungPort) }

// passed feeds what the program at the port says at a time.
func (f *fed) passed(ms int, e bpf.UplinkEvent) {
	d := time.Duration(ms) * time.Millisecond
	e.Boot = f.boot + d
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sent(e, f.wall.Add(d), 0)
}

// responded is a response to a peer, for sessions with these indexes.
func (f *fed) responded(ms int, peer wgroam.Key, local, remote uint32, to int) {
	f.passed(ms, bpf.UplinkEvent{
		Kind: bpf.UplinkResponse, Local: local, Remote: remote, Addr: at(to),
		Message: handshake(f.t, peer, responseSize),
	})
}

func (f *fed) initiated(ms int, peer wgroam.Key, local uint32, to int) {
	f.passed(ms, bpf.UplinkEvent{
		Kind: bpf.UplinkInitiation, Local: local, Addr: at(to), Message: handshake(f.t, peer, initiationSize),
	})
}

func (f *fed) hinted(ms int, local uint32, from int) {
	f.passed(ms, bpf.UplinkEvent{Kind: bpf.UplinkHint, Local: local, Addr: at(from)})
}

func (f *fed) moved(ms int, remote uint32, from, to int) {
	f.passed(ms, bpf.UplinkEvent{Kind: bpf.UplinkMoved, Remote: remote, Old: at(from), Addr: at(to)})
}

func (f *fed) data(ms int, kind bpf.UplinkKind, remote uint32, to int) {
	f.passed(ms, bpf.UplinkEvent{Kind: kind, Remote: remote, Addr: at(to)})
}

// TestUplink: what passes the port, and what the tracker makes of it. Alice is at
// 1, in a session that she began (ours is 10, hers 20), and Bob at 8.
func TestUplink(t *testing.T) {
	seen := func(f *fed, ep int, received int64) []wg.Peer {
		return []wg.Peer{
			{Key: alice, Endpoint: at(ep), LastHandshake: f.wall, Received: received},
			{Key: bob, Endpoint: at(8), LastHandshake: f.wall, Received: 100},
		}
	}
	moved := func(to int, cause wgroam.Cause) []said { return []said{{alice, at(1), at(to), cause}} }
	// What most of them begin with, and end with.
	answered := func(f *fed) { f.responded(100, alice, 12, 23, 2) }
	completed := func(f *fed, handshake, dump int) {
		peers := seen(f, 2, 200)
		peers[0].LastHandshake = f.wall.Add(time.Duration(handshake) * time.Millisecond)
		f.dumped(dump, dumpResync, peers...)
	}
	tests := map[string]struct {
		feed    func(*fed)
		changed []said
		proven  bool
		dump    bool
	}{
		"data to where she was":                  {feed: func(f *fed) { f.data(100, bpf.UplinkUnknown, 21, 1) }},
		"a hint from where she is":               {feed: func(f *fed) { f.hinted(100, 10, 1) }},
		"a hint":                                 {feed: func(f *fed) { f.hinted(100, 10, 2) }, dump: true},
		"a hint under an index that has no name": {feed: func(f *fed) { f.hinted(100, 99, 1) }, dump: true},
		"a hint, and data": {
			feed:    func(f *fed) { f.hinted(100, 10, 2); f.moved(110, 20, 1, 2) },
			changed: moved(2, wgroam.CauseData), proven: true, dump: true,
		},
		"a hint, another's hint, and data": {
			feed:    func(f *fed) { f.hinted(100, 10, 2); f.hinted(101, 10, 66); f.moved(110, 20, 1, 2) },
			changed: moved(2, wgroam.CauseData), proven: true, dump: true,
		},
		"a hint, and data to another place": {
			feed: func(f *fed) { f.hinted(100, 10, 66); f.moved(110, 20, 1, 2) },
			dump: true,
		},
		"Bob's hint, and data to Alice": {
			feed: func(f *fed) {
				f.responded(50, bob, 11, 22, 8)
				f.hinted(100, 11, 2)
				f.moved(110, 20, 1, 2)
			},
			dump: true,
		},
		"an old hint, and data": {
			feed: func(f *fed) { f.hinted(100, 10, 2); f.moved(100+int(hintLife.Milliseconds()), 20, 1, 2) },
			dump: true,
		},
		"data under an index that has no name": {feed: func(f *fed) { f.moved(100, 99, 3, 2) }, dump: true},
		"data of a new session to nobody":      {feed: func(f *fed) { f.data(100, bpf.UplinkUnknown, 99, 2) }, dump: true},
		"an initiation to where she is":        {feed: func(f *fed) { f.initiated(100, alice, 12, 1) }},
		"an initiation to elsewhere":           {feed: func(f *fed) { f.initiated(100, alice, 12, 2) }, dump: true},
		"a response": {
			feed:    answered,
			changed: moved(2, wgroam.CauseInitiation),
		},
		"a response, seen on two links": {
			feed:    func(f *fed) { answered(f); f.responded(101, alice, 12, 23, 2) },
			changed: moved(2, wgroam.CauseInitiation),
		},
		"a response, and data under its session": {
			feed: func(f *fed) {
				answered(f)
				f.data(110, bpf.UplinkConfirmed, 23, 2)
			},
			changed: moved(2, wgroam.CauseInitiation), dump: true,
		},
		"a response, data under its session, and a dump": {
			feed: func(f *fed) {
				answered(f)
				f.data(110, bpf.UplinkConfirmed, 23, 2)
				completed(f, 109, 120)
			},
			changed: moved(2, wgroam.CauseInitiation), proven: true, dump: true,
		},
		"a response, and data under the session before": {
			feed: func(f *fed) {
				answered(f)
				f.moved(110, 20, 1, 2)
				f.data(111, bpf.UplinkConfirmed, 20, 2)
			},
			changed: moved(2, wgroam.CauseInitiation), dump: true,
		},
		"a response under the index of her session, and data": {
			feed: func(f *fed) {
				f.responded(100, alice, 12, 20, 2)
				f.data(110, bpf.UplinkConfirmed, 20, 2)
			},
			changed: moved(2, wgroam.CauseInitiation), dump: true,
		},
		"a response under the index of Bob's session, and data": {
			feed: func(f *fed) {
				f.responded(50, bob, 11, 22, 8)
				f.responded(100, alice, 12, 22, 2)
				f.data(110, bpf.UplinkConfirmed, 22, 2)
			},
			changed: moved(2, wgroam.CauseInitiation), dump: true,
		},
		"a response, another one, and data under its session": {
			feed: func(f *fed) {
				answered(f)
				f.responded(200, alice, 13, 24, 2)
				f.data(210, bpf.UplinkConfirmed, 24, 2)
			},
			changed: moved(2, wgroam.CauseInitiation), dump: true,
		},
		"a response, another one, and a dump that has the handshake of the first": {
			feed: func(f *fed) {
				answered(f)
				f.responded(200, alice, 13, 24, 2)
				completed(f, 150, 300)
			},
			changed: moved(2, wgroam.CauseInitiation),
		},
		"Bob takes her index, and has hints; she moves": {
			feed: func(f *fed) {
				f.responded(50, bob, 11, 20, 8)
				f.hinted(100, 11, 2)
				f.moved(110, 20, 1, 2)
			},
			dump: true,
		},
		"Bob takes her index, and moves; she is hinted at": {
			feed: func(f *fed) {
				f.responded(50, bob, 11, 20, 8)
				f.hinted(100, 10, 2)
				f.moved(110, 20, 8, 2)
			},
			dump: true,
		},
		"Bob answers with her index, and moves; she is hinted at": {
			feed: func(f *fed) {
				f.moved(50, 20, 1, 8)
				f.hinted(100, 10, 2)
				f.moved(110, 20, 8, 2)
			},
			dump: true,
		},
		"data under her index, which the kernel had forgotten, to elsewhere": {
			feed: func(f *fed) { f.data(100, bpf.UplinkUnknown, 20, 2) },
			dump: true,
		},
		"a response, and something forged": {
			feed: func(f *fed) {
				answered(f)
				f.hinted(110, 12, 2)
				f.moved(111, 20, 1, 2)
				f.dumped(200, dumpResync, seen(f, 2, 200)...)
			},
			changed: moved(2, wgroam.CauseInitiation), dump: true,
		},
		"a response, and the end of the handshake": {
			feed: func(f *fed) {
				answered(f)
				f.hinted(110, 12, 2)
				completed(f, 110, 300)
			},
			changed: moved(2, wgroam.CauseInitiation), proven: true, dump: true,
		},
		"a dump that a hint explains": {
			feed:    func(f *fed) { f.hinted(100, 10, 2); f.dumped(250, dumpResync, seen(f, 2, 100)...) },
			changed: moved(2, wgroam.CauseData), proven: true, dump: true,
		},
		"a dump that is too early": {
			feed: func(f *fed) { f.hinted(100, 10, 2); f.wantsDump(); f.dumped(150, dumpResync, seen(f, 1, 100)...) },
			dump: true,
		},
		"a dump that is late enough": {
			feed: func(f *fed) { f.hinted(100, 10, 66); f.wantsDump(); f.dumped(250, dumpResync, seen(f, 1, 100)...) },
		},
		"a dump without a hint": {
			feed: func(f *fed) {
				f.hinted(50, 10, 1) // of the session
				f.dumped(100, dumpSweep, seen(f, 2, 200)...)
				f.dumped(300, dumpResync, seen(f, 2, 200)...)
			},
			changed: moved(2, wgroam.CauseConfig), dump: true,
		},
		"a dump when there was a hint under an index that has no name": {
			feed: func(f *fed) {
				f.hinted(50, 10, 1)
				f.hinted(60, 99, 2)
				f.dumped(300, dumpResync, seen(f, 2, 200)...)
			},
			changed: moved(2, wgroam.CauseData), proven: true, dump: true,
		},
		"a dump when there were more such hints than are kept": {
			feed: func(f *fed) {
				f.hinted(50, 10, 1)
				f.hinted(60, 99, 2)
				for i := range len(hints{}.list) {
					f.hinted(70+i, 99, 3+i)
				}
				f.dumped(300, dumpResync, seen(f, 2, 200)...)
			},
			changed: moved(2, wgroam.CauseData), proven: true, dump: true,
		},
		"two dumps between her handshake and the response": {
			feed: func(f *fed) {
				f.hinted(50, 10, 1)
				f.dumped(100, dumpPoll, seen(f, 2, 248)...)
				f.dumped(120, dumpPoll, seen(f, 2, 248)...)
				f.responded(130, alice, 12, 23, 2)
			},
			changed: moved(2, wgroam.CauseInitiation), dump: true,
		},
		"a dump when she never was hinted at": {
			feed:    func(f *fed) { f.dumped(100, dumpResync, seen(f, 2, 200)...) },
			changed: moved(2, wgroam.CauseData), proven: true,
		},
		"a dump when hints are missing": {
			feed: func(f *fed) {
				f.hinted(50, 10, 1)
				f.uplinkLost()
				f.dumped(100, dumpResync, seen(f, 2, 200)...)
			},
			changed: moved(2, wgroam.CauseData), proven: true, dump: true,
		},
		"a dump when there were too many hints": {
			feed: func(f *fed) {
				for i := range 5 {
					f.hinted(50+i, 10, 60+i)
				}
				f.dumped(300, dumpResync, seen(f, 2, 200)...)
			},
			changed: moved(2, wgroam.CauseData), proven: true, dump: true,
		},
		"an event that a dump has overtaken": {
			feed: func(f *fed) { f.dumped(200, dumpSweep, seen(f, 1, 100)...); answered(f) },
			dump: true,
		},
		"an event while the device was read": {
			feed: func(f *fed) {
				f.responded(201, alice, 12, 23, 2)
				f.dumped(200, dumpSweep, seen(f, 1, 100)...)
			},
			changed: moved(2, wgroam.CauseInitiation),
		},
		"the applier's write": {
			feed: func(f *fed) {
				f.cfg.View.Set(alice, wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseConfig, At: f.wall})
				f.moved(100, 20, 1, 2)
				f.initiated(110, alice, 12, 2)
				f.dumped(300, dumpSweep, seen(f, 2, 300)...)
			},
		},
		"the applier's write, and she comes back": {
			feed: func(f *fed) {
				f.cfg.View.Set(alice, wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseConfig, At: f.wall})
				f.hinted(300, 10, 1)
				f.moved(310, 20, 2, 1)
			},
			changed: []said{{alice, at(2), at(1), wgroam.CauseData}}, proven: true, dump: true,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := atPort(t)
			f.dumped(-2000, dumpStart, seen(f, 1, 100)...)
			f.responded(-1000, alice, 10, 20, 1)
			f.changed, f.proven = nil, nil
			if f.wantsDump() {
				t.Fatal("wants a dump although nothing has happened")
			}
			test.feed(f)
			var proven []said
			if test.proven {
				proven = test.changed
			}
			f.want(test.changed, proven)
			if got := f.wantsDump(); got != test.dump {
				t.Errorf("wants a dump: %v, want %v", got, test.dump)
			}
			if s := f.Status(); s.SweepRepairs != 0 {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// TestUplinkConfigured: what has explained a roam does not explain what an
// administrator does next.
func TestUplinkConfigured(t *testing.T) {
	seen := func(f *fed, ep int, received int64) wg.Peer {
		return wg.Peer{Key: alice, Endpoint: at(ep), LastHandshake: f.wall, Received: received}
	}
	tests := map[string]struct {
		feed func(*fed)
		back int // where the administrator sets her
	}{
		"bytes in a dump": {func(f *fed) {
			f.dumped(100, dumpResync, seen(f, 2, 200))
		}, 3},
		"bytes behind an event": {func(f *fed) {
			f.uplinkLost() // so that bytes are enough
			f.hinted(100, 10, 2)
			f.moved(110, 20, 1, 2)
			f.dumped(120, dumpResync, seen(f, 2, 200))
		}, 3},
		"a hint from where she was before": {func(f *fed) {
			f.hinted(50, 10, 1)
			f.hinted(100, 10, 2)
			f.moved(110, 20, 1, 2)
			f.dumped(120, dumpResync, seen(f, 2, 200))
			f.moved(300, 20, 2, 1)
		}, 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			f := atPort(t)
			f.dumped(-2000, dumpStart, seen(f, 1, 100))
			f.responded(-1000, alice, 10, 20, 1)
			f.changed, f.proven = nil, nil
			test.feed(f)
			roam := said{alice, at(1), at(2), wgroam.CauseData}
			f.want([]said{roam}, []said{roam})
			f.changed, f.proven = nil, nil
			for ms := 400; ms <= 1000; ms += 300 {
				f.dumped(ms, dumpResync, seen(f, test.back, 200))
			}
			f.want([]said{{alice, at(2), at(test.back), wgroam.CauseConfig}}, nil)
		})
	}
}

// TestUplinkNewPeer: a handshake with a peer that is not known yet. When it is,
// its session is, too.
func TestUplinkNewPeer(t *testing.T) {
	f := atPort(t)
	f.dumped(0, dumpStart, wg.Peer{Key: alice})
	f.responded(100, bob, 10, 20, 2)
	if !f.wantsDump() {
		t.Error("wants no dump for a peer that is not known")
	}
	for i := range 3 * maxUnnamed {
		f.responded(100+i, wgroam.Key{77}, 10, 20, 2) // of no peer
	}
	if len(f.unnamed) != maxUnnamed {
		t.Errorf("keeps %d messages", len(f.unnamed))
	}
	// In the middle of the handshake.
	f.dumped(200, dumpResync, wg.Peer{Key: alice}, wg.Peer{Key: bob, Endpoint: at(2), Received: 1})
	f.want(nil, nil)
	if k := f.sessions.local[10]; k != bob || len(f.unnamed) != 0 {
		t.Errorf("index of %v, %d messages kept", k, len(f.unnamed))
	}
	f.hinted(300, 10, 2)
	if !f.wantsDump() {
		t.Error("wants no dump")
	}
	f.dumped(500, dumpResync, wg.Peer{Key: alice},
		wg.Peer{Key: bob, Endpoint: at(2), Received: 1, LastHandshake: f.wall.Add(300 * time.Millisecond)})
	news := []said{{bob, none, at(2), wgroam.CauseData}}
	f.want(news, news)

	// Gone.
	for range 2 {
		f.dumped(900, dumpSweep, wg.Peer{Key: alice})
	}
	if s := f.sessions; len(s.peers)+len(s.local)+len(s.remote) != 0 {
		t.Errorf("remembers %+v", s)
	}
	f.hinted(1000, 10, 2) // in the kernel it is still there
	f.moved(1000, 20, 2, 3)
	f.want(nil, nil)
}

// TestUplinkRepairs: what a sweep finds that a hint should have told is counted. A poll
// is there to find what nothing tells.
func TestUplinkRepairs(t *testing.T) {
	for why, want := range map[dumpReason]uint64{dumpSweep: 1, dumpPoll: 0} {
		f := atPort(t)
		f.dumped(0, dumpStart, wg.Peer{Key: alice, Endpoint: at(1), LastHandshake: f.wall, Received: 1})
		f.dumped(1000, why, wg.Peer{Key: alice, Endpoint: at(2), LastHandshake: f.wall, Received: 2})
		if n := f.Status().SweepRepairs; n != want {
			t.Errorf("%d repairs, want %d", n, want)
		}
	}
}
