// SPDX-License-Identifier: MIT

package test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam/internal/lab"
)

var faultFor = flag.Duration("fault", 10*time.Second, "how long a fault of TestFaults lasts")

// world is a group whose clients roam at the active all the time.
type world struct {
	t     *testing.T // the part that runs
	whole *testing.T
	lab   *lab.Lab
	nodes []*node
}

// restart starts the daemon of a gateway again after it was killed.
func (w *world) restart(i int) {
	n := w.nodes[i]
	cfg, err := os.ReadFile(n.file)
	if err != nil {
		w.t.Fatal(err)
	}
	w.nodes[i] = startNode(w.whole, n.gw, filepath.Dir(n.file), string(cfg))
}

func (w *world) kill(i int) {
	n := w.nodes[i]
	if err := n.cmd.Process.Kill(); err != nil {
		w.t.Fatal(err)
	}
	<-n.exited
}

func (w *world) signal(i int, s syscall.Signal) {
	if err := w.nodes[i].cmd.Process.Signal(s); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// roams moves clients, one after the other, for so long, and returns how often.
func (w *world) roams(d time.Duration) (n int) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(d); time.Now().Before(end); n++ {
		<-tick.C
		c := w.lab.Clients[n%len(w.lab.Clients)]
		_, err := c.RoamPort()
		if err == nil {
			err = c.Send(1)
		}
		w.must(err)
	}
	// So that the active knows the last place of each.
	for _, c := range w.lab.Clients {
		_, err := c.RoamPort()
		w.must(err)
		ping(w.t, c)
	}
	return n
}

// converge waits until every device has what the active's has, which is where
// the clients are, and returns how long that took.
func (w *world) converge() time.Duration {
	w.t.Helper()
	want := make(map[string]netip.AddrPort)
	for _, c := range w.lab.Clients {
		want[c.Key().String()] = c.Endpoint()
	}
	began := time.Now()
	await(w.t, "all devices agree", func() (bool, string) {
		for _, gw := range w.lab.Gateways {
			eps, err := gw.Endpoints()
			w.must(err)
			got := make(map[string]netip.AddrPort)
			for k, ep := range eps {
				got[k.String()] = ep
			}
			if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				return false, fmt.Sprintf("%s differs from the clients:\n%s", gw.Name, diff)
			}
		}
		return true, ""
	})
	return time.Since(began)
}

// fault is something that breaks, and is mended.
type fault struct {
	name        string
	breaks, end func(*world)
}

func (w *world) suffer(faults []fault) {
	for _, f := range faults {
		w.t.Run(f.name, func(t *testing.T) {
			w.t = t
			defer func() { w.t = w.whole }()
			w.roams(time.Second)
			f.breaks(w)
			n := w.roams(*faultFor)
			f.end(w)
			took := w.converge()
			lost := uint64(0)
			for _, n := range w.nodes {
				lost += n.status().SweepRepairs
			}
			t.Logf("%v with %d roams; equal tables and devices %v after the end; %d lost", *faultFor, n, took.Round(time.Millisecond), lost)
		})
	}
}

// TestFaults: whatever breaks while clients roam, all devices are right soon
// after it is mended, without anybody speaking again.
func TestFaults(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}, Clients: 5})
	w := &world{t: t, whole: t, lab: l, nodes: startMesh(t, l)}
	for _, c := range l.Clients {
		ping(t, c)
	}
	w.suffer([]fault{
		{
			"standby cut off",
			func(w *world) { w.must(l.Gateways[1].Kill()) },
			func(w *world) { w.must(l.Gateways[1].Revive()) },
		},
		{
			"split in three",
			func(w *world) { w.must(l.Gateways[1].Kill()); w.must(l.Gateways[2].Kill()) },
			func(w *world) { w.must(l.Gateways[2].Revive()); w.must(l.Gateways[1].Revive()) },
		},
		{
			"standby's daemon killed",
			func(w *world) { w.kill(1) }, func(w *world) { w.restart(1) },
		},
		{
			"active's daemon killed",
			func(w *world) { w.kill(0) }, func(w *world) { w.restart(0) },
		},
		{
			"standby's daemon stopped",
			func(w *world) { w.signal(1, syscall.SIGSTOP) }, func(w *world) { w.signal(1, syscall.SIGCONT) },
		},
		{
			"active's daemon stopped",
			func(w *world) { w.signal(0, syscall.SIGSTOP) }, func(w *world) { w.signal(0, syscall.SIGCONT) },
		},
	})
}

// TestFaultsOnBus: the same with an existing NATS, whose server is restarted, and
// which repeats, delays and reorders all that is said on it.
func TestFaultsOnBus(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "bus"}, Clients: 5})
	broker, gateways := l.Gateways[2], l.Gateways[:2]
	url, nc, stop := runBus(t, broker)
	w := &world{t: t, whole: t, lab: l}
	for _, gw := range gateways {
		dir := t.TempDir()
		w.nodes = append(w.nodes, startNode(t, gw, dir, onBus(gw, dir, url)))
	}
	for _, n := range w.nodes {
		n.awaitNodes(1)
	}
	for _, c := range l.Clients {
		ping(t, c)
	}
	w.lab.Gateways = gateways
	defer func() { w.lab.Gateways = append(gateways, broker) }()
	w.suffer([]fault{
		{
			"echoes",
			func(w *world) { echo(w.t, nc) },
			func(*world) {},
		},
		{
			"server restarted",
			func(*world) { stop() },
			func(w *world) { _, nc, stop = runBus(w.whole, broker) },
		},
		{
			"standby cut off",
			func(w *world) { w.must(gateways[1].Kill()) },
			func(w *world) { w.must(gateways[1].Revive()) },
		},
	})
	stop()
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
