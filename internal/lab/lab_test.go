// SPDX-License-Identifier: MIT

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
)

// childMode makes the test binary act as a program that a test starts.
const childMode = "WGROAM_LAB_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childMode) {
	case "netns":
		// Says where it runs, then stays.
		var st unix.Stat_t
		if err := unix.Stat("/proc/self/ns/net", &st); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(st.Ino)
		<-time.After(time.Hour)
	case "lab":
		// Owns a lab with a program in it, and waits to be killed.
		l, err := New(context.Background(), Config{})
		if err == nil {
			program := child("netns")
			program.ExtraFiles = []*os.File{os.Stdout} // stays open until it dies, too
			err = l.Gateways[0].Start(program)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println(l.prefix)
		<-time.After(time.Hour)
	}
	os.Exit(m.Run())
}

func child(mode string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childMode+"="+mode)
	cmd.Stderr = os.Stderr
	return cmd
}

func needRoot(t *testing.T) {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("CI") == "true":
		t.Fatal("network namespaces need root")
	default:
		t.Skip("network namespaces need root")
	}
}

func newLab(t *testing.T, cfg Config) *Lab {
	t.Helper()
	needRoot(t)
	l, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error("close:", err)
		}
	})
	return l
}

// within limits what should take milliseconds: emulated machines are slow.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func ping(t *testing.T, c *Client) {
	t.Helper()
	if _, err := c.Ping(within(t)); err != nil {
		t.Fatal(err)
	}
}

// deaf fails the test when the client's pings come back.
func deaf(t *testing.T, c *Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("ping: got error %v, want none to answer", err)
	}
}

// eventually waits for a condition that nothing announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx := within(t)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: still not so", what)
		}
	}
}

func sees(t *testing.T, g *Gateway, c *Client, want netip.AddrPort) {
	t.Helper()
	got, err := g.Endpoint(c.Key())
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Fatalf("gateway %s sees the client at %v, want %v", g.Name, got, want)
	}
	if got := c.Endpoint(); got != want {
		t.Fatalf("client says it is at %v, want %v", got, want)
	}
}

func TestRoams(t *testing.T) {
	l := newLab(t, Config{})
	t.Logf("kernel WireGuard: %v", l.Kernel)
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	ping(t, c)
	last := c.Endpoint()
	sees(t, a, c, last)
	for _, step := range []struct {
		name         string
		roam         func() (netip.AddrPort, error)
		addr, family bool // what has to change; otherwise the port
	}{
		{"port", c.RoamPort, false, false},
		{"address", c.RoamAddress, true, false},
		{"family", c.RoamFamily, true, true},
		{"port over IPv6", c.RoamPort, false, false},
		{"address over IPv6", c.RoamAddress, true, false},
		{"family back", c.RoamFamily, true, true},
		{"port again", c.RoamPort, false, false},
	} {
		ep, err := step.roam()
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		got, err := a.Endpoint(c.Key())
		if err != nil || got != last {
			t.Fatalf("%s: gateway sees %v (error %v) before a packet, want %v", step.name, got, err, last)
		}
		if err := wgroam.CheckEndpoint(ep); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
		if step.addr != (ep.Addr() != last.Addr()) || step.family != (ep.Addr().Is6() != last.Addr().Is6()) || (!step.addr && ep.Port() == last.Port()) {
			t.Errorf("%s: from %v to %v", step.name, last, ep)
		}
		ping(t, c)
		sees(t, a, c, ep)
		last = ep
	}
	if eps, err := h.Endpoints(); err != nil || len(eps) != 0 {
		t.Errorf("the other gateway sees %v (error %v), want nothing", eps, err)
	}
}

// A client that talks all the time does not end up elsewhere than it says, nor
// does the gateway see it anywhere in between.
func TestRoamsUnderTraffic(t *testing.T) {
	l := newLab(t, Config{})
	a, c := l.Gateways[0], l.Clients[0]
	ctx, cancel := context.WithCancel(t.Context())
	var talk sync.WaitGroup
	defer talk.Wait()
	defer cancel()
	for range 2 {
		talk.Go(func() {
			for ctx.Err() == nil {
				// A ping that is under way when the client roams may be lost.
				short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
				_, _ = c.Ping(short)
				stop()
			}
		})
	}
	ping(t, c)
	last := c.Endpoint()
	for i := range 30 {
		ep, err := []func() (netip.AddrPort, error){c.RoamPort, c.RoamAddress, c.RoamFamily}[i%3]()
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, fmt.Sprintf("gateway sees the client at %v", ep), func() bool {
			got, err := a.Endpoint(c.Key())
			if err != nil {
				t.Fatal(err)
			}
			if got != last && got != ep {
				t.Fatalf("gateway sees the client at %v on its way from %v to %v", got, last, ep)
			}
			return got == ep
		})
		last = ep
	}
}

func TestSend(t *testing.T) {
	l := newLab(t, Config{})
	c, a := l.Clients[0], l.Gateways[0]
	ping(t, c)
	ep, err := c.RoamPort()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Send(100); err != nil {
		t.Fatal(err)
	}
	eventually(t, "gateway sees the client at "+ep.String(), func() bool {
		got, err := a.Endpoint(c.Key())
		if err != nil {
			t.Fatal(err)
		}
		return got == ep
	})
}

func TestManyClients(t *testing.T) {
	const n = 20
	l := newLab(t, Config{Clients: n})
	want := map[wgroam.Key]netip.AddrPort{}
	for i, c := range l.Clients {
		ping(t, c)
		roam := []func() (netip.AddrPort, error){c.RoamPort, c.RoamAddress, c.RoamFamily}[i%3]
		ep, err := roam()
		if err != nil {
			t.Fatal(err)
		}
		want[c.Key()] = ep
	}
	for _, c := range l.Clients {
		ping(t, c)
	}
	got, err := l.Gateways[0].Endpoints()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
	if len(want) != n {
		t.Errorf("%d different keys, want %d", len(want), n)
	}
}

func TestMoveVIP(t *testing.T) {
	l := newLab(t, Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	move := func(to *Gateway) {
		t.Helper()
		if err := l.MoveVIP(to); err != nil {
			t.Fatal(err)
		}
		if err := c.Forget(); err != nil {
			t.Fatal(err)
		}
		ping(t, c)
		sees(t, to, c, c.Endpoint())
	}
	ping(t, c)
	move(h) // from a live gateway
	if _, err := c.RoamFamily(); err != nil {
		t.Fatal(err)
	}
	ping(t, c)
	sees(t, h, c, c.Endpoint())
	move(a) // over IPv6

	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	deaf(t, c)
	move(h) // from a dead one
	if err := a.Revive(); err != nil {
		t.Fatal(err)
	}
	ping(t, c)
	move(a)
	if _, err := c.RoamFamily(); err != nil {
		t.Fatal(err)
	}
	ping(t, c)
	sees(t, a, c, c.Endpoint())
}

// A promoted gateway that knows the endpoint speaks first, from the virtual IP.
func TestGatewaySpeaksFirst(t *testing.T) {
	for _, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			l := newLab(t, Config{})
			a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
			if family == "IPv6" {
				if _, err := c.RoamFamily(); err != nil {
					t.Fatal(err)
				}
			}
			ping(t, c)
			if err := a.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := l.MoveVIP(h); err != nil {
				t.Fatal(err)
			}
			keepalive := 25 * time.Second
			err := h.WG().ConfigureDevice(h.Device(), endpointConfig(c.Key(), c.Endpoint(), keepalive))
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "a handshake with the new gateway", func() bool {
				peers, err := h.Peers()
				if err != nil {
					t.Fatal(err)
				}
				return !peers[0].LastHandshakeTime.IsZero()
			})
			// Until the gateway's first packet the client sends with the keys of the old session.
			if _, err := c.Reach(within(t)); err != nil {
				t.Fatal(err)
			}
			d, err := c.lab.clients.wg.Device(c.Device())
			if err != nil {
				t.Fatal(err)
			}
			got := d.Peers[0].Endpoint.AddrPort()
			if want := netip.AddrPortFrom(c.vip, ListenPort); netip.AddrPortFrom(got.Addr().Unmap(), got.Port()) != want {
				t.Errorf("the client answers to %v, want %v", got, want)
			}
		})
	}
}

func endpointConfig(key wgroam.Key, ep netip.AddrPort, keepalive time.Duration) wgtypes.Config {
	return wgtypes.Config{Peers: []wgtypes.PeerConfig{{
		PublicKey:                   wgtypes.Key(key),
		UpdateOnly:                  true,
		Endpoint:                    net.UDPAddrFromAddrPort(ep),
		PersistentKeepaliveInterval: &keepalive,
	}}}
}

func TestLink(t *testing.T) {
	l := newLab(t, Config{})
	a, c := l.Gateways[0], l.Clients[0]
	ping(t, c)
	if err := a.LinkDown(); err != nil {
		t.Fatal(err)
	}
	sees(t, a, c, c.Endpoint())
	deaf(t, c)
	if err := a.LinkUp(); err != nil {
		t.Fatal(err)
	}
	// The session is gone; the client does not know.
	deaf(t, c)
	if err := c.Forget(); err != nil {
		t.Fatal(err)
	}
	ping(t, c)
	conn, err := c.Dial(within(t), "udp6", EchoPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Errorf("over inner IPv6: %v", err)
	}
}

// Devices that are made again know nothing, and have the same keys, places and
// neighbours.
func TestRebuild(t *testing.T) {
	l := newLab(t, Config{})
	a, c := l.Gateways[0], l.Clients[0]
	ping(t, c)
	ep := c.Endpoint()
	err := l.Rebuild(func() error {
		if _, err := a.Peers(); err == nil {
			t.Error("the device is still there")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if eps, err := a.Endpoints(); len(eps) != 0 || err != nil {
		t.Errorf("endpoints %v, error %v", eps, err)
	}
	ping(t, c)
	sees(t, a, c, ep)
}

// What others do to the link works as in the kernel: the outer port closes and opens.
func TestLinkByOthers(t *testing.T) {
	l := newLab(t, Config{})
	a := l.Gateways[0]
	free := func() bool {
		return a.Do(func() error {
			c, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", ListenPort))
			if err == nil {
				c.Close()
			}
			return err
		}) == nil
	}
	set := func(f func(netlink.Link) error) {
		t.Helper()
		err := a.Do(func() error {
			link, err := netlink.LinkByName(a.Device())
			if err != nil {
				return err
			}
			return f(link)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if free() {
		t.Fatal("the port is free while the link is up")
	}
	set(netlink.LinkSetDown)
	start := time.Now()
	eventually(t, "the port is free while the link is down", free)
	t.Logf("closed after %v", time.Since(start))
	set(netlink.LinkSetUp)
	eventually(t, "the port is taken while the link is up", func() bool { return !free() })
}

func TestDo(t *testing.T) {
	l := newLab(t, Config{})
	g, c := l.Gateways[1], l.Clients[0]
	if err := l.MoveVIP(g); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	if err := g.Do(func() error { return g.Do(func() error { return boom }) }); !errors.Is(err, boom) {
		t.Errorf("error from nested Do: %v", err)
	}
	var ln net.Listener
	err := g.Do(func() (err error) {
		ln, err = net.Listen("tcp6", fmt.Sprintf("[%v]:80", Inner6))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	conn, err := c.Dial(within(t), "tcp6", 80)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestStart(t *testing.T) {
	l := newLab(t, Config{})
	var st unix.Stat_t
	if err := unix.Stat(l.Gateways[1].NetNS(), &st); err != nil {
		t.Fatal(err)
	}
	cmd := child("netns")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Gateways[1].Start(cmd); err != nil {
		t.Fatal(err)
	}
	if got := readLine(t, out); got != fmt.Sprint(st.Ino) {
		t.Errorf("the child runs in namespace %s, want %d", got, st.Ino)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	// The child would run for ever; closing the lab ends it.
	_ = cmd.Wait()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
		t.Errorf("the child ended by itself: %v", cmd.ProcessState)
	}
	if err := l.Gateways[1].Start(child("netns")); err == nil {
		t.Error("a closed lab started a program")
	}
	for name, f := range map[string]func() error{
		"LinkDown": l.Gateways[0].LinkDown,
		"Kill":     l.Gateways[0].Kill,
		"Forget":   l.Clients[0].Forget,
		"MoveVIP":  func() error { return l.MoveVIP(l.Gateways[1]) },
		"Do":       func() error { return l.Gateways[0].Do(func() error { return nil }) },
		"Send":     func() error { return l.Clients[0].Send(1) },
	} {
		if f() == nil {
			t.Errorf("%s worked in a closed lab", name)
		}
	}
}

func TestConfig(t *testing.T) {
	for name, cfg := range map[string]Config{
		"long name":        {Gateways: []string{"abcde"}},
		"number":           {Gateways: []string{"1"}},
		"empty name":       {Gateways: []string{""}},
		"name twice":       {Gateways: []string{"a", "a"}},
		"router's name":    {Gateways: []string{"lan"}},
		"too many clients": {Clients: 1001},
	} {
		if _, err := New(t.Context(), cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// things lists what a lab could leave behind: sockets, links, open files, and
// threads that did not come home.
func things(t *testing.T) map[string][]string {
	t.Helper()
	got := map[string][]string{"sockets": sockets(t, "wgl"+base36(int64(os.Getpid())))}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		got["links"] = append(got["links"], l.Attrs().Name)
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	got["files"] = []string{fmt.Sprint(len(files))}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range threads {
		ns, err := os.Readlink(path)
		if err == nil && ns != home {
			got["namespaces"] = append(got["namespaces"], ns)
		}
	}
	return got
}

// settled waits for the threads, which end some time after their goroutines.
func settled(t *testing.T) (got map[string][]string) {
	t.Helper()
	eventually(t, "no thread is in a namespace of a lab", func() bool {
		got = things(t)
		return len(got["namespaces"]) == 0
	})
	return got
}

func sockets(t *testing.T, prefix string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(uapiDir, prefix+"*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestNothingLeft(t *testing.T) {
	needRoot(t)
	// The first lab makes the runtime open files that it keeps.
	l := newLab(t, Config{})
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	before := settled(t)
	routines := goleak.IgnoreCurrent()

	l, other := newLab(t, Config{}), newLab(t, Config{Gateways: []string{"one"}})
	ping(t, l.Clients[0])
	ping(t, other.Clients[0])
	if l.Gateways[0].NetNS() == other.Gateways[0].NetNS() {
		t.Error("two labs share a namespace")
	}
	for _, l := range []*Lab{l, other, l} {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(before, settled(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}

	// A lab that is interrupted while it is built.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(ctx, Config{}); !errors.Is(err, context.Canceled) {
		t.Errorf("New with an ended context: %v", err)
	}
	if diff := cmp.Diff(before, settled(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
	goleak.VerifyNone(t, routines)
}

func TestKilled(t *testing.T) {
	needRoot(t)
	cmd := child("lab")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	prefix := readLine(t, out)
	want := 3 // two gateways and a client
	if KernelWireGuard() {
		want = 0
	}
	if err := sweep(); err != nil {
		t.Error(err)
	}
	if got := sockets(t, prefix); len(got) != want {
		t.Errorf("a live lab has sockets %q, want %d", got, want)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// The program in the lab keeps the pipe open, and would do so for an hour.
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
	newLab(t, Config{})
	if got := sockets(t, prefix); len(got) != 0 {
		t.Errorf("the next lab has left %q", got)
	}
}

func readLine(t *testing.T, r io.Reader) string {
	t.Helper()
	s, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(s)
}
