// SPDX-License-Identifier: MIT

package bpf

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/wg"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		for _, hook := range shared {
			if err := hook.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "close the hook:", err)
				status = 1
			}
		}
		os.Exit(status)
	}))
}

// rungs are the ways to attach the hook.
var rungs = map[string]func(int) (*Hook, error){"fentry": Attach, "kprobe": AttachKprobe}

// rung is the way of the running test.
var rung = "fentry"

// eachRung runs a test of what the hook does, however it is attached.
func eachRung(t *testing.T, test func(*testing.T)) {
	for _, name := range slices.Sorted(maps.Keys(rungs)) {
		t.Run(name, func(t *testing.T) {
			rung = name
			t.Cleanup(func() { rung = "fentry" })
			test(t)
		})
	}
}

// shared are the hooks of most tests, by rung: to attach one takes seconds in an
// emulated machine.
var shared = make(map[string]*Hook)

func sharedHook(t testing.TB) *Hook {
	t.Helper()
	if shared[rung] == nil {
		hook, err := rungs[rung](1)
		if err != nil {
			t.Fatal(err)
		}
		if (hook.Fallback == nil) != (rung == "fentry") {
			t.Errorf("%s: fallback %v", rung, hook.Fallback)
		}
		shared[rung] = hook
	}
	return shared[rung]
}

// detach closes the shared hook of a rung.
func detach(t testing.TB, rung string) {
	t.Helper()
	hook := shared[rung]
	if hook == nil {
		return
	}
	delete(shared, rung)
	if err := hook.Close(); err != nil {
		t.Fatal(err)
	}
}

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

// needWireGuard skips a test on a kernel without WireGuard. That of test/vm has
// it, or is broken.
func needWireGuard(t testing.TB) {
	t.Helper()
	needRoot(t)
	if lab.KernelWireGuard() {
		return
	}
	if lab.InVM() {
		t.Fatalf("kernel %s has no WireGuard", kernel())
	}
	t.Skipf("kernel %s has no WireGuard", kernel())
}

// site is a gateway whose device the hook follows, with a client.
type site struct {
	t    testing.TB
	lab  *lab.Lab
	gw   *lab.Gateway
	c    *lab.Client
	wg   *wg.Client
	hook *Hook
	dev  Device
	born time.Duration // CLOCK_BOOTTIME
}

func newSite(t testing.TB) *site {
	t.Helper()
	needWireGuard(t)
	l, err := lab.New(t.Context(), lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	s := &site{t: t, lab: l, gw: l.Gateways[0], c: l.Clients[0], born: bootTime(t)}
	s.wg = open(t, s.gw.Do)
	s.dev = deviceOf(t, s.gw, s.gw.Device())
	s.hook = sharedHook(t)
	s.follow(s.dev)
	return s
}

// follow follows a device until the test ends.
func (s *site) follow(d Device) {
	s.t.Helper()
	hook := s.hook
	if err := hook.Follow(d); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if hook != shared[rung] {
			return // closed
		}
		if err := hook.Unfollow(d); err != nil {
			s.t.Error(err)
		}
		if _, err := readAll(hook); err != nil {
			s.t.Error(err)
		}
	})
}

// latest returns the newest event of each peer of the device.
func (s *site) latest() []Event {
	s.t.Helper()
	all, err := s.hook.Latest()
	if err != nil {
		s.t.Fatal(err)
	}
	// A namespace may have the number of one that is gone.
	return slices.DeleteFunc(all, func(e Event) bool { return e.Device != s.dev || e.Boot < s.born })
}

func (s *site) lost() int {
	s.t.Helper()
	n, err := s.hook.Lost()
	if err != nil {
		s.t.Fatal(err)
	}
	return int(n)
}

// open opens a WireGuard client in a namespace.
func open(t testing.TB, in func(func() error) error) *wg.Client {
	t.Helper()
	var c *wg.Client
	err := in(func() (err error) {
		c, err = wg.Open()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func deviceOf(t testing.TB, gw *lab.Gateway, name string) Device {
	t.Helper()
	var d Device
	err := gw.Do(func() error {
		ino, err := wg.Netns()
		if err != nil {
			return err
		}
		l, err := wg.LinkByName(name)
		d = Device{Ifindex: uint32(l.Ifindex), Netns: ino}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// run runs a program in a gateway's namespace.
func run(t testing.TB, gw *lab.Gateway, name string, args ...string) {
	t.Helper()
	err := gw.Do(func() error {
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

func (s *site) configure(eps ...wg.Endpoint) {
	s.t.Helper()
	if err := s.wg.SetEndpoints(s.gw.Device(), eps); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) reach() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	if _, err := s.c.Reach(ctx); err != nil {
		s.t.Fatal(err)
	}
}

// ping does what reach does with one packet. Of those that reach sends until the first
// answer, some may still be on their way when it returns.
func (s *site) ping() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	if _, err := s.c.Ping(ctx); err != nil {
		s.t.Fatal(err)
	}
}

// events returns all changes that have happened, once they have.
func (s *site) events() []Event {
	s.t.Helper()
	return slices.DeleteFunc(s.all(), func(e Event) bool { return e.Confirmed })
}

// all returns changes and confirmations.
func (s *site) all() []Event {
	s.t.Helper()
	got, err := readAll(s.hook)
	if err != nil {
		s.t.Fatal(err)
	}
	return got
}

// readAll reads what waits in the ring buffer.
func readAll(hook *Hook) ([]Event, error) {
	if _, err := hook.Flush(); err != nil {
		return nil, err
	}
	var out []Event
	for {
		e, _, err := hook.Read()
		if errors.Is(err, ErrFlushed) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, e)
	}
}

// awaitAt waits until the gateway's device holds ep for the client.
func (s *site) awaitAt(ep netip.AddrPort) {
	s.t.Helper()
	await(s.t, fmt.Sprintf("gateway sees the client at %v", ep), func() bool {
		got, err := s.gw.Endpoint(s.c.Key())
		if err != nil {
			s.t.Fatal(err)
		}
		return got == ep
	})
}

var opts = cmp.Options{
	cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
	cmpopts.IgnoreFields(Event{}, "Boot", "InternalID"),
}

// want compares what has happened with what should have, and checks what no
// test can know beforehand.
func (s *site) want(events ...Event) {
	s.t.Helper()
	got := s.events()
	for i := range events {
		events[i].Device = s.dev
		if events[i].Peer == (wgroam.Key{}) {
			events[i].Peer = s.c.Key()
		}
	}
	if diff := cmp.Diff(events, got, opts, cmpopts.EquateEmpty()); diff != "" {
		s.t.Errorf("events (-want +got):\n%s", diff)
	}
	boot := bootTime(s.t)
	for i, e := range got {
		if e.InternalID == 0 || e.InternalID != got[0].InternalID && e.Peer == got[0].Peer {
			s.t.Errorf("event %d: internal id %d after %d", i, e.InternalID, got[0].InternalID)
		}
		if e.Boot > boot || e.Boot < boot-patience || e.Boot < got[max(0, i-1)].Boot {
			s.t.Errorf("event %d: time %v, before it %v, now %v", i, e.Boot, got[max(0, i-1)].Boot, boot)
		}
	}
}

func bootTime(t testing.TB) time.Duration {
	t.Helper()
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

// TestHookRoams: every change, once, with what was before.
func TestHookRoams(t *testing.T) { eachRung(t, hookRoams) }

func hookRoams(t *testing.T) {
	s := newSite(t)
	s.reach()
	last := s.c.Endpoint()
	s.want(Event{New: last, Cause: wgroam.CauseInitiation})

	var want []Event
	for range 3 {
		for _, roam := range []func() (netip.AddrPort, error){s.c.RoamPort, s.c.RoamAddress, s.c.RoamFamily, s.c.RoamPort, s.c.RoamAddress} {
			ep, err := roam()
			if err == nil {
				err = s.c.Send(1)
			}
			if err != nil {
				t.Fatal(err)
			}
			s.awaitAt(ep)
			want = append(want, Event{Old: last, New: ep, Cause: wgroam.CauseData})
			last = ep
		}
	}
	s.want(want...)
	if n := s.lost(); n != 0 {
		t.Errorf("lost %d events", n)
	}
	if diff := cmp.Diff(want[len(want)-1:], s.latest(), opts); diff != "" {
		t.Errorf("latest (-want +got):\n%s", diff)
	}
}

// TestHookUnchanged: traffic of a peer that stays where it is makes no event,
// nor does a change of our own side.
func TestHookUnchanged(t *testing.T) { eachRung(t, hookUnchanged) }

func hookUnchanged(t *testing.T) {
	s := newSite(t)
	s.reach()
	s.want(Event{New: s.c.Endpoint(), Cause: wgroam.CauseInitiation})
	received := func() int64 {
		d, err := s.wg.Device(s.gw.Device())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range d.Peers {
			if p.Key == s.c.Key() {
				return p.Received
			}
		}
		return 0
	}
	traffic := func(packets int64) {
		t.Helper()
		const size = 32 + 48 // of an authenticated packet with a small datagram in it
		for enough := received() + packets*size; received() < enough; {
			if err := s.c.Send(100); err != nil {
				t.Fatal(err)
			}
			s.reach()
		}
	}
	traffic(5000)
	s.want()

	// The kernel takes these for changes of the endpoint: it forgets the local
	// address, and learns it again.
	s.configure(wg.Endpoint{Peer: s.c.Key(), Endpoint: s.c.Endpoint()})
	traffic(10)
	run(t, s.gw, "wg", "set", s.gw.Device(), "fwmark", "7")
	traffic(10)
	s.want()

	// The same place, another session.
	if err := s.c.Forget(); err != nil {
		t.Fatal(err)
	}
	s.reach()
	s.want()
}

// nextWindow waits until the kernel counts anew.
func nextWindow(t testing.TB) {
	t.Helper()
	for now := bootTime(t); bootTime(t)/Window == now/Window; {
		time.Sleep(time.Millisecond)
	}
}

// TestHookConfig: an endpoint that differs in anything at all is a change, and a
// write through netlink is never taken for more.
func TestHookConfig(t *testing.T) { eachRung(t, hookConfig) }

func hookConfig(t *testing.T) {
	s := newSite(t)
	var want []Event
	var last netip.AddrPort
	for _, text := range []string{
		"192.0.2.1:1", "192.0.2.1:2", "192.0.2.1:258", "192.0.2.2:258", "192.0.3.2:258", "192.1.3.2:258", "193.1.3.2:258",
		"[2001:db8::1]:258", "[2001:db8::2]:258", "[2001:db8::1:0:2]:258", "[2001:db8:0:1:0:1:0:2]:258",
		"[2001:db9:0:1:0:1:0:2]:258", "[2001:db9:0:1:0:1:0:2]:259", "192.0.2.1:259", "0.0.0.1:65535",
	} {
		ep := netip.MustParseAddrPort(text)
		if len(want)%4 == 0 {
			nextWindow(t) // so that none is held back
		}
		s.configure(wg.Endpoint{Peer: s.c.Key(), Endpoint: ep})
		s.configure(wg.Endpoint{Peer: s.c.Key(), Endpoint: ep})
		want = append(want, Event{Old: last, New: ep, Cause: wgroam.CauseConfig})
		last = ep
	}
	// The scope of a link-local address is part of it, if not shown.
	for _, scope := range []string{"1", "2"} {
		run(t, s.gw, "wg", "set", s.gw.Device(), "peer", s.c.Key().String(), "endpoint", "[fe80::1%"+scope+"]:9")
		ep := netip.MustParseAddrPort("[fe80::1]:9")
		want = append(want, Event{Old: last, New: ep, Cause: wgroam.CauseConfig})
		last = ep
	}
	s.want(want...)

	// From there, the client.
	s.reach()
	s.want(Event{Old: last, New: s.c.Endpoint(), Cause: wgroam.CauseInitiation})
}

// relay stands between a client and the gateway, and may send what the client
// says from another address than the one at which the gateway talks to it.
type relay struct {
	inside *net.UDPConn   // where the client thinks the gateway is
	client netip.AddrPort // where the client is
	in     *net.UDPConn   // where the gateway is to send
	out    *net.UDPConn   // what it gets comes from here
	remote netip.AddrPort // of the gateway
	done   sync.WaitGroup
}

func newRelay(s *site) *relay {
	s.t.Helper()
	r := &relay{
		client: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), s.c.Endpoint().Port()),
		remote: netip.AddrPortFrom(lab.VIP4, lab.ListenPort),
	}
	err := s.c.Do(func() error {
		// The clients have a way out each; this is the relay's.
		uplink, err := netlink.LinkByName("uplink")
		if err == nil {
			err = netlink.RouteReplace(&netlink.Route{LinkIndex: uplink.Attrs().Index, Gw: net.IPv4(198, 18, 0, 1), Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
		}
		for _, c := range []struct {
			conn **net.UDPConn
			ip   net.IP
		}{{&r.inside, net.IPv4(127, 0, 0, 1)}, {&r.in, net.IPv4zero}, {&r.out, net.IPv4zero}} {
			if err == nil {
				*c.conn, err = net.ListenUDP("udp4", &net.UDPAddr{IP: c.ip})
			}
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	forward := func(from, to *net.UDPConn, addr netip.AddrPort) {
		buf := make([]byte, 1<<16)
		for {
			n, _, err := from.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = to.WriteToUDPAddrPort(buf[:n], addr) // as unreliable as any network
		}
	}
	r.done.Go(func() { forward(r.in, r.inside, r.client) })
	r.done.Go(func() { forward(r.out, r.inside, r.client) })
	r.done.Go(func() { forward(r.inside, r.out, r.remote) })
	s.t.Cleanup(func() {
		r.inside.Close()
		r.in.Close()
		r.out.Close()
		r.done.Wait()
	})
	return r
}

// at is where the gateway sees what a socket of the relay sends.
func (r *relay) at(c *net.UDPConn) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("198.18.0.2"), uint16(c.LocalAddr().(*net.UDPAddr).Port))
}

// call sends a packet from the gateway to the client.
func (s *site) call() {
	s.t.Helper()
	err := s.gw.Do(func() error {
		c, err := net.Dial("udp4", netip.AddrPortFrom(s.c.Inner4, lab.DiscardPort).String())
		if err == nil {
			_, err = c.Write([]byte("hello"))
			c.Close()
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// TestHookCauses: each way by which a peer can move.
func TestHookCauses(t *testing.T) { eachRung(t, hookCauses) }

func hookCauses(t *testing.T) {
	s := newSite(t)
	s.ping()
	first := s.c.Endpoint()
	s.want(Event{New: first, Cause: wgroam.CauseInitiation})

	// A peer that starts over and moves. In this order, or a keepalive may come first.
	if err := s.c.Forget(); err != nil {
		t.Fatal(err)
	}
	second, err := s.c.RoamPort()
	if err != nil {
		t.Fatal(err)
	}
	s.ping()
	s.want(Event{Old: first, New: second, Cause: wgroam.CauseInitiation})

	// A peer that we call, and that answers from somewhere else. The session ends before,
	// or a keepalive may take the endpoint back.
	r := newRelay(s)
	if err := s.gw.LinkDown(); err != nil {
		t.Fatal(err)
	}
	s.configure(wg.Endpoint{Peer: s.c.Key(), Endpoint: r.at(r.in)})
	if err := s.gw.LinkUp(); err != nil {
		t.Fatal(err)
	}
	s.call()
	s.awaitAt(r.at(r.out))
	s.want(
		Event{Old: second, New: r.at(r.in), Cause: wgroam.CauseConfig},
		Event{Old: r.at(r.in), New: r.at(r.out), Cause: wgroam.CauseResponse},
	)
}

// TestHookConfirmed: the end of a handshake is reported, with where the peer is
// by then, whoever began; the beginning alone is not.
func TestHookConfirmed(t *testing.T) { eachRung(t, hookConfirmed) }

func hookConfirmed(t *testing.T) {
	s := newSite(t)
	check := func(want ...Event) {
		t.Helper()
		for i := range want {
			want[i].Device, want[i].Peer = s.dev, s.c.Key()
		}
		if diff := cmp.Diff(want, s.all(), opts); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	}
	s.reach()
	first := s.c.Endpoint()
	check(Event{New: first, Cause: wgroam.CauseInitiation}, Event{New: first, Confirmed: true})
	if err := s.c.Forget(); err != nil {
		t.Fatal(err)
	}
	s.reach()
	check(Event{New: first, Confirmed: true})

	second, err := s.c.RoamPort()
	if err == nil {
		err = s.c.Send(1)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.awaitAt(second)
	check(Event{Old: first, New: second, Cause: wgroam.CauseData})

	// We begin.
	lastHandshake := func() time.Time {
		d, err := s.wg.Device(s.gw.Device())
		if err != nil {
			t.Fatal(err)
		}
		return d.Peers[0].LastHandshake
	}
	before := lastHandshake()
	if err := errors.Join(s.gw.LinkDown(), s.gw.LinkUp()); err != nil {
		t.Fatal(err)
	}
	s.call()
	await(t, "the handshake is over", func() bool { return lastHandshake().After(before) })
	check(Event{New: second, Confirmed: true})

	if latest := s.latest(); len(latest) != 1 || latest[0].Confirmed || latest[0].New != second {
		t.Errorf("latest %+v", latest)
	}
}

// TestHookUnnoted: where there is no room to note what kind of packet a handshake is, it
// is not taken for data, which would be proof.
func TestHookUnnoted(t *testing.T) { eachRung(t, hookUnnoted) }

func hookUnnoted(t *testing.T) {
	s := newSite(t)
	m := s.hook.objs.Handshakes
	var tasks, notes = make([]uint64, m.MaxEntries()), make([]struct{ Peer, BootNS, Type uint64 }, m.MaxEntries())
	for i := range tasks {
		tasks[i] = 1<<63 + uint64(i) // of nobody
	}
	t.Cleanup(func() {
		_, err := m.BatchDelete(tasks, nil)
		if err := errors.Join(err, s.hook.objs.Unnoted.Set(uint64(0))); err != nil {
			t.Error(err)
		}
	})
	if _, err := m.BatchUpdate(tasks, notes, nil); err != nil {
		t.Fatal(err)
	}
	lost := s.lost()
	s.reach()
	s.want(Event{New: s.c.Endpoint(), Cause: wgroam.CauseInitiation})
	if s.lost() == lost {
		t.Error("nothing says that something is missing")
	}
}

// TestHookConfigured: new peers and keys are counted, endpoints are not.
func TestHookConfigured(t *testing.T) { eachRung(t, hookConfigured) }

func hookConfigured(t *testing.T) {
	s := newSite(t)
	count := func() uint64 {
		n, err := s.hook.Configured()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := count()
	s.configure(wg.Endpoint{Peer: s.c.Key(), Endpoint: netip.MustParseAddrPort("192.0.2.1:1")})
	if n := count(); n != before {
		t.Errorf("counted %d for an endpoint", n-before)
	}
	s.manyPeers(3)
	if n := count(); n != before+3 {
		t.Errorf("counted %d for 3 peers", n-before)
	}
	key, err := wgtypes.GeneratePrivateKey()
	if err == nil {
		err = s.gw.WG().ConfigureDevice(s.gw.Device(), wgtypes.Config{PrivateKey: &key})
	}
	if err != nil {
		t.Fatal(err)
	}
	if n := count(); n != before+4 {
		t.Errorf("counted %d for a key", n-before-3)
	}
	if err := s.hook.Unfollow(s.dev); err != nil {
		t.Fatal(err)
	}
	s.manyPeers(4)
	if n := count(); n != before+4 {
		t.Errorf("counted %d of a device that nobody follows", n-before-4)
	}
}

// TestHookFilter: devices are told apart by index and namespace, and only those
// followed are heard of.
func TestHookFilter(t *testing.T) { eachRung(t, hookFilter) }

func hookFilter(t *testing.T) {
	s := newSite(t)
	h := s.lab.Gateways[1]
	other := deviceOf(t, h, h.Device())
	if other.Ifindex != s.dev.Ifindex || other.Netns == s.dev.Netns {
		t.Fatalf("devices %+v and %+v: want the same index in two namespaces", s.dev, other)
	}
	wgH := open(t, h.Do)
	err := s.gw.Do(func() error {
		return netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: "wg1"}})
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s.gw, "wg", "set", "wg1", "peer", s.c.Key().String())

	port := uint16(0)
	all := func() (ep netip.AddrPort) {
		t.Helper()
		port++
		ep = netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port)
		e := wg.Endpoint{Peer: s.c.Key(), Endpoint: ep}
		if err := errors.Join(wgH.SetEndpoints(h.Device(), []wg.Endpoint{e}), s.wg.SetEndpoints("wg1", []wg.Endpoint{e})); err != nil {
			t.Fatal(err)
		}
		s.configure(e)
		return ep
	}
	first := all()
	s.want(Event{New: first, Cause: wgroam.CauseConfig})

	s.follow(other)
	second := all()
	got := s.events()
	want := []Event{
		{Device: other, Peer: s.c.Key(), Old: first, New: second, Cause: wgroam.CauseConfig},
		{Device: s.dev, Peer: s.c.Key(), Old: first, New: second, Cause: wgroam.CauseConfig},
	}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	if len(got) == 2 && got[0].InternalID == got[1].InternalID {
		t.Error("two peers have the same internal id")
	}

	for range 2 { // the second time there is nothing to do
		if err := errors.Join(s.hook.Unfollow(s.dev), s.hook.Unfollow(other)); err != nil {
			t.Fatal(err)
		}
	}
	third := all()
	s.want()
	s.follow(s.dev)
	s.want()
	s.want() // nothing comes late
	fourth := all()
	s.want(Event{Old: third, New: fourth, Cause: wgroam.CauseConfig})
}

// TestHookMoved: a device that is moved to another namespace is another device.
func TestHookMoved(t *testing.T) { eachRung(t, hookMoved) }

func hookMoved(t *testing.T) {
	s := newSite(t)
	h := s.lab.Gateways[1]
	err := s.gw.Do(func() error {
		return netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: "wg1"}})
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s.gw, "wg", "set", "wg1", "peer", s.c.Key().String())
	here := deviceOf(t, s.gw, "wg1")
	s.follow(here)
	eps := []netip.AddrPort{{}}
	configure := func(c *wg.Client, device string) {
		t.Helper()
		ep := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(len(eps)))
		eps = append(eps, ep)
		if err := c.SetEndpoints(device, []wg.Endpoint{{Peer: s.c.Key(), Endpoint: ep}}); err != nil {
			t.Fatal(err)
		}
	}
	check := func(dev Device, n int) {
		t.Helper()
		want := []Event{{Device: dev, Peer: s.c.Key(), Old: eps[n-1], New: eps[n], Cause: wgroam.CauseConfig}}
		if diff := cmp.Diff(want, s.events(), opts); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	}
	configure(s.wg, "wg1")
	check(here, 1)

	err = s.gw.Do(func() error {
		to, err := netns.GetFromPath(h.NetNS())
		if err != nil {
			return err
		}
		defer to.Close()
		link, err := netlink.LinkByName("wg1")
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(link, int(to))
	})
	if err != nil {
		t.Fatal(err)
	}
	there := deviceOf(t, h, "wg1")
	wgH := open(t, h.Do)
	configure(wgH, "wg1")
	s.want()
	s.follow(there)
	configure(wgH, "wg1")
	check(there, 3)

	// Renamed and deleted: the name means nothing to the hook, and what is gone
	// says nothing.
	err = h.Do(func() error {
		link, err := netlink.LinkByName("wg1")
		if err != nil {
			return err
		}
		return netlink.LinkSetName(link, "wg2")
	})
	if err != nil {
		t.Fatal(err)
	}
	configure(wgH, "wg2")
	check(there, 4)
	err = h.Do(func() error {
		link, err := netlink.LinkByName("wg2")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	if err != nil {
		t.Fatal(err)
	}
	s.want()
	if err := errors.Join(s.hook.Unfollow(here), s.hook.Unfollow(there)); err != nil {
		t.Error(err)
	}
}

// manyPeers gives the gateway's device n more peers.
func (s *site) manyPeers(n int) []wgroam.Key {
	s.t.Helper()
	keys := make([]wgroam.Key, n)
	args := []string{"set", s.gw.Device()}
	for i := range keys {
		keys[i] = wgroam.Key{byte(i), byte(i >> 8), 1}
		args = append(args, "peer", keys[i].String())
	}
	run(s.t, s.gw, "wg", args...)
	return keys
}

// storm moves all peers to a new port, rounds times, starting with first+1.
func (s *site) storm(keys []wgroam.Key, first, rounds int) error {
	for round := first + 1; round <= first+rounds; round++ {
		for chunk := range slices.Chunk(keys, wg.ChunkPeers) {
			var eps []wg.Endpoint
			for _, k := range chunk {
				eps = append(eps, wg.Endpoint{Peer: k, Endpoint: stormAt(k, round)})
			}
			if err := s.wg.SetEndpoints(s.gw.Device(), eps); err != nil {
				return err
			}
		}
	}
	return nil
}

func stormAt(k wgroam.Key, round int) netip.AddrPort {
	if round == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, k[0]}), uint16(round))
}

func (s *site) limited() Limited {
	s.t.Helper()
	n, err := s.hook.Limited()
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

// checkLatest checks that nothing of what the peers have been through is newer
// than what the map has, and that the device is there.
func (s *site) checkLatest(keys []wgroam.Key, round int) {
	s.t.Helper()
	got := make(map[wgroam.Key]Event)
	for _, e := range s.latest() {
		got[e.Peer] = e
	}
	if len(got) != len(keys) {
		s.t.Errorf("latest has events of %d peers, want %d", len(got), len(keys))
	}
	for _, k := range keys {
		e := got[k]
		want := Event{Device: s.dev, Peer: k, Old: stormAt(k, round-1), New: stormAt(k, round), Cause: wgroam.CauseConfig}
		if diff := cmp.Diff(want, e, opts); diff != "" {
			s.t.Fatalf("latest of %v (-want +got):\n%s", k, diff)
		}
		if newest, ok, err := s.hook.Newest(e.InternalID); newest != e || !ok || err != nil {
			s.t.Fatalf("newest of %v: %+v, %v, %v; latest %+v", k, newest, ok, err, e)
		}
		if at, ok, err := s.hook.Look(e.InternalID); at != e.New || !ok || err != nil {
			s.t.Fatalf("%v is at %v, %v, %v; want %v", k, at, ok, err, e.New)
		}
	}
}

// TestHookLimit: a peer that moves all the time makes a few events in each
// window, and where it is at the end is known.
func TestHookLimit(t *testing.T) { eachRung(t, hookLimit) }

func hookLimit(t *testing.T) {
	s := newSite(t)
	keys := s.manyPeers(1)
	const rounds = 1000
	before := s.limited()
	if err := s.storm(keys, 0, rounds); err != nil {
		t.Fatal(err)
	}
	limited := int(s.limited().Peer - before.Peer)
	events := s.events()
	if len(events)+limited != rounds || limited == 0 {
		t.Errorf("%d events and %d held back, want %d together", len(events), limited, rounds)
	}
	windows := make(map[time.Duration]int)
	for _, e := range events {
		windows[e.Boot/Window]++
	}
	for w, n := range windows {
		if n > 8 {
			t.Errorf("window %d has %d events", w, n)
		}
	}
	s.checkLatest(keys, rounds)
	if n := s.limited().All - before.All; n != 0 {
		t.Errorf("the limit of all has held back %d events of one peer", n)
	}
	t.Logf("%d events in %d windows", len(events), len(windows))
}

// small gives a site a hook of its own, with a small ring buffer and a limit for
// all peers that an emulated machine can reach.
func (s *site) small(all, ring uint32) {
	s.t.Helper()
	for rung := range rungs {
		detach(s.t, rung)
	}
	load, links := loadPeer, (*Hook).attachFentry
	if rung == "kprobe" {
		load, links = loadKprobe, (*Hook).attachKprobes
	}
	hook, err := attach(1, func() (*ebpf.CollectionSpec, error) {
		spec, err := load()
		if err == nil {
			spec.Maps[peerMapEvents].MaxEntries = ring
			err = spec.Variables[peerVarLimitAll].Set(all)
		}
		return spec, err
	}, links, "")
	if err == nil {
		s.t.Cleanup(func() { hook.Close() })
		s.hook, err = hook, hook.Follow(s.dev)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// TestHookLimitAll: many peers that move all the time make some events in each
// window.
func TestHookLimitAll(t *testing.T) { eachRung(t, hookLimitAll) }

func hookLimitAll(t *testing.T) {
	s := newSite(t)
	const peers, rounds, all = 64, 40, 20
	s.small(all, 1<<20)
	keys := s.manyPeers(peers)
	if err := s.storm(keys, 0, rounds); err != nil {
		t.Fatal(err)
	}
	windows := make(map[time.Duration]int)
	events := s.events()
	for _, e := range events {
		windows[e.Boot/Window]++
	}
	for w, n := range windows {
		if n > all {
			t.Errorf("window %d has %d events, want no more than %d", w, n, all)
		}
	}
	limited := s.limited()
	if n := len(events) + int(limited.Peer+limited.All); n != peers*rounds || limited.All == 0 {
		t.Errorf("%d events and %+v held back, want %d together", len(events), limited, peers*rounds)
	}
	s.checkLatest(keys, rounds)
	t.Logf("%d events in %d windows, %+v held back", len(events), len(windows), limited)
}

// TestHookLook: where the device has a peer, now.
func TestHookLook(t *testing.T) { eachRung(t, hookLook) }

func hookLook(t *testing.T) {
	s := newSite(t)
	keys := s.manyPeers(1)
	var id uint64
	for _, ep := range []string{"192.0.2.1:258", "[2001:db8:1:2:3:4:5:6]:1", "192.0.2.2:258"} {
		ep := netip.MustParseAddrPort(ep)
		s.configure(wg.Endpoint{Peer: keys[0], Endpoint: ep})
		id = s.latest()[0].InternalID
		if got, ok, err := s.hook.Look(id); got != ep || !ok || err != nil {
			t.Errorf("the peer is at %v, %v, %v; want %v", got, ok, err, ep)
		}
	}
	if got, ok, err := s.hook.Look(1 << 40); ok || err != nil {
		t.Errorf("a peer that nobody has is at %v, %v", got, err)
	}
	run(t, s.gw, "wg", "set", s.gw.Device(), "peer", keys[0].String(), "remove")
	await(t, "the kernel frees the peer", func() bool {
		_, ok, err := s.hook.Look(id)
		if err != nil {
			t.Fatal(err)
		}
		return !ok
	})
	// Another one in its place is not it.
	run(t, s.gw, "wg", "set", s.gw.Device(), "peer", keys[0].String(), "endpoint", "192.0.2.3:9")
	if got, ok, err := s.hook.Look(id); ok || err != nil {
		t.Errorf("the peer that is gone is at %v, %v", got, err)
	}
}

// TestHookLost: nobody reads while more changes than the ring buffer holds. What
// does not fit is counted, as is what the limits hold back, and the newest of
// every peer is not forgotten.
func TestHookLost(t *testing.T) { eachRung(t, hookLost) }

func hookLost(t *testing.T) {
	s := newSite(t)
	const peers = 64
	s.small(200, 1<<14)
	keys := s.manyPeers(peers)
	rounds := 0
	await(t, "the ring buffer is full, and something is held back", func() bool {
		rounds++
		if err := s.storm(keys, rounds-1, 1); err != nil {
			t.Fatal(err)
		}
		return s.lost() > 100 && s.limited() != Limited{}
	})
	lost, limited := s.lost(), s.limited()
	s.checkLatest(keys, rounds)

	// What did fit is whole and in order; together they are all.
	if _, err := s.hook.Flush(); err != nil {
		t.Fatal(err)
	}
	read, sawDrained := 0, false
	last := make(map[wgroam.Key]uint16)
	for {
		e, drained, err := s.hook.Read()
		if errors.Is(err, ErrFlushed) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if sawDrained {
			t.Fatal("an event after the last one")
		}
		read++
		sawDrained = drained
		n := e.New.Port()
		if n <= last[e.Peer] || e.Old != stormAt(e.Peer, int(n)-1) || e.New != stormAt(e.Peer, int(n)) {
			t.Fatalf("an event of %v is %v -> %v, after %d", e.Peer, e.Old, e.New, last[e.Peer])
		}
		last[e.Peer] = n
	}
	if !sawDrained {
		t.Error("nothing said that there are no more")
	}
	if n := read + lost + int(limited.Peer+limited.All); n != peers*rounds {
		t.Errorf("%d read, %d lost and %+v held back, want %d together", read, lost, limited, peers*rounds)
	}
	t.Logf("the ring buffer holds %d events; %d lost, %+v held back", read, lost, limited)

	// And on it goes, in the next window.
	nextWindow(t)
	if err := s.storm(keys, rounds, 1); err != nil {
		t.Fatal(err)
	}
	if n := len(s.events()); n != peers {
		t.Errorf("%d events after the loss, want %d", n, peers)
	}
	if n := s.lost(); n != lost {
		t.Errorf("lost %d events, %d before", n, lost)
	}
}

// TestHookLatest: the map has room for twice the peers that were announced,
// because it forgets some before it is full: on whatever CPU they change, half
// of it is safe.
func TestHookLatest(t *testing.T) { eachRung(t, hookLatest) }

func hookLatest(t *testing.T) {
	needWireGuard(t)
	hook := sharedHook(t)
	if n := hook.objs.Latest.MaxEntries(); n != 4096 {
		t.Errorf("room for %d events, want 4096 at least, even for few peers", n)
	}
	ids := uint64(hook.objs.Latest.MaxEntries() / 2)
	const first = 1 << 40 // no peer has it
	for round := range 3 {
		var wg sync.WaitGroup
		for cpu := range runtime.NumCPU() {
			wg.Go(func() {
				runtime.LockOSThread() // and ends with it
				var set unix.CPUSet
				set.Set(cpu)
				if err := unix.SchedSetaffinity(0, &set); err != nil {
					t.Error(err)
				}
				for id := uint64(cpu); id < ids; id += uint64(runtime.NumCPU()) {
					if err := hook.objs.Latest.Put(first+id, peerPeerState{Event: peerPeerEvent{InternalId: first + id, BootNs: uint64(round)}}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		latest, err := hook.Latest()
		if err != nil {
			t.Fatal(err)
		}
		seen := make(map[uint64]bool)
		for _, e := range latest {
			seen[e.InternalID] = e.Boot == time.Duration(round)
		}
		for id := range ids {
			if !seen[first+id] {
				t.Fatalf("round %d: nothing, or nothing new, of peer %d", round, id)
			}
		}
	}
	for id := range ids {
		if err := hook.objs.Latest.Delete(first + id); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHookClose: a reader that waits is told, and nothing else works any more.
func TestHookClose(t *testing.T) { eachRung(t, hookClose) }

func hookClose(t *testing.T) {
	s := newSite(t)
	result := make(chan error, 1)
	go func() {
		_, _, err := s.hook.Read()
		result <- err
	}()
	detach(t, rung)
	if err := <-result; !errors.Is(err, ErrClosed) {
		t.Errorf("Read: %v, want %v", err, ErrClosed)
	}
	if _, _, err := s.hook.Read(); !errors.Is(err, ErrClosed) {
		t.Errorf("Read once more: %v, want %v", err, ErrClosed)
	}
	if _, err := s.hook.Flush(); err == nil {
		t.Error("Flush of a closed hook: no error")
	}
	if err := s.hook.Follow(s.dev); err == nil {
		t.Error("Follow on a closed hook: no error")
	}
	if err := s.hook.Close(); err != nil {
		t.Errorf("Close once more: %v", err)
	}
}

// TestHookCloseBusy: the end comes in the middle of a storm. It ends the reader
// alone, 40 times: what can be read of the ring buffer ends with it.
func TestHookCloseBusy(t *testing.T) { eachRung(t, hookCloseBusy) }

func hookCloseBusy(t *testing.T) {
	s := newSite(t)
	keys := s.manyPeers(wg.ChunkPeers)
	// The ring buffer has one reader at a time.
	if err := s.hook.reader.Close(); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var storm sync.WaitGroup
	storm.Go(func() {
		for round := 0; ; round++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.storm(keys, round%60_000, 1); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 40 {
		reader, err := ringbuf.NewReader(s.hook.objs.Events)
		if err != nil {
			t.Fatal(err)
		}
		hook := &Hook{reader: &ring{Reader: reader}}
		events, done := make(chan struct{}, 1), make(chan error, 1)
		go func() {
			for {
				if _, _, err := hook.Read(); err != nil {
					done <- err
					return
				}
				select {
				case events <- struct{}{}:
				default:
				}
			}
		}()
		for range i%7 + 1 {
			<-events
		}
		if err := hook.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, ErrClosed) {
			t.Errorf("Read: %v, want %v", err, ErrClosed)
		}
	}
	close(stop)
	storm.Wait()
	detach(t, rung)
}

// TestHookLeaks: what Attach takes, with no more privileges than it needs, Close
// gives back.
func TestHookLeaks(t *testing.T) {
	needWireGuard(t)
	count := func() map[string]int {
		runtime.GC() // the lost counter's memory lives as long as the hook
		n := make(map[string]int)
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		n["file descriptors"] = len(fds)
		for id := ebpf.ProgramID(0); ; n["programs"]++ {
			if id, err = ebpf.ProgramGetNextID(id); err != nil {
				break
			}
		}
		for id := ebpf.MapID(0); ; n["maps"]++ {
			if id, err = ebpf.MapGetNextID(id); err != nil {
				break
			}
		}
		it := new(link.Iterator)
		defer it.Close()
		for it.Next() {
			n["links"]++
		}
		return n
	}
	for rung := range rungs {
		detach(t, rung)
	}
	before := count()
	for range 2 {
		for rung, attach := range rungs {
			unprivileged(t, []int{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYS_ADMIN}, func() {
				hook, err := attach(1)
				if err != nil {
					t.Errorf("%s: %v", rung, err)
					return
				}
				if err := hook.Close(); err != nil {
					t.Errorf("%s: %v", rung, err)
				}
			})
		}
	}
	// The kernel lets go of programs and maps in the background.
	await(t, "the same numbers as before", func() bool {
		after := count()
		for what, n := range after {
			if n > before[what] {
				t.Logf("%d %s, %d before", n, what, before[what])
				return false
			}
		}
		return true
	})
}

// TestHookModule: fentry keeps the module, kprobes do not, and are dead when it
// is gone; without the module there is nothing to attach to, and with it again
// there is.
func TestHookModule(t *testing.T) { eachRung(t, hookModule) }

func hookModule(t *testing.T) {
	needWireGuard(t)
	unload := func() error { return exec.Command("modprobe", "-r", "wireguard").Run() }
	load := func() {
		if out, err := exec.Command("modprobe", "wireguard").CombinedOutput(); err != nil {
			t.Errorf("modprobe: %v: %s", err, out)
		}
	}
	t.Cleanup(load)
	for rung := range rungs {
		detach(t, rung)
	}
	s := newSite(t)
	s.reach()
	s.want(Event{New: s.c.Endpoint(), Cause: wgroam.CauseInitiation})
	if s.hook.Stale() {
		t.Error("the hook is stale from the start")
	}
	switch rung {
	case "fentry":
		if unload() == nil {
			t.Error("the module could be removed under the hook")
		}
		detach(t, rung)
		// The kernel lets go of the program in the background.
		await(t, "the module is gone", func() bool { return unload() == nil })
	case "kprobe":
		await(t, "the module is gone", func() bool { return unload() == nil })
		if !s.hook.Stale() {
			t.Error("the hook is not stale without the module")
		}
		if _, ok, err := s.hook.Look(s.latest()[0].InternalID); ok || err != nil {
			t.Errorf("the peer is somewhere: %v, %v", ok, err)
		}
	}
	if hook, err := rungs[rung](1); !errors.Is(err, ErrNoModule) {
		t.Errorf("Attach without the module: %v, want %v", err, ErrNoModule)
		if err == nil {
			hook.Close()
		}
	}
	load()
	if rung == "kprobe" {
		// What makes Stale worth asking.
		dead := newSite(t)
		dead.reach()
		dead.want()
		if !dead.hook.Stale() {
			t.Error("the hook is not stale with the module loaded again")
		}
		detach(t, rung)
	}
	s = newSite(t)
	s.reach()
	s.want(Event{New: s.c.Endpoint(), Cause: wgroam.CauseInitiation})
	if s.hook.Stale() {
		t.Error("the hook of the module loaded again is stale")
	}
}
