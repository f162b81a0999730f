// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"context"
	be "encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// sniffed is how many messages a sniffer keeps.
const sniffed = 64

// sniffer keeps the newest messages of WireGuard that a gateway received or sent.
type sniffer struct {
	tap  *os.File
	done chan struct{} // closed when it has stopped

	mu   sync.Mutex
	seen [sniffed][]byte
	n    int
}

// sniff starts one, which ends with the test.
func sniff(t *testing.T, gw *lab.Gateway) *sniffer {
	s := &sniffer{tap: openTap(t, gw, unix.ETH_P_ALL), done: make(chan struct{})}
	for i := range s.seen {
		s.seen[i] = make([]byte, 32) // no type
	}
	t.Cleanup(s.stop)
	go func() {
		defer close(s.done)
		buf := make([]byte, 1<<16)
		for {
			n, err := s.tap.Read(buf)
			if err != nil {
				if !errors.Is(err, os.ErrClosed) {
					t.Errorf("sniff: %v", err)
				}
				return
			}
			p := buf[:n]
			switch {
			case n > 20 && p[0] == 0x45 && p[9] == unix.IPPROTO_UDP:
				p = p[20:]
			case n > 40 && p[0]>>4 == 6 && p[6] == unix.IPPROTO_UDP:
				p = p[40:]
			default:
				continue
			}
			if len(p) < 8+32 || be.BigEndian.Uint16(p) != lab.ListenPort && be.BigEndian.Uint16(p[2:]) != lab.ListenPort {
				continue
			}
			s.mu.Lock()
			s.seen[s.n%sniffed] = bytes.Clone(p[8:])
			s.n++
			s.mu.Unlock()
		}
	}()
	return s
}

// stop makes it keep what it has.
func (s *sniffer) stop() {
	s.tap.Close()
	<-s.done
}

func (s *sniffer) message(i int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[i]
}

// forge makes a message of any type: a random one, such a one with the index of a
// live session in it, or a repetition of what was on the wire. It takes as many
// random numbers whatever was.
func forge(rng *rand.Rand, live *sniffer) []byte {
	kind := byte(1 + rng.IntN(4))
	p := make([]byte, []int{0, 148, 92, 64, 96}[kind])
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	be.LittleEndian.PutUint32(p, uint32(kind))
	switch seen := live.message(rng.IntN(sniffed)); rng.IntN(4) {
	case 0:
		return seen
	case 1: // as the receiver of all types, and as the sender
		copy(p[4:], seen[4:8])
		copy(p[8:], seen[4:8])
	}
	return p
}

// TestFloodDelay: a roam is found beneath a flood of whatever somebody can forge who
// hears all, within 2 s, and nothing else is found. A time also measures how much of
// the processor the flood leaves. So dumps are counted: those that events ask for
// begin 200 ms after the one before, or, where reading the device takes more than
// 20 ms, after nine times as long. And a machine that took long without the flood
// may take ten times as long.
func TestFloodDelay(t *testing.T) {
	const most = 3 // one that was under way, one that leaves alone what has just moved, and one that shows it
	l := newLab(t, lab.Config{Clients: 2})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	dir := t.TempDir()
	// Nothing else finds it: neither polls nor the sweep.
	cfg := strings.Replace(config(a, dir), `poll_interval = "20ms"`, "poll_interval = \"1h\"\nsweep_interval = \"1h\"", 1)
	n := startNode(t, a, dir, cfg)
	w := watch(t, a, "--socket", n.socket)
	w.says("watching through the daemon")
	live := sniff(t, a)
	ping(t, c)
	n.awaitRecord(c.Key(), c.Endpoint())
	genuine := []netip.AddrPort{c.Endpoint()}

	roams := func(what string) (slowest time.Duration) {
		t.Helper()
		for i := range 6 {
			ep, err := c.RoamPort()
			if err != nil {
				t.Fatal(err)
			}
			genuine = append(genuine, ep)
			await(t, "the device has it", func() (bool, string) {
				// Packets get lost in the flood. By turns it is one that is answered.
				conn, err := c.Dial(t.Context(), "udp4", []int{lab.EchoPort, lab.DiscardPort}[i%2])
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				_, _ = conn.Write([]byte("wgroam"))
				got, err := a.Endpoint(c.Key())
				if err != nil {
					t.Fatal(err)
				}
				return got == ep, got.String()
			})
			began, before, now := time.Now(), n.status().Resyncs, uint64(0)
			await(t, "the daemon has it", func() (bool, string) {
				now = n.status().Resyncs
				all := n.peers()
				return slices.ContainsFunc(all, func(p control.Peer) bool { return p.Peer == c.Key() && p.Held == ep }), fmt.Sprintf("%+v", all)
			})
			took := time.Since(began)
			slowest = max(slowest, took)
			t.Logf("%s: found %v and %d dumps after the device had it", what, took.Round(time.Millisecond), now-before)
			if now-before > most {
				t.Errorf("%s: found after %d dumps, want %d at most", what, now-before, most)
			}
		}
		return slowest
	}
	limit := max(2*time.Second, 10*roams("quiet"))
	// What is repeated has arrived before. If it got lost in the flood, WireGuard would
	// take the repetition for a roam, and rightly.
	live.stop()

	ctx, stop := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	defer flood.Wait()
	defer stop()
	var sent atomic.Uint64
	flood.Go(func() {
		err := h.Do(func() error {
			rng := rand.New(rand.NewPCG(1, 0))
			conn, err := net.ListenUDP("udp4", nil)
			if err != nil {
				return err
			}
			defer conn.Close()
			for ctx.Err() == nil {
				// A full queue on the way is what a flood is.
				_, _ = conn.WriteToUDPAddrPort(forge(rng, live), netip.AddrPortFrom(lab.VIP4, lab.ListenPort))
				sent.Add(1)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
	await(t, "the flood is on", func() (bool, string) { return sent.Load() > 10_000, "" })
	if took := roams("flood"); took > limit {
		t.Errorf("found %v after the device had it, want %v at most", took, limit)
	}
	stop()
	flood.Wait()
	s := n.status()
	t.Logf("detector %s, %d changes, %d dumps, %d forged messages", s.Detector.Rung, s.Events, s.Resyncs, sent.Load())
	if s.SweepRepairs != 0 {
		t.Errorf("the sweep repaired %d", s.SweepRepairs)
	}
	for _, e := range w.seen() {
		if !slices.Contains(genuine, e.New) {
			t.Errorf("the client was never at %v: %+v", e.New, e)
		}
	}
}
