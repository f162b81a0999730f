// SPDX-License-Identifier: MIT

package test

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/lab"
)

var faultFor = flag.Duration("fault", 30*time.Second, "how long a fault of TestFaults lasts")

// world is a group whose clients roam all the time.
type world struct {
	t      *testing.T
	lab    *lab.Lab
	nodes  []*node
	broker *lab.Gateway // of an existing NATS; nil for a mesh
	ns     *server.Server
	nc     *nats.Conn // to it, of a stranger
	places map[wgroam.Key][]place
}

// place is where a client has spoken from.
type place struct {
	at   netip.AddrPort
	time time.Time
}

// newWorld starts a mesh.
func newWorld(t *testing.T, l *lab.Lab) *world {
	w := &world{t: t, lab: l, places: make(map[wgroam.Key][]place)}
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		w.nodes = append(w.nodes, startNode(t, gw, dir, stateApart(dir, config(gw, dir, others(l, gw)...))))
	}
	w.settle()
	return w
}

// newBusWorld starts nodes on an existing NATS, which is that of the last gateway.
func newBusWorld(t *testing.T, l *lab.Lab) *world {
	w := &world{t: t, lab: l, places: make(map[wgroam.Key][]place)}
	nodes := l.Gateways[:len(l.Gateways)-1]
	w.broker = l.Gateways[len(nodes)]
	w.serve()
	t.Cleanup(func() { w.shutdown() })
	for _, gw := range nodes {
		dir := t.TempDir()
		w.nodes = append(w.nodes, startNode(t, gw, dir, stateApart(dir, onBus(gw, dir, "nats://"+w.ns.Addr().String()))))
	}
	w.settle()
	return w
}

// stateApart has a node keep its state in a directory that nothing else is in.
func stateApart(dir, cfg string) string {
	return strings.Replace(cfg, fmt.Sprintf("[state]\ndir = %q", dir), fmt.Sprintf("[state]\ndir = %q", filepath.Join(dir, "state")), 1)
}

func stateOf(n *node) string { return filepath.Join(filepath.Dir(n.file), "state") }

// settle waits until the nodes are in step, and all clients have spoken.
func (w *world) settle() {
	for _, n := range w.nodes {
		n.awaitNodes(len(w.nodes) - 1)
	}
	w.rest(w.lab.Clients)
}

func (w *world) serve() {
	w.ns, w.nc = runServer(w.t, w.broker, func(o *server.Options) { o.MaxPending = 1 << 20 })
}

func (w *world) shutdown() {
	w.nc.Close()
	w.ns.Shutdown()
	w.ns.WaitForShutdown()
}

// restart starts the daemon of a gateway again after it was killed.
func (w *world) restart(i int) {
	n := w.nodes[i]
	cfg, err := os.ReadFile(n.file)
	w.must(err)
	w.nodes[i] = startNode(w.t, n.gw, filepath.Dir(n.file), string(cfg))
}

func (w *world) kill(i int) { w.nodes[i].kill() }

func (w *world) signal(i int, s syscall.Signal) { w.must(w.nodes[i].cmd.Process.Signal(s)) }

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// move takes a client to another port, from where it speaks.
func (w *world) move(c *lab.Client) error {
	ep, err := c.RoamPort()
	w.places[c.Key()] = append(w.places[c.Key()], place{ep, time.Now()})
	return errors.Join(err, c.Send(1))
}

// rest takes clients to another place each, of which the active knows for certain.
func (w *world) rest(clients []*lab.Client) {
	for _, c := range clients {
		w.must(w.move(c))
		ping(w.t, c)
	}
}

// roams moves clients, one after the other, for so long, and returns how often.
func (w *world) roams(d time.Duration, clients ...*lab.Client) (n int) {
	if len(clients) == 0 {
		clients = w.lab.Clients
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(d); time.Now().Before(end); n++ {
		<-tick.C
		w.must(w.move(clients[n%len(clients)]))
	}
	w.rest(clients)
	return n
}

// missing counts what the nodes lack of what was seen until then: for each node and
// client, the places that are newer than the one in its table, or that in its device if
// that is older.
func (w *world) missing(until time.Time) (count int, where string) {
	w.t.Helper()
	for _, n := range w.nodes {
		device, err := n.gw.Endpoints()
		w.must(err)
		table := make(map[wgroam.Key]netip.AddrPort)
		for _, p := range n.peers() {
			table[p.Peer] = p.Endpoint
		}
		for peer, places := range w.places {
			newer := 0
			for _, ep := range []netip.AddrPort{table[peer], device[peer]} {
				behind := 0
				for _, p := range slices.Backward(places) {
					if p.at == ep {
						break
					}
					if p.time.Before(until) {
						behind++
					}
				}
				newer = max(newer, behind)
			}
			if newer > 0 {
				where = fmt.Sprintf("gw-%s has %v at %v, its device at %v; the last of %d places was %v",
					n.gw.Name, peer, table[peer], device[peer], len(places), places[len(places)-1].at)
			}
			count += newer
		}
	}
	return count, where
}

// converge waits until no node lacks anything that was seen until then. It returns how
// much they lacked at first, how long it took, and how much they lack still.
func (w *world) converge(until time.Time) (behind int, took time.Duration, lost int) {
	w.t.Helper()
	began := time.Now()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	behind, where := w.missing(until)
	for lost = behind; lost > 0; lost, where = w.missing(until) {
		if time.Since(began) > patience {
			w.t.Errorf("%d updates lost: %s", lost, where)
			break
		}
		<-tick.C
	}
	return behind, time.Since(began), lost
}

// quiet returns how long a roam takes to every table and device when nothing is
// broken: the longest of some.
func (w *world) quiet() (longest time.Duration) {
	w.t.Helper()
	for range 5 {
		w.must(w.move(w.lab.Clients[len(w.lab.Clients)-1]))
		_, took, _ := w.converge(time.Now())
		longest = max(longest, took)
	}
	return longest
}

// fault is something that breaks while clients roam, and is mended.
type fault struct {
	name   string
	lasts  time.Duration // zero: as the flag says
	bus    bool          // two gateways on an existing NATS
	more   []string      // gateways of a mesh, besides two
	kernel time.Duration // that the kernel may take besides, for something of its own
	breaks func(*world)
	roams  func(*world) int // nil: all clients, at the active
	mend   func(*world)
	after  func(*world) // what else is to be seen then; nil: nothing
}

// suffer has clients roam for as long as the fault lasts. Afterwards nobody speaks.
func (w *world) suffer(f fault) {
	lasts := cmp.Or(f.lasts, *faultFor)
	w.roams(time.Second)
	w.converge(time.Now())
	quiet := w.quiet()
	f.breaks(w)
	var n int
	if f.roams != nil {
		n = f.roams(w)
	} else {
		n = w.roams(lasts)
	}
	f.mend(w)
	behind, took, lost := w.converge(time.Now())
	w.t.Logf("%s: %v with %d roams; %d updates behind at its end, tables and devices equal %v later; %d lost",
		f.name, lasts, n, behind, took.Round(time.Millisecond), lost)
	for _, n := range w.nodes {
		n.awaitNodes(len(w.nodes) - 1)
	}
	if f.after != nil {
		f.after(w)
	}
	quiet = max(quiet, w.quiet())
	// On a machine where a roam takes longer than a tenth of that, so may this.
	if within := f.kernel + max(time.Second, 10*quiet); took > within {
		w.t.Errorf("%s: equal after %v, want %v at most; a roam took up to %v before and after", f.name, took, within, quiet)
	}
}

// TestFaults: whatever breaks while clients roam, all tables and devices are right
// within a second after it is mended, without anybody speaking again.
func TestFaults(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	const active, standby = 0, 1
	for _, f := range slices.Concat(
		faultsOf("active's daemon", false, active),
		faultsOf("standby's daemon", false, standby),
		blackHoles("active to standby", false, func(w *world) (from, to *lab.Gateway) { return w.nodes[active].gw, w.nodes[standby].gw }),
		blackHoles("active to server", true, func(w *world) (from, to *lab.Gateway) { return w.nodes[active].gw, w.broker }),
		blackHoles("standby to server", true, func(w *world) (from, to *lab.Gateway) { return w.nodes[standby].gw, w.broker }),
		shortHoles(func(w *world) (from, to *lab.Gateway) { return w.nodes[active].gw, w.broker }),
		[]fault{
			{
				name:   "split in three",
				more:   []string{"x"},
				breaks: func(w *world) { w.split(true) },
				roams:  roamsApart,
				mend:   func(w *world) { w.split(false) },
			},
			{
				name:   "standby's link down",
				kernel: time.Second, // it asks for an unknown neighbour once a second (retrans_time_ms)
				breaks: func(w *world) { w.must(w.nodes[standby].gw.Kill()) },
				mend:   func(w *world) { w.must(w.nodes[standby].gw.Revive()) },
			},
			{
				name:   "all daemons killed",
				breaks: func(w *world) { w.kill(active); w.kill(standby) },
				mend:   func(w *world) { w.restart(standby); w.restart(active) },
			},
			diskFull(),
			{
				name:   "server restarted",
				bus:    true,
				breaks: func(w *world) { w.shutdown() },
				mend:   func(w *world) { w.serve() },
			},
			{
				name:   "echoes",
				bus:    true,
				breaks: func(w *world) { echo(w.t, w.nc) },
				mend:   func(*world) {},
			},
			{
				name:   "standby does not read",
				bus:    true,
				breaks: func(w *world) { w.signal(standby, syscall.SIGSTOP); w.drown() },
				mend:   func(w *world) { w.signal(standby, syscall.SIGCONT) },
			},
			{name: "former lives replayed, mesh", breaks: replayLives, mend: func(*world) {}},
			{name: "former lives replayed, bus", bus: true, breaks: replayLives, mend: func(*world) {}},
		},
	) {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			if f.bus {
				newBusWorld(t, newLab(t, lab.Config{Gateways: []string{"a", "h", "bus"}, Clients: 5})).suffer(f)
				return
			}
			newWorld(t, newLab(t, lab.Config{Gateways: append([]string{"a", "h"}, f.more...), Clients: 5})).suffer(f)
		})
	}
}

// faultsOf are what happens to the daemon of a node.
func faultsOf(name string, bus bool, i int) []fault {
	return []fault{
		{
			name: name + " killed", bus: bus,
			breaks: func(w *world) { w.kill(i) },
			mend:   func(w *world) { w.restart(i) },
		},
		{
			name: name + " stopped", bus: bus,
			breaks: func(w *world) { w.signal(i, syscall.SIGSTOP) },
			mend:   func(w *world) { w.signal(i, syscall.SIGCONT) },
		},
	}
}

// blackHoles are faults in which packets are lost in one direction, in the other, and in both.
func blackHoles(name string, bus bool, between func(*world) (from, to *lab.Gateway)) []fault {
	one := func(name string, there, back bool) fault {
		each := func(f func(a, b *lab.Gateway) error) func(*world) {
			return func(w *world) {
				a, b := between(w)
				if there {
					w.must(f(a, b))
				}
				if back {
					w.must(f(b, a))
				}
			}
		}
		return fault{name: name, bus: bus, breaks: each((*lab.Gateway).Lose), mend: each((*lab.Gateway).Reach)}
	}
	return []fault{
		one("black hole from "+name, true, false),
		one("black hole back from "+name, false, true),
		one("black hole from "+name+" and back", true, true),
	}
}

// shortHoles are black holes that may be over before anybody has noticed them, or while TCP waits
// to try again.
func shortHoles(between func(*world) (from, to *lab.Gateway)) (faults []fault) {
	for _, lasts := range []time.Duration{900 * time.Millisecond, 1500 * time.Millisecond, 2 * time.Second, 2500 * time.Millisecond} {
		f := blackHoles("active to server", true, between)[2]
		f.name, f.lasts = fmt.Sprintf("%s for %v", f.name, lasts), lasts
		faults = append(faults, f)
	}
	return faults
}

// split separates all gateways from each other, but not from the clients.
func (w *world) split(yes bool) {
	for _, a := range w.lab.Gateways {
		for _, b := range others(w.lab, a) {
			if yes {
				w.must(a.Lose(b))
			} else {
				w.must(a.Reach(b))
			}
		}
	}
}

// roamsApart has clients roam at each of the gateways in turn, always fewer of them, so that in the
// end each gateway has seen somebody last.
func roamsApart(w *world) (n int) {
	for i, gw := range w.lab.Gateways {
		w.must(w.lab.MoveVIP(gw))
		clients := w.lab.Clients[i:]
		for _, c := range clients {
			w.must(c.Forget())
		}
		w.rest(clients)
		n += w.roams(*faultFor/time.Duration(len(w.lab.Gateways)), clients...)
	}
	return n
}

// diskFull leaves no room for state. One of the daemons is restarted meanwhile.
func diskFull() fault {
	filler := func(n *node) string { return filepath.Join(stateOf(n), "filler") }
	says := func(w *world, n *node, want string) {
		await(w.t, fmt.Sprintf("%s says %q of its snapshot", n.gw.Name, want), func() (bool, string) {
			got := n.status().Snapshot.Error
			return strings.Contains(got, want) && (want == "") == (got == ""), got
		})
	}
	return fault{
		name: "disk full",
		breaks: func(w *world) {
			for _, n := range w.nodes {
				state := stateOf(n)
				w.must(os.MkdirAll(state, 0o700))
				w.must(unix.Mount("tmpfs", state, "tmpfs", 0, "size=64k"))
				w.t.Cleanup(func() { _ = unix.Unmount(state, unix.MNT_DETACH) }) // the daemon may be there still
				if err := os.WriteFile(filler(n), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
					w.t.Fatalf("a full disk says %v", err)
				}
			}
		},
		roams: func(w *world) int {
			n := w.roams(*faultFor / 2)
			w.kill(1)
			w.restart(1)
			n += w.roams(*faultFor / 2)
			for _, n := range w.nodes {
				says(w, n, unix.ENOSPC.Error())
			}
			return n
		},
		mend: func(w *world) {
			for _, n := range w.nodes {
				w.must(os.Remove(filler(n)))
			}
		},
		after: func(w *world) {
			for _, n := range w.nodes {
				says(w, n, "")
			}
		},
	}
}

// drown says so much to the group that the server gives up those who do not read.
func (w *world) drown() {
	noise := make([]byte, 64<<10)
	subject := strings.TrimSuffix(w.nodes[0].status().Feed.Subjects, ">") + "u.x"
	await(w.t, "cut off", func() (bool, string) {
		for range 64 {
			w.must(w.nc.Publish(subject, noise))
		}
		w.must(w.nc.Flush())
		return w.ns.NumSlowConsumers() > 0, "not yet"
	})
}

// echo says everything that is said on the bus again, twice, some time later and
// in another order, for the rest of the test.
func echo(t *testing.T, nc *nats.Conn) {
	t.Helper()
	var (
		mu    sync.Mutex
		said  = make(map[string]bool)
		end   = make(chan struct{})
		tasks sync.WaitGroup
	)
	sub, err := nc.Subscribe("wgroam.>", func(m *nats.Msg) {
		mu.Lock()
		again := said[string(m.Data)]
		said[string(m.Data)] = true
		mu.Unlock()
		if again {
			return // ours
		}
		for range 2 {
			delay := time.Duration(rand.Int64N(int64(2 * time.Second)))
			tasks.Go(func() {
				select {
				case <-time.After(delay):
					_ = nc.PublishMsg(&nats.Msg{Subject: m.Subject, Reply: m.Reply, Data: m.Data}) // nobody may be there any more
				case <-end:
				}
			})
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = sub.Unsubscribe() // the server may be gone
		close(end)
		tasks.Wait()
	})
}

// dialer implements nats.CustomDialer in the namespace of a gateway.
type dialer struct{ *lab.Gateway }

// Dial implements nats.CustomDialer.
func (d dialer) Dial(network, addr string) (conn net.Conn, err error) {
	err = d.Do(func() error {
		conn, err = net.Dial(network, addr)
		return err
	})
	return conn, err
}

// taps returns a connection to each server of the group, as a member has it.
func (w *world) taps() []*nats.Conn {
	if w.broker != nil {
		return []*nats.Conn{w.nc}
	}
	var taps []*nats.Conn
	for _, n := range w.nodes {
		dev, err := n.gw.WG().Device(n.gw.Device())
		w.must(err)
		keys, err := feed.Derive(dev.PrivateKey, nil)
		w.must(err)
		nc, err := nats.Connect("nats://"+netip.AddrPortFrom(n.gw.Addr4, 4950).String(),
			nats.Secure(keys.TLS()), nats.TLSHandshakeFirst(), nats.SetCustomDialer(dialer{n.gw}),
			nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond), nats.ReconnectBufSize(-1))
		w.must(err)
		w.t.Cleanup(nc.Close)
		taps = append(taps, nc)
	}
	return taps
}

// replayLives records a whole life of each daemon, from its first question to its death,
// and says all of it again in the next, by turns and for the rest of the test.
func replayLives(w *world) {
	var rec recorder
	var subs []*nats.Subscription
	taps := w.taps()
	for _, nc := range taps {
		sub, err := nc.Subscribe(w.nodes[0].status().Feed.Subjects, rec.add)
		w.must(err)
		w.must(nc.Flush())
		subs = append(subs, sub)
	}
	again := func() {
		for i := range w.nodes {
			w.kill(i)
			w.restart(i)
			// What it asks passes the server of a node that lives, where the tap hears it. That at its
			// own is connected again a moment too late.
			w.settle()
		}
	}
	again()
	w.roams(time.Second)
	for _, sub := range subs {
		w.must(sub.Unsubscribe())
	}
	kinds := make(map[string]int)
	said := rec.all()
	for _, m := range said {
		kinds[strings.Split(m.Subject, ".")[3]]++
	}
	for _, kind := range []string{"u", "b", "q", "r"} {
		if kinds[kind] == 0 {
			w.t.Fatalf("recorded %v", kinds)
		}
	}
	again()

	ctx, cancel := context.WithCancel(context.Background())
	var task sync.WaitGroup
	task.Go(func() {
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			m := said[rand.IntN(len(said))]
			for _, nc := range taps {
				_ = nc.PublishMsg(&nats.Msg{Subject: m.Subject, Reply: m.Reply, Data: m.Data}) // the server may be gone
			}
			<-tick.C
		}
	})
	w.t.Cleanup(func() { cancel(); task.Wait() })
}
