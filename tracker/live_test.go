// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/wg"
)

// patience bounds every wait. Emulated machines are slow; none waits this long
// in health.
const patience = 30 * time.Second

func await(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not after %v", what, patience)
		}
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("CI") == "true":
		t.Fatal("BPF programs and network namespaces need root")
	default:
		t.Skip("BPF programs and network namespaces need root")
	}
}

// needKernel skips a test that is about kernel WireGuard where the kernel has
// none. That of test/vm has it, or is broken.
func needKernel(t testing.TB) {
	t.Helper()
	needRoot(t)
	if lab.KernelWireGuard() {
		return
	}
	release := kernelRelease()
	if lab.InVM() {
		t.Fatalf("kernel %s has no WireGuard", release)
	}
	t.Skipf("kernel %s has no WireGuard", release)
}

// kernelRelease is what uname -r prints, as in 6.1.0-56-cloud-amd64.
func kernelRelease() string {
	var u unix.Utsname
	_ = unix.Uname(&u) // cannot fail with a valid address
	return unix.ByteSliceToString(u.Release[:])
}

// countsMissed reports whether bpf.Hook.Missed tells of every run that a hook on this
// kernel has missed: with kprobes that is so since Linux 6.7.
func countsMissed(t testing.TB, rung Rung) bool {
	t.Helper()
	var major, minor int
	if _, err := fmt.Sscanf(kernelRelease(), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return rung != RungKprobe || major > 6 || major == 6 && minor >= 7
}

func newLab(t testing.TB, cfg lab.Config) *lab.Lab {
	t.Helper()
	needRoot(t)
	l, err := lab.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// shared are the hooks of most tests, by rung: to attach one takes seconds in an
// emulated machine.
var shared = map[Rung]*Kernel{
	RungFentry: {},
	RungKprobe: {attach: bpf.AttachKprobe},
}

// nobody follows a device that does not exist, so that a hook stays attached
// between tests.
var nobody = subscriber{silent: func() {}, lost: func(bool) {}, broken: func(error) {}}

// polled is a Kernel that leaves a tracker no better source than polling.
func polled(t testing.TB) *Kernel {
	t.Helper()
	k := &Kernel{}
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	return k
}

// ports are what those Kernels leave a tracker that cannot attach, for a test.
var ports = make(map[*Kernel]*Port)

// ported is a Kernel that leaves a tracker no better source than the UDP port.
func ported(t testing.TB) *Kernel {
	t.Helper()
	k := polled(t)
	ports[k] = &Port{}
	t.Cleanup(func() {
		if err := ports[k].Close(); err != nil {
			t.Error(err)
		}
		delete(ports, k)
	})
	return k
}

// eachRung runs a test with the hook, as eachHook does, at the UDP port, and with
// polling.
func eachRung(t *testing.T, f func(*testing.T, *Kernel)) {
	eachHook(t, f)
	t.Run("port", func(t *testing.T) { needRoot(t); f(t, ported(t)) })
	t.Run("polling", func(t *testing.T) { needRoot(t); f(t, polled(t)) })
}

// eachHook runs a test with the hook in each way to attach it, where the kernel
// can carry it.
func eachHook(t *testing.T, f func(*testing.T, *Kernel)) {
	for _, rung := range []Rung{RungFentry, RungKprobe} {
		t.Run(string(rung), func(t *testing.T) {
			needKernel(t)
			if _, err := shared[rung].follow(bpf.Device{Ifindex: 1 << 30}, 1, &nobody); err != nil {
				t.Fatal(err)
			}
			f(t, shared[rung])
		})
	}
}

// live is a tracker of a gateway's device.
type live struct {
	*Tracker
	t    testing.TB
	gw   *lab.Gateway
	view *wgroam.View

	slow atomic.Int64 // how long Changed takes, in nanoseconds; may change meanwhile

	mu      sync.Mutex
	changed []wgroam.Observation
	proven  []wgroam.Observation

	stopOnce sync.Once
	cancel   context.CancelFunc
	done     chan error
}

// start starts a tracker without a sweep worth the name.
func start(t testing.TB, gw *lab.Gateway, kernel *Kernel) *live {
	t.Helper()
	return startWith(t, gw, kernel, time.Hour)
}

func startWith(t testing.TB, gw *lab.Gateway, kernel *Kernel, sweep time.Duration) *live {
	t.Helper()
	return startAt(t, gw, kernel, sweep, false)
}

// startAt starts a tracker. On the rung port, young makes it think that there may
// be sessions which are older.
func startAt(t testing.TB, gw *lab.Gateway, kernel *Kernel, sweep time.Duration, young bool) *live {
	t.Helper()
	v := prepare(t, gw, kernel, sweep)
	want := RungFentry
	if kernel.attach != nil {
		want = RungKprobe
	}
	switch {
	case ports[kernel] != nil:
		want = RungPort
	case kernel.closed:
		want = RungPolling
	}
	if s := v.Status(); s.Rung != want || (s.Reason == "") != (want == RungFentry) {
		t.Fatalf("status %+v, want rung %s", s, want)
	}
	if !young {
		// As if all sessions had begun since: nothing is polled any more.
		v.Tracker.mu.Lock()
		v.since = time.Now().Add(-rejectAfter)
		v.Tracker.mu.Unlock()
	}
	v.run()
	return v
}

// startRefused starts a tracker, on whatever rung.
func startRefused(t testing.TB, gw *lab.Gateway, kernel *Kernel) *live {
	t.Helper()
	v := prepare(t, gw, kernel, time.Hour)
	v.run()
	return v
}

// prepare makes a tracker that has yet to run.
func prepare(t testing.TB, gw *lab.Gateway, kernel *Kernel, sweep time.Duration) *live {
	t.Helper()
	port := ports[kernel]
	if port == nil {
		port = &Port{closed: true}
	}
	v := &live{t: t, gw: gw, view: wgroam.NewView(), done: make(chan error, 1)}
	cfg := Config{
		Device: gw.Device(), Kernel: kernel, Port: port, View: v.view,
		Changed: func(o wgroam.Observation) {
			v.mu.Lock()
			v.changed = append(v.changed, o)
			v.mu.Unlock()
			// Not with a timer, whose millisecond is too long.
			for began := time.Now(); time.Since(began) < time.Duration(v.slow.Load()); {
				runtime.Gosched()
			}
		},
		Proven: func(o wgroam.Observation) {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.proven = append(v.proven, o)
		},
		Poll: 20 * time.Millisecond, Sweep: sweep, Log: quiet(),
	}
	err := gw.Do(func() error {
		l, err := wg.LinkByName(gw.Device())
		if err != nil {
			return err
		}
		cfg.Ifindex = l.Ifindex
		if cfg.Netns, err = wg.Netns(); err != nil {
			return err
		}
		if cfg.Space, err = wg.OpenSpace(gw.NetNS()); err != nil {
			return err
		}
		cfg.WG, err = wg.Open()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	v.begin(cfg)
	return v
}

// begin starts a tracker, which has its device and namespace until the test ends.
func (v *live) begin(cfg Config) {
	v.t.Helper()
	v.t.Cleanup(func() { cfg.WG.Close(); cfg.Space.Close() })
	v.Tracker = New(cfg)
	if err := v.Start(); err != nil {
		v.t.Fatal(err)
	}
}

// run runs the tracker until the test ends, or stop is called.
func (v *live) run() {
	var ctx context.Context
	ctx, v.cancel = context.WithCancel(context.Background())
	go func() { v.done <- v.Run(ctx) }()
	v.t.Cleanup(func() { v.stop() })
}

// stop ends Run and returns how long that took.
func (v *live) stop() (took time.Duration) {
	v.t.Helper()
	v.stopOnce.Do(func() {
		began := time.Now()
		v.cancel()
		if err := <-v.done; err != nil {
			v.t.Errorf("Run: %v", err)
		}
		took = time.Since(began)
	})
	return took
}

// ended waits for Run to end by itself.
func (v *live) ended() (err error) {
	v.t.Helper()
	v.stopOnce.Do(func() {
		defer v.cancel()
		select {
		case err = <-v.done:
		case <-time.After(patience):
			v.t.Fatal("Run has not ended")
		}
	})
	return err
}

func (v *live) said() (changed, proven []wgroam.Observation) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.changed), slices.Clone(v.proven)
}

// agrees reports whether the view has what the device has.
func (v *live) agrees() (bool, string) {
	v.t.Helper()
	want, err := v.gw.Endpoints()
	if err != nil {
		v.t.Fatal(err)
	}
	got := make(map[wgroam.Key]netip.AddrPort)
	for k, h := range v.view.Peers() {
		if h.Endpoint.IsValid() {
			got[k] = h.Endpoint
		}
	}
	diff := cmp.Diff(want, got, opts)
	return diff == "", diff
}

func (v *live) awaitAgreement() {
	v.t.Helper()
	await(v.t, "view equals device", func() bool { ok, _ := v.agrees(); return ok })
}

// awaitAt waits until the view has a client at an endpoint.
func (v *live) awaitAt(c *lab.Client, ep netip.AddrPort) wgroam.Holding {
	v.t.Helper()
	var h wgroam.Holding
	await(v.t, fmt.Sprintf("the view has the client at %v", ep), func() bool {
		h, _ = v.view.Get(c.Key())
		return h.Endpoint == ep
	})
	return h
}

func reach(t testing.TB, c *lab.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Reach(ctx); err != nil {
		t.Fatal(err)
	}
}

// configure writes an endpoint as an administrator would.
func (v *live) configure(peer wgroam.Key, ep netip.AddrPort) {
	v.t.Helper()
	if err := v.cfg.WG.SetEndpoints(v.gw.Device(), []wg.Endpoint{{Peer: peer, Endpoint: ep}}); err != nil {
		v.t.Fatal(err)
	}
}

// run runs a program in a namespace.
func run(t testing.TB, in func(func() error) error, name string, args ...string) {
	t.Helper()
	err := in(func() error {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s %v: %w: %s", name, args, err, out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// rekey gives a device another private key.
func rekey(t testing.TB, in func(func() error) error, device string, key wgroam.Key) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(key.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, in, "wg", "set", device, "private-key", file)
}

// TestLiveStart: what a tracker makes of a device with sessions on it.
func TestLiveStart(t *testing.T) {
	eachRung(t, func(t *testing.T, kernel *Kernel) {
		l := newLab(t, lab.Config{Clients: 3})
		gw := l.Gateways[0]
		active, configured := l.Clients[0], l.Clients[1]
		reach(t, active)
		run(t, gw.Do, "wg", "set", gw.Device(), "peer", configured.Key().String(), "endpoint", at(1).String())
		v := start(t, gw, kernel)
		peers, err := gw.Peers()
		if err != nil {
			t.Fatal(err)
		}
		var handshake time.Time
		for _, p := range peers {
			if wgroam.Key(p.PublicKey) == active.Key() {
				handshake = p.LastHandshakeTime
			}
		}
		changed, proven := v.said()
		want := []wgroam.Observation{{Peer: active.Key(), New: active.Endpoint(), Cause: wgroam.CauseSnapshot, At: handshake}}
		for what, got := range map[string][]wgroam.Observation{"changed": changed, "proven": proven} {
			if diff := cmp.Diff(want, got, opts); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
		}
		if h, ok := v.view.Get(configured.Key()); !ok || h.Endpoint != at(1) || h.Cause != wgroam.CauseConfig {
			t.Errorf("view of the configured peer: %+v, %v", h, ok)
		}
		if h, ok := v.view.Get(l.Clients[2].Key()); !ok || h != (wgroam.Holding{}) {
			t.Errorf("view of the peer without an endpoint: %+v, %v", h, ok)
		}
		if s := v.Status(); s.Events != 0 || s.Resyncs != 0 || s.SweepRepairs != 0 {
			t.Errorf("status %+v", s)
		}
	})
}

// TestLiveRoams: peers move, an administrator moves one, peers come and go.
func TestLiveRoams(t *testing.T) {
	eachRung(t, func(t *testing.T, kernel *Kernel) {
		l := newLab(t, lab.Config{Clients: 2})
		gw, c, other := l.Gateways[0], l.Clients[0], l.Clients[1]
		v := start(t, gw, kernel)
		reach(t, c)
		v.awaitAt(c, c.Endpoint())
		v.provenAt(c, c.Endpoint()) // what is not proven when she moves on never is
		eps := []netip.AddrPort{c.Endpoint()}
		for _, roam := range []func() (netip.AddrPort, error){c.RoamPort, c.RoamAddress, c.RoamFamily, c.RoamPort, c.RoamFamily} {
			ep, err := roam()
			if err == nil {
				err = c.Send(1)
			}
			if err != nil {
				t.Fatal(err)
			}
			if h := v.awaitAt(c, ep); h.Cause != wgroam.CauseData || time.Since(h.At) > patience || time.Since(h.At) < 0 {
				t.Errorf("the view has %+v", h)
			}
			eps = append(eps, ep)
		}
		// Nobody spoke, and nothing is sent, by which it would be noticed at the port.
		v.configure(other.Key(), at(1))
		v.wantDump()
		if h := v.awaitAt(other, at(1)); h.Cause != wgroam.CauseConfig {
			t.Errorf("the view has %+v, want cause %v", h, wgroam.CauseConfig)
		}

		changed, proven := v.said()
		if n := len(changed); n != len(eps)+1 || changed[n-1].Peer != other.Key() || changed[n-1].Cause != wgroam.CauseConfig {
			t.Fatalf("%d changes, want %d and one by configuration: %+v", n, len(eps), changed)
		}
		if len(proven) != len(eps) {
			t.Fatalf("%d proven, want %d: %+v", len(proven), len(eps), changed)
		}
		for i, ep := range eps {
			var old netip.AddrPort
			if i > 0 {
				old = eps[i-1]
			}
			for _, o := range []wgroam.Observation{changed[i], proven[i]} {
				if o.Peer != c.Key() || o.Old != old || o.New != ep || !o.Cause.Observed() {
					t.Errorf("observation %d: %+v, want %v -> %v", i, o, old, ep)
				}
			}
		}

		run(t, gw.Do, "wg", "set", gw.Device(), "peer", other.Key().String(), "remove")
		v.wantDump()
		await(t, "the view has lost a peer", func() bool { _, ok := v.view.Get(other.Key()); return !ok })
		run(t, gw.Do, "wg", "set", gw.Device(), "peer", other.Key().String())
		v.wantDump()
		await(t, "the view has the peer again", func() bool { h, ok := v.view.Get(other.Key()); return ok && !h.Endpoint.IsValid() })
		if s := v.Status(); s.SweepRepairs != 0 {
			t.Errorf("status %+v", s)
		}
	})
}

// TestLiveSync: what the device has accepted is told when Sync says that this is all.
func TestLiveSync(t *testing.T) {
	eachRung(t, func(t *testing.T, kernel *Kernel) {
		l := newLab(t, lab.Config{})
		c := l.Clients[0]
		v := start(t, l.Gateways[0], kernel)
		reach(t, c)
		v.provenAt(c, c.Endpoint())
		for range 5 {
			ep, err := c.RoamPort()
			if err != nil {
				t.Fatal(err)
			}
			reach(t, c) // and it was answered
			await(t, "Sync says that this is all", func() bool { return v.Sync(t.Context()) })
			_, proven := v.said()
			if at := proven[len(proven)-1].New; at != ep {
				t.Errorf("it is told at %v, want %v", at, ep)
			}
		}
		v.stop()
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if v.Sync(ended) {
			t.Error("all is said to be told by a tracker that does not run")
		}
	})
}

// TestLiveApplier: with polling, what the applier has noted in the view is not
// taken for the peer's doing, even if the peer speaks meanwhile.
func TestLiveApplier(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw, c := l.Gateways[0], l.Clients[0]
	reach(t, c)
	v := start(t, gw, polled(t))
	v.stop() // the polls are ours
	before, _ := v.said()
	for i := range 20 {
		ep := at(i)
		v.view.Set(c.Key(), wgroam.Holding{Endpoint: ep, Cause: wgroam.CauseConfig, At: time.Now()})
		v.configure(c.Key(), ep)
		for range 2 {
			if err := v.dump(t.Context(), dumpSweep); err != nil {
				t.Fatal(err)
			}
		}
		if h, _ := v.view.Get(c.Key()); h.Endpoint != ep || h.Cause != wgroam.CauseConfig {
			t.Errorf("the view has %+v, want %v", h, ep)
		}
	}
	if after, _ := v.said(); len(after) != len(before) {
		t.Errorf("the applier's writes were reported: %+v", after[len(before):])
	}
	reach(t, c)
	await(t, "the client's packet is counted", func() bool {
		if err := v.dump(t.Context(), dumpSweep); err != nil {
			t.Fatal(err)
		}
		h, _ := v.view.Get(c.Key())
		return h.Endpoint == c.Endpoint() && h.Cause == wgroam.CauseData
	})
}

// TestLiveSweeps: a dump every few milliseconds, while peers roam. None reports
// what is over, and none has anything to repair.
func TestLiveSweeps(t *testing.T) { eachHook(t, liveSweeps) }

func liveSweeps(t *testing.T, kernel *Kernel) {
	const clients, roams = 5, 9
	l := newLab(t, lab.Config{Clients: clients})
	gw := l.Gateways[0]
	v := startWith(t, gw, kernel, 5*time.Millisecond)
	eps := make([][]netip.AddrPort, clients)
	var wg sync.WaitGroup
	for i, c := range l.Clients {
		wg.Go(func() {
			reach(t, c)
			eps[i] = append(eps[i], c.Endpoint())
			for n := range roams {
				ep, err := []func() (netip.AddrPort, error){c.RoamPort, c.RoamAddress, c.RoamFamily}[n%3]()
				if err == nil {
					err = c.Send(1)
				}
				if err != nil {
					t.Error(err)
					return
				}
				eps[i] = append(eps[i], ep)
				v.awaitAt(c, ep)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	v.awaitAgreement()
	changed, _ := v.said()
	for i, c := range l.Clients {
		var got []netip.AddrPort
		for _, o := range changed {
			if o.Peer == c.Key() {
				got = append(got, o.New)
			}
		}
		if diff := cmp.Diff(eps[i], got, opts); diff != "" {
			t.Errorf("client %d (-was +reported):\n%s", i, diff)
		}
	}
	if s := v.Status(); s.SweepRepairs != 0 {
		t.Errorf("status %+v", s)
	}
}

// twins are two devices of one peer: they have the same key.
func twins(t *testing.T, l *lab.Lab) (a, b *lab.Client) {
	t.Helper()
	a, b = l.Clients[0], l.Clients[1]
	var key [32]byte
	err := a.Do(func() error {
		c, err := wg.Open()
		if err != nil {
			return err
		}
		defer c.Close()
		key, err = c.PrivateKey(a.Device())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	rekey(t, b.Do, b.Device(), key)
	return a, b
}

// TestLiveRaces: a peer speaks from two places at once, as fast as it can, while
// its endpoint is configured, and handshakes go on as well. When that is over,
// the view has what the kernel has, without a sweep.
func TestLiveRaces(t *testing.T) { eachHook(t, liveRaces) }

func liveRaces(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{Clients: 2})
	gw := l.Gateways[0]
	a, b := twins(t, l)
	v := start(t, gw, kernel)
	reach(t, a)
	conns := make(map[*lab.Client]net.Conn)
	for _, c := range []*lab.Client{a, b} {
		conn, err := c.Dial(t.Context(), "udp4", lab.DiscardPort)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conns[c] = conn
	}
	n := 0
	write := func() {
		n++
		ep := at(n % 3)
		if n%2 == 0 {
			ep = a.Endpoint() // what it is half of the time
		}
		v.configure(a.Key(), ep)
	}
	const rounds = 8
	for round := range rounds {
		// A session for each: the gateway keeps one more than the newest.
		for _, c := range []*lab.Client{a, b} {
			if err := errors.Join(c.Forget(), c.Send(1)); err != nil {
				t.Fatal(err)
			}
			await(t, "a session", func() bool {
				ep, err := gw.Endpoint(a.Key())
				return err == nil && ep == c.Endpoint()
			})
		}
		end := time.Now().Add(150 * time.Millisecond)
		var wg sync.WaitGroup
		for _, f := range []func(){
			func() {
				// They may get lost like any others.
				_, _ = conns[a].Write([]byte("a"))
				_, _ = conns[b].Write([]byte("b"))
			},
			write,
		} {
			wg.Go(func() {
				for time.Now().Before(end) {
					f()
				}
			})
		}
		wg.Wait()
		// What was sent is there, or lost, before long.
		last, still := "", 0
		await(t, "the device stands still", func() bool {
			ep, err := gw.Endpoint(a.Key())
			if err != nil {
				t.Fatal(err)
			}
			if s := ep.String(); s == last {
				still++
			} else {
				last, still = s, 0
			}
			return still == 20
		})
		await(t, fmt.Sprintf("round %d: the view has %s", round, last), func() bool { ok, _ := v.agrees(); return ok })
	}
	s := v.Status()
	t.Logf("%d changes in %d rounds, %d dumps to be sure", s.Events, rounds, s.Resyncs)
	if s.Events < 10*rounds || s.SweepRepairs != 0 {
		t.Errorf("status %+v", s)
	}
}

// manyPeers gives a device n more peers.
func manyPeers(t testing.TB, gw *lab.Gateway, n int) []wgroam.Key {
	t.Helper()
	keys := make([]wgroam.Key, n)
	args := []string{"set", gw.Device()}
	for i := range keys {
		keys[i] = wgroam.Key{byte(i), byte(i >> 8), 1}
		args = append(args, "peer", keys[i].String())
	}
	run(t, gw.Do, "wg", args...)
	return keys
}

// storm moves peers, in chunks.
func storm(c *wg.Client, device string, keys []wgroam.Key, round int) error {
	for chunk := range slices.Chunk(keys, wg.ChunkPeers) {
		var eps []wg.Endpoint
		for _, k := range chunk {
			addr := netip.AddrFrom4([4]byte{192, 0, 2, k[0]})
			eps = append(eps, wg.Endpoint{Peer: k, Endpoint: netip.AddrPortFrom(addr, uint16(1+round%60_000))})
		}
		if err := c.SetEndpoints(device, eps); err != nil {
			return err
		}
	}
	return nil
}

// lose makes the hook lose events: nobody takes them while more come in than the
// ring buffer holds.
func (v *live) lose(keys []wgroam.Key) {
	v.t.Helper()
	hook := v.cfg.Kernel.hook
	lost := func() uint64 {
		n, err := hook.Lost()
		if err != nil {
			v.t.Fatal(err)
		}
		return n
	}
	before, noticed, round := lost(), v.cfg.Kernel.Lost(), 0
	v.slow.Store(int64(patience)) // and the Kernel is locked all the while
	defer v.slow.Store(0)
	await(v.t, "the ring buffer is full", func() bool {
		round++
		if err := storm(v.cfg.WG, v.gw.Device(), keys, round); err != nil {
			v.t.Fatal(err)
		}
		return lost() > before
	})
	v.slow.Store(0)
	await(v.t, "the loss is noticed", func() bool { return v.cfg.Kernel.Lost() > noticed })
}

// TestLiveLost: more changes than the ring buffer holds. The view is right all
// the same, without a sweep.
func TestLiveLost(t *testing.T) { eachHook(t, liveLost) }

func liveLost(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{})
	v := start(t, l.Gateways[0], kernel)
	keys := manyPeers(t, v.gw, 256)
	v.lose(keys)
	v.awaitAgreement()
	await(t, "a dump", func() bool { return v.Status().Resyncs > 0 })
	v.awaitAgreement()
	if s := v.Status(); s.Resyncs == 0 || s.SweepRepairs != 0 {
		t.Errorf("status %+v", s)
	}
	_, proven := v.said()
	if len(proven) != 0 {
		t.Errorf("configuration was reported as %+v", proven[0])
	}
	// On it goes.
	c := l.Clients[0]
	reach(t, c)
	v.awaitAt(c, c.Endpoint())
}

// TestLiveFlood: events come faster than they can be taken, all the time. Another
// peer's roam that gets lost in them is noticed meanwhile, and the tracker can be
// stopped.
func TestLiveFlood(t *testing.T) { eachHook(t, liveFlood) }

func liveFlood(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{})
	gw, c := l.Gateways[0], l.Clients[0]
	v := start(t, gw, kernel)
	keys := manyPeers(t, v.gw, 128)
	var writer *wg.Client
	err := gw.Do(func() (err error) {
		writer, err = wg.Open()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	v.slow.Store(int64(2 * time.Millisecond))
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		for round := 0; ; round++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := storm(writer, gw.Device(), keys, round); err != nil {
				t.Error(err)
				return
			}
		}
	})
	defer flood.Wait()
	defer close(stop)
	before := kernel.Lost()
	await(t, "the ring buffer is full", func() bool { return kernel.Lost() > before })
	for range 3 {
		if _, err := c.RoamPort(); err != nil {
			t.Fatal(err)
		}
		reach(t, c)
		v.awaitAt(c, c.Endpoint())
	}
	// What is slow holds a lock, and is not so in earnest. The flood goes on.
	v.slow.Store(0)
	if took := v.stop(); took > time.Second {
		t.Errorf("took %v to stop", took)
	}
}

// TestLiveHostile: a peer speaks from two places by turns, as fast as it can. It
// gets a bounded number of events, and none of its own making is a reason to
// read the device; where it is at the end is known.
func TestLiveHostile(t *testing.T) { eachHook(t, liveHostile) }

func liveHostile(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{Clients: 2})
	a, b := twins(t, l)
	v := start(t, l.Gateways[0], kernel)
	var conns []net.Conn
	for _, c := range []*lab.Client{a, b} {
		// A session for each: the gateway keeps one more than the newest.
		if err := errors.Join(c.Forget(), c.Send(1)); err != nil {
			t.Fatal(err)
		}
		v.awaitAt(a, c.Endpoint())
		conn, err := c.Dial(t.Context(), "udp4", lab.DiscardPort)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conns = append(conns, conn)
	}
	before, limited, began := v.Status(), kernel.Limited(), time.Now()
	packets := 0
	await(t, "the limit is felt", func() bool {
		// In pairs, which the kernel takes together.
		for range 200 {
			for _, conn := range conns {
				_, _ = conn.Write([]byte("x")) // it may get lost like any other
				packets++
			}
		}
		return kernel.Limited() > limited+500
	})
	took := time.Since(began)
	v.awaitAgreement()
	s := v.Status()
	events, dumps := s.Events-before.Events, s.Resyncs-before.Resyncs
	t.Logf("%d packets in %v: %d events, %d held back, %d dumps", packets, took, events, kernel.Limited()-limited, dumps)
	// The limit, and a look, in each window.
	if most := 9 * uint64(2+took/bpf.Window); events > most {
		t.Errorf("%d events in %v, want %d at most", events, took, most)
	}
	if most := 1 + uint64(took/resyncDelay); dumps > most || s.SweepRepairs != 0 {
		t.Errorf("%d dumps in %v, want %d at most; status %+v", dumps, took, most, s)
	}
}

// TestLiveTrailingEdge: a storm ends with an event that is held back. The view is
// right soon, without reading the device.
func TestLiveTrailingEdge(t *testing.T) { eachHook(t, liveTrailingEdge) }

func liveTrailingEdge(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{})
	all := manyPeers(t, l.Gateways[0], 60) // before, for new peers are reason for a dump
	v := start(t, l.Gateways[0], kernel)
	hook := kernel.hook
	skipped := func() uint64 {
		n, err := hook.Missed()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, keys := range [][]wgroam.Key{all[:1], all} {
		peers, missed := len(keys), skipped()
		before, resyncs, round := bpf.Limited{}, v.Status().Resyncs, 0
		await(t, "the end is held back", func() bool {
			now, err := hook.Limited()
			if err != nil {
				t.Fatal(err)
			}
			if round > 0 && now.Peer >= before.Peer+uint64(peers) {
				return true
			}
			round++
			before = now
			if err := storm(v.cfg.WG, v.gw.Device(), keys, round); err != nil {
				t.Fatal(err)
			}
			return false
		})
		v.awaitAgreement()
		s := v.Status()
		known := countsMissed(t, s.Rung) && skipped() == missed
		if s.Resyncs != resyncs && known || s.SweepRepairs != 0 {
			t.Errorf("%d peers: status %+v", peers, s)
		}
	}
}

func TestLiveRekeyed(t *testing.T) {
	eachRung(t, func(t *testing.T, kernel *Kernel) {
		l := newLab(t, lab.Config{})
		gw := l.Gateways[0]
		v := start(t, gw, kernel)
		rekey(t, gw.Do, gw.Device(), wgroam.Key{8, 31: 64})
		if ports[kernel] != nil {
			v.wantDump() // nothing tells
		}
		if err := v.ended(); !errors.Is(err, ErrRekeyed) {
			t.Errorf("Run: %v, want %v", err, ErrRekeyed)
		}
	})
}

// TestLivePeers: peers that come, and one that has lost its endpoint on the way, are
// noticed although nothing was set or sent.
func TestLivePeers(t *testing.T) { eachHook(t, livePeers) }

func livePeers(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{})
	c := l.Clients[0]
	v := start(t, l.Gateways[0], kernel)
	reach(t, c)
	v.awaitAt(c, c.Endpoint())
	readd(t, v.gw, nil)
	v.awaitAt(c, netip.AddrPort{})
	key := manyPeers(t, v.gw, 1)[0]
	await(t, "the view has the new peer", func() bool { _, ok := v.view.Get(key); return ok })
}

func TestLiveDeleted(t *testing.T) {
	needKernel(t)
	eachRung(t, func(t *testing.T, kernel *Kernel) {
		l := newLab(t, lab.Config{})
		gw := l.Gateways[0]
		v := start(t, gw, kernel)
		err := gw.Do(func() error {
			link, err := netlink.LinkByName(gw.Device())
			if err != nil {
				return err
			}
			return netlink.LinkDel(link)
		})
		if err != nil {
			t.Fatal(err)
		}
		v.wantDump()
		if err := v.ended(); !errors.Is(err, wg.ErrNoDevice) {
			t.Errorf("Run: %v, want %v", err, wg.ErrNoDevice)
		}
		if err := v.Start(); !errors.Is(err, wg.ErrNoDevice) {
			t.Errorf("Start: %v, want %v", err, wg.ErrNoDevice)
		}
	})
}

// TestLiveTwo: two devices share a hook, and neither hears of the other's peers.
func TestLiveTwo(t *testing.T) { eachHook(t, liveTwo) }

func liveTwo(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	va, vh := start(t, a, kernel), start(t, h, kernel)
	check := func(v *live, n int, ep netip.AddrPort) {
		t.Helper()
		await(t, fmt.Sprintf("%d changes on %s", n, v.gw.Name), func() bool { changed, _ := v.said(); return len(changed) >= n })
		changed, _ := v.said()
		if len(changed) != n || changed[n-1].New != ep {
			t.Errorf("%s: changes %+v, want %d, the last to %v", v.gw.Name, changed, n, ep)
		}
	}
	va.configure(c.Key(), at(1))
	vh.configure(c.Key(), at(2))
	va.configure(c.Key(), at(3))
	check(va, 2, at(3))
	check(vh, 1, at(2))
	vh.stop()
	va.configure(c.Key(), at(4))
	check(va, 3, at(4))
	vh.configure(c.Key(), at(5)) // nobody follows
	va.configure(c.Key(), at(6))
	check(va, 4, at(6))
	check(vh, 1, at(2))

	// The next tracker of the same device.
	again := start(t, h, kernel)
	again.configure(c.Key(), at(7))
	check(again, 1, at(7))
	check(va, 4, at(6))
}

// TestLiveModule: the module goes when no device is followed any more, or with
// kprobes under the device. With the module loaded again the hook is attached
// anew, also for somebody who comes before the last one has noticed.
func TestLiveModule(t *testing.T) {
	needKernel(t)
	modprobe := func(args ...string) error { return exec.Command("modprobe", append(args, "wireguard")...).Run() }
	t.Cleanup(func() {
		if err := modprobe(); err != nil {
			t.Errorf("modprobe: %v", err)
		}
	})
	eachHook(t, func(t *testing.T, shared *Kernel) {
		for rung, k := range detached() {
			if err := k.Close(); err != nil {
				t.Errorf("%s: %v", rung, err)
			}
		}
		kernel := &Kernel{attach: shared.attach}
		defer kernel.Close()
		roams := func() *live {
			t.Helper()
			l := newLab(t, lab.Config{})
			v := start(t, l.Gateways[0], kernel)
			reach(t, l.Clients[0])
			v.awaitAt(l.Clients[0], l.Clients[0].Endpoint())
			return v
		}
		old := roams()
		if kernel.attach == nil {
			if modprobe("-r") == nil {
				t.Fatal("the module could be removed under the hook")
			}
			old.stop()
		}
		// The kernel lets go of programs in the background.
		await(t, "the module is gone", func() bool { return modprobe("-r") == nil })
		if err := modprobe(); err != nil {
			t.Fatalf("modprobe: %v", err)
		}
		was := kernel.hook
		v := roams()
		if kernel.hook == was {
			t.Error("the hook is the one of the module that is gone")
		}
		if kernel.attach != nil {
			await(t, "who followed the old device knows", func() bool { return old.Status().Rung == RungPolling })
			old.wantDump()
			if err := old.ended(); !errors.Is(err, wg.ErrNoDevice) {
				t.Errorf("Run: %v, want %v", err, wg.ErrNoDevice)
			}
		}
		v.stop()
		if kernel.hook != nil {
			t.Error("the hook is still there, and nobody follows a device")
		}
	})
}

// detached takes the shared hooks away, for a test that wants the kernel without.
func detached() map[Rung]*Kernel {
	was := maps.Clone(shared)
	for rung, k := range was {
		shared[rung] = &Kernel{attach: k.attach}
	}
	return was
}

// TestLiveKernelClosed: the hook goes in the middle of it all.
func TestLiveKernelClosed(t *testing.T) { eachHook(t, liveKernelClosed) }

func liveKernelClosed(t *testing.T, kernel *Kernel) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	v := startWith(t, gw, kernel, 5*time.Millisecond)
	keys := manyPeers(t, v.gw, 32)
	var writer *wg.Client
	err := gw.Do(func() (err error) {
		writer, err = wg.Open()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	stop := make(chan struct{})
	var flood sync.WaitGroup
	flood.Go(func() {
		for round := 0; ; round++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := storm(writer, gw.Device(), keys, round); err != nil {
				t.Error(err)
				return
			}
		}
	})
	await(t, "the storm is on", func() bool { changed, _ := v.said(); return len(changed) > 100 })
	if err := kernel.Close(); err != nil {
		t.Error(err)
	}
	close(stop)
	flood.Wait()
	if took := v.stop(); took > time.Second {
		t.Errorf("took %v to stop", took)
	}
	if err := kernel.Close(); err != nil {
		t.Errorf("Close once more: %v", err)
	}
	for rung, k := range shared {
		if k == kernel {
			shared[rung] = &Kernel{attach: k.attach}
		}
	}
	if done, err := v.cfg.Kernel.barrier(t.Context()); !done || err != nil {
		t.Errorf("barrier: %v, %v", done, err)
	}
}
