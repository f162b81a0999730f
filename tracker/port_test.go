// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/wg"
)

// eachDevice runs a test at the UDP port with several implementations: the
// kernel's, or wireguard-go of today in this process; and an old wireguard-go in
// processes of its own, of a gateway and of clients.
func eachDevice(t *testing.T, f func(*testing.T, lab.Config)) {
	t.Run("own", func(t *testing.T) { f(t, lab.Config{}) })
	program := func(t *testing.T) string {
		needRoot(t)
		path, err := exec.LookPath("wireguard-go")
		if err == nil {
			return path
		}
		if !lab.KernelWireGuard() {
			t.Fatalf("make deps: %v", err)
		}
		t.Skip("the kernel has WireGuard, and there is no wireguard-go")
		return ""
	}
	t.Run("old gateway", func(t *testing.T) { f(t, lab.Config{GatewayProgram: program(t)}) })
	t.Run("old clients", func(t *testing.T) { f(t, lab.Config{ClientProgram: program(t)}) })
}

// provenAt waits until a client is proven at an endpoint.
func (v *live) provenAt(c *lab.Client, ep netip.AddrPort) {
	v.t.Helper()
	defer func() {
		if !v.t.Failed() {
			return
		}
		has, err := v.gw.Endpoint(c.Key())
		held, _ := v.view.Get(c.Key())
		v.t.Logf("the device has %v (%v), the view %+v; status %+v", has, err, held, v.Status())
	}()
	await(v.t, fmt.Sprintf("the client is proven at %v", ep), func() bool {
		_, proven := v.said()
		for _, o := range proven {
			if o.Peer == c.Key() && o.New == ep {
				return true
			}
		}
		return false
	})
}

// only fails if a client was reported anywhere else than at these endpoints.
func (v *live) only(c *lab.Client, eps ...netip.AddrPort) {
	v.t.Helper()
	changed, proven := v.said()
	for what, list := range map[string][]wgroam.Observation{"changed": changed, "proven": proven} {
		var at []netip.AddrPort
		for _, o := range list {
			if o.Peer == c.Key() {
				at = append(at, o.New)
			}
		}
		if fmt.Sprint(at) != fmt.Sprint(eps) {
			v.t.Errorf("%s: the client at %v, want %v", what, at, eps)
		}
	}
	if s := v.Status(); s.SweepRepairs != 0 || s.Rung != RungPort {
		v.t.Errorf("status %+v", s)
	}
}

// TestPortRoams: by data of either IP version, by handshakes, by nothing but
// keepalives. Nothing is polled.
func TestPortRoams(t *testing.T) {
	eachDevice(t, func(t *testing.T, cfg lab.Config) {
		cfg.Clients, cfg.Keepalive = 2, time.Second
		l := newLab(t, cfg)
		c, idle := l.Clients[0], l.Clients[1]
		v := start(t, l.Gateways[0], ported(t))
		for _, c := range l.Clients {
			// Keepalives may have begun a session before the tracker was there.
			if err := c.Forget(); err != nil {
				t.Fatal(err)
			}
			reach(t, c)
		}
		eps := []netip.AddrPort{c.Endpoint()}
		v.provenAt(c, c.Endpoint())
		for _, roam := range []func() (netip.AddrPort, error){c.RoamPort, c.RoamAddress, c.RoamFamily, c.RoamPort, c.RoamFamily} {
			for _, how := range []func() error{
				func() error { return nil },
				c.Forget, // a handshake
			} {
				ep, err := roam()
				if err == nil {
					err = errors.Join(how(), c.Send(1))
				}
				if err != nil {
					t.Fatal(err)
				}
				v.provenAt(c, ep)
				eps = append(eps, ep)
			}
		}
		v.only(c, eps...)
		// Says nothing by itself. It roams by one keepalive.
		was := idle.Endpoint()
		ep, err := idle.RoamPort()
		if err != nil {
			t.Fatal(err)
		}
		v.provenAt(idle, ep)
		v.only(idle, was, ep)
		v.awaitAgreement()
	})
}

// TestPortOneWay: clients that only send, and that only receive.
func TestPortOneWay(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 2})
	gw, sends, receives := l.Gateways[0], l.Clients[0], l.Clients[1]
	v := start(t, gw, ported(t))
	// It does not answer, not even that there is nobody.
	var sink net.PacketConn
	err := receives.Do(func() (err error) {
		sink, err = net.ListenPacket("udp4", netip.AddrPortFrom(receives.Inner4, lab.DiscardPort).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	reach(t, receives)
	if err := sends.Send(1); err != nil {
		t.Fatal(err)
	}
	v.provenAt(sends, sends.Endpoint())
	v.provenAt(receives, receives.Endpoint())
	s := []netip.AddrPort{sends.Endpoint()}
	for range 3 {
		ep, err := sends.RoamPort()
		if err == nil {
			err = sends.Send(1)
		}
		if err != nil {
			t.Fatal(err)
		}
		v.provenAt(sends, ep)
		s = append(s, ep)
	}
	// It has something to answer after ten seconds (KEEPALIVE_TIMEOUT), a
	// keepalive, and roams before.
	was := receives.Endpoint()
	tell(t, gw, receives)
	if _, _, err := sink.ReadFrom(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	ep, err := receives.RoamPort()
	if err != nil {
		t.Fatal(err)
	}
	v.provenAt(receives, ep)
	v.only(sends, s...)
	v.only(receives, was, ep)
}

// tell sends a datagram from a gateway to a client, through the tunnel.
func tell(t testing.TB, gw *lab.Gateway, c *lab.Client) {
	t.Helper()
	err := gw.Do(func() error {
		conn, err := net.Dial("udp4", netip.AddrPortFrom(c.Inner4, lab.DiscardPort).String())
		if err != nil {
			return err
		}
		defer conn.Close()
		_, err = conn.Write([]byte("tell"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// tap hears all of WireGuard that reaches a gateway, over IPv4.
type wiretap struct {
	t testing.TB
	f *os.File
}

func tapOf(t testing.TB, gw *lab.Gateway) *wiretap {
	t.Helper()
	w := &wiretap{t: t}
	err := gw.Do(func() error {
		// Network byte order, as the kernel wants it here.
		proto := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(proto))
		if err == nil {
			w.f = os.NewFile(uintptr(fd), "tap")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.f.Close() })
	return w
}

// next returns the next message of a type.
func (w *wiretap) next(kind byte) []byte {
	w.t.Helper()
	if err := w.f.SetReadDeadline(time.Now().Add(patience)); err != nil {
		w.t.Fatal(err)
	}
	const headers = 20 + 8 // IPv4 without options, UDP
	for buf := make([]byte, 1<<16); ; {
		n, err := w.f.Read(buf)
		if err != nil {
			w.t.Fatal(fmt.Errorf("no message of type %d: %w", kind, err))
		}
		if n > headers && buf[0] == 0x45 && buf[9] == unix.IPPROTO_UDP &&
			binary.BigEndian.Uint16(buf[22:]) == lab.ListenPort && buf[headers] == kind {
			return append([]byte(nil), buf[headers:n]...)
		}
	}
}

// attacker sends to a gateway's WireGuard port from a host of the LAN.
func attacker(t testing.TB, from *lab.Gateway) (net.Conn, netip.AddrPort) {
	t.Helper()
	var conn net.Conn
	err := from.Do(func() (err error) {
		conn, err = net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from.Addr4, 0)),
			net.UDPAddrFromAddrPort(netip.AddrPortFrom(lab.VIP4, lab.ListenPort)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, netip.MustParseAddrPort(conn.LocalAddr().String())
}

func send(t testing.TB, conn net.Conn, message []byte) {
	t.Helper()
	// Refused, when the other side has no socket.
	if _, err := conn.Write(message); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal(err)
	}
}

// readd removes the gateway's only peer and adds it again, as configuration management
// does: the time of its last handshake is forgotten.
func readd(t *testing.T, gw *lab.Gateway, endpoint *net.UDPAddr) {
	t.Helper()
	peers, err := gw.Peers()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []wgtypes.PeerConfig{
		{PublicKey: peers[0].PublicKey, Remove: true},
		{PublicKey: peers[0].PublicKey, AllowedIPs: peers[0].AllowedIPs, Endpoint: endpoint},
	} {
		if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{p}}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPortReplay: a device that has not heard of a peer before accepts the
// recording of an old initiation. It is no proof; that of the peer itself is.
func TestPortReplay(t *testing.T) {
	eachDevice(t, func(t *testing.T, cfg lab.Config) {
		l := newLab(t, cfg)
		gw, c := l.Gateways[0], l.Clients[0]
		tap := tapOf(t, gw)
		reach(t, c)
		initiation := tap.next(device.MessageInitiationType)
		readd(t, gw, nil)
		v := start(t, gw, ported(t))
		conn, forged := attacker(t, l.Gateways[1])
		send(t, conn, initiation)
		if h := v.awaitAt(c, forged); h.Cause != wgroam.CauseInitiation {
			t.Errorf("the view has %+v", h)
		}
		// Data that is none, from the same place, and dumps.
		send(t, conn, append([]byte{4, 0, 0, 0}, make([]byte, 60)...))
		for range 3 {
			n := v.Status().Resyncs
			v.wantDump()
			await(t, "a dump", func() bool { return v.Status().Resyncs > n })
		}
		if _, proven := v.said(); len(proven) != 0 {
			t.Errorf("the replay is proven: %+v", proven)
		}
		if err := c.Forget(); err != nil {
			t.Fatal(err)
		}
		reach(t, c)
		v.provenAt(c, c.Endpoint())
		_, proven := v.said()
		if len(proven) != 1 || proven[0].New != c.Endpoint() {
			t.Errorf("proven: %+v", proven)
		}
	})
}

// TestPortReplayLive: a recorded initiation is sent to a device that has only ever
// begun sessions with the peer, with the index of the live session written into it,
// which its MAC lets anybody do. The device answers there, and sends its data of that
// session there: no proof.
func TestPortReplayLive(t *testing.T) {
	eachDevice(t, func(t *testing.T, cfg lab.Config) {
		l := newLab(t, cfg)
		gw, c := l.Gateways[0], l.Clients[0]
		tap := tapOf(t, gw)
		reach(t, c)
		initiation := tap.next(device.MessageInitiationType)
		readd(t, gw, net.UDPAddrFromAddrPort(c.Endpoint()))
		// It would answer that nobody is there, and take the endpoint back.
		err := c.Do(func() error {
			conn, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", lab.DiscardPort))
			if err == nil {
				t.Cleanup(func() { conn.Close() })
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		v := start(t, gw, ported(t))
		tell(t, gw, c)
		response := tap.next(device.MessageResponseType)
		await(t, "a session that the gateway began", func() bool {
			peers, err := gw.Peers()
			return err == nil && !peers[0].LastHandshakeTime.IsZero()
		})
		tell(t, gw, c) // under it

		copy(initiation[4:8], response[4:8])
		var g device.CookieGenerator
		g.Init(device.NoisePublicKey(l.PublicKey()))
		clear(initiation[116:])
		g.AddMacs(initiation)
		conn, forged := attacker(t, l.Gateways[1])
		send(t, conn, initiation)
		if h := v.awaitAt(c, forged); h.Cause != wgroam.CauseInitiation {
			t.Errorf("the view has %+v", h)
		}
		for range 3 {
			tell(t, gw, c) // to where the attacker is
			n := v.Status().Resyncs
			v.wantDump()
			await(t, "a dump", func() bool { return v.Status().Resyncs > n })
		}
		_, proven := v.said()
		for _, o := range proven {
			if o.New == forged {
				t.Errorf("the replay is proven: %+v", o)
			}
		}
		// The peer itself, from elsewhere.
		ep, err := c.RoamPort()
		if err == nil {
			err = c.Forget()
		}
		if err != nil {
			t.Fatal(err)
		}
		reach(t, c)
		v.provenAt(c, ep)
	})
}

// forge returns messages that somebody can make who has heard the tunnel: of all
// types, of right and wrong sizes, with our index in use and with others.
func forge(gateway wgroam.Key, genuine []byte) [][]byte {
	var g device.CookieGenerator
	g.Init(device.NoisePublicKey(gateway))
	index := binary.LittleEndian.Uint32(genuine[4:])
	var out [][]byte
	for _, size := range []int{16, 32, 64, 92, 148, 149, 1300} {
		for kind := range 6 {
			for _, i := range []uint32{index, index + 1, 0} {
				m := make([]byte, size)
				rand.Read(m)
				binary.LittleEndian.PutUint32(m, uint32(kind))
				binary.LittleEndian.PutUint32(m[4:], i)
				if kind == device.MessageResponseType {
					binary.LittleEndian.PutUint32(m[8:], i)
				}
				if size > 64 {
					g.AddMacs(m)
				}
				out = append(out, m)
			}
		}
	}
	return append(out, genuine)
}

// TestPortForged: whatever somebody sends who can hear all, and however fast, makes no
// change and no state, and few dumps. A roam beneath it all is found.
func TestPortForged(t *testing.T) {
	eachDevice(t, func(t *testing.T, cfg lab.Config) {
		l := newLab(t, cfg)
		gw, c := l.Gateways[0], l.Clients[0]
		tap := tapOf(t, gw)
		v := start(t, gw, ported(t))
		reach(t, c)
		v.provenAt(c, c.Endpoint())
		eps := []netip.AddrPort{c.Endpoint()}
		messages := forge(l.PublicKey(), tap.next(device.MessageTransportType))
		conn, _ := attacker(t, l.Gateways[1])

		ctx, stop := context.WithCancel(t.Context())
		var flood sync.WaitGroup
		sent := 0
		flood.Go(func() {
			for ctx.Err() == nil {
				for _, m := range messages {
					// Lost, as when it is too much.
					_, _ = conn.Write(m)
					sent++
				}
			}
		})
		defer flood.Wait()
		defer stop()
		resyncs, began := v.Status().Resyncs, time.Now()
		await(t, "the flood asks for dumps", func() bool { return v.Status().Resyncs > resyncs+2 })
		for range 5 {
			ep, err := c.RoamPort()
			if err != nil {
				t.Fatal(err)
			}
			roamed := time.Now()
			reach(t, c)
			v.provenAt(c, ep)
			t.Logf("found after %v", time.Since(roamed))
			eps = append(eps, ep)
		}
		took := time.Since(began)
		stop()
		flood.Wait()
		dumps := v.Status().Resyncs - resyncs
		t.Logf("%d dumps in %v, %d forged messages", dumps, took, sent)
		if most := took/resyncDelay + 5; time.Duration(dumps) > most {
			t.Errorf("%d dumps in %v, want no more than %d", dumps, took, most)
		}
		v.only(c, eps...)
		v.Tracker.mu.Lock()
		defer v.Tracker.mu.Unlock()
		if s := v.sessions; len(s.peers) != 1 || len(s.local) != 1 || len(s.remote) != 1 || len(v.unnamed) != 0 {
			t.Errorf("%+v, and %d without a name, want one session", s, len(v.unnamed))
		}
	})
}

// silence waits until what the clients have said is no longer under way, where it
// would turn an endpoint back.
func (v *live) silence() {
	v.t.Helper()
	var last int64
	still := 0
	await(v.t, "silence", func() bool {
		peers, err := v.gw.Peers()
		if err != nil {
			v.t.Fatal(err)
		}
		var sum int64
		for _, p := range peers {
			sum += p.ReceiveBytes
		}
		if sum == last {
			still++
		} else {
			last, still = sum, 0
		}
		return still == 50
	})
}

// TestPortConfig: an administrator's writes are no observations, nor are the
// applier's, which are no news. A peer that comes back to where it was is.
func TestPortConfig(t *testing.T) {
	eachDevice(t, func(t *testing.T, cfg lab.Config) {
		l := newLab(t, cfg)
		gw, c := l.Gateways[0], l.Clients[0]
		v := start(t, gw, ported(t))
		reach(t, c)
		home := c.Endpoint()
		v.provenAt(c, home)

		v.silence()
		v.configure(c.Key(), at(1))
		tell(t, gw, c)
		if h := v.awaitAt(c, at(1)); h.Cause != wgroam.CauseConfig {
			t.Errorf("the view has %+v", h)
		}
		reach(t, c) // from home
		if h := v.awaitAt(c, home); h.Cause != wgroam.CauseData {
			t.Errorf("the view has %+v", h)
		}
		v.silence()
		before, _ := v.said()

		v.view.Set(c.Key(), wgroam.Holding{Endpoint: at(2), Cause: wgroam.CauseConfig, At: time.Now()})
		v.configure(c.Key(), at(2))
		for range 5 {
			tell(t, gw, c)
			n := v.Status().Resyncs
			v.wantDump()
			await(t, "a dump", func() bool { return v.Status().Resyncs > n })
			if h, _ := v.view.Get(c.Key()); h.Endpoint != at(2) || h.Cause != wgroam.CauseConfig {
				t.Errorf("the view has %+v", h)
			}
		}
		if after, _ := v.said(); len(after) != len(before) {
			t.Errorf("the applier's write was news: %+v", after[len(before):])
		}
		ep, err := c.RoamPort()
		if err != nil {
			t.Fatal(err)
		}
		reach(t, c)
		v.provenAt(c, ep)
		if h := v.awaitAt(c, ep); h.Cause != wgroam.CauseData {
			t.Errorf("the view has %+v", h)
		}
		_, proven := v.said()
		for _, o := range proven {
			if o.New == at(1) || o.New == at(2) {
				t.Errorf("configuration is proven: %+v", o)
			}
		}
	})
}

// TestPortOldSession: a session that began before the tracker did. The device is
// polled, until there can be none any more.
func TestPortOldSession(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw, c := l.Gateways[0], l.Clients[0]
	reach(t, c)
	v := startAt(t, gw, ported(t), time.Hour, true)
	ep, err := c.RoamPort()
	if err == nil {
		err = c.Send(1)
	}
	if err != nil {
		t.Fatal(err)
	}
	v.provenAt(c, ep)
}

// TestPortMoves: the listen port changes, and the link goes down and up.
func TestPortMoves(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw, c := l.Gateways[0], l.Clients[0]
	kernel := ported(t)
	v := start(t, gw, kernel)
	reach(t, c)
	v.provenAt(c, c.Endpoint())
	const port = lab.ListenPort + 1
	run(t, gw.Do, "wg", "set", gw.Device(), "listen-port", strconv.Itoa(port))
	await(t, "the new port is followed", func() bool { return follows(kernel, port) && !follows(kernel, lab.ListenPort) })
	tell(t, gw, c) // so that the client knows
	await(t, "the client knows", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := c.Ping(ctx)
		return err == nil
	})
	if s := v.Status(); s.Rung != RungPort {
		t.Errorf("status %+v", s)
	}
	// Down, and up again.
	if err := gw.LinkDown(); err != nil {
		t.Fatal(err)
	}
	await(t, "polling", func() bool { return v.Status().Rung == RungPolling })
	if s := v.Status(); !strings.Contains(s.Reason, errNoSocket.Error()) {
		t.Errorf("status %+v", s)
	}
	if err := gw.LinkUp(); err != nil {
		t.Fatal(err)
	}
	await(t, "the port again", func() bool { return v.Status().Rung == RungPort })
	if !follows(kernel, port) {
		t.Error("the port is not followed")
	}
}

// follows reports whether a port is followed in any namespace.
func follows(kernel *Kernel, port uint16) bool {
	p := ports[kernel]
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, space := range p.spaces {
		space.mu.Lock()
		sub := space.subs[port]
		space.mu.Unlock()
		if sub != nil {
			return true
		}
	}
	return false
}

// needIP skips a test that runs ip(8) where the kernel's machine in test/vm has none.
func needIP(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skipf("no ip(8) beside this kernel: %v", err)
	}
}

// TestPortElsewhere: the socket is in another namespace than the link, as when that
// has been moved: in one that has a name.
func TestPortElsewhere(t *testing.T) {
	needIP(t)
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	here := func(f func() error) error { return f() }
	// Names and a port that no other run on this machine has.
	unique := rand.Text()
	name, target := "socket-"+unique, "link-"+unique
	free := 0
	err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{ListenPort: &free})
	if err != nil {
		t.Fatal(err)
	}
	d, err := gw.WG().Device(gw.Device())
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(d.ListenPort)
	run(t, here, "ip", "netns", "add", target)
	t.Cleanup(func() { run(t, here, "ip", "netns", "del", target) })
	run(t, here, "touch", "/run/netns/"+name)
	run(t, here, "mount", "--bind", gw.NetNS(), "/run/netns/"+name)
	t.Cleanup(func() {
		_ = exec.Command("umount", "/run/netns/"+name).Run() // the test may have done it
		run(t, here, "rm", "/run/netns/"+name)
	})
	space, err := wg.OpenSpace(target)
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	found, named, err := locate(space, port)
	if err != nil {
		t.Fatal(err)
	}
	defer found.Close()
	if named != found {
		t.Error("not found by its name")
	}
	var want uint32
	if err := gw.Do(func() (err error) { want, err = wg.Netns(); return err }); err != nil {
		t.Fatal(err)
	}
	if got, err := found.Inode(); got != want || err != nil {
		t.Errorf("found the socket in %d (%v), want %d", got, err, want)
	}
	if _, _, err := locate(space, 1); !errors.Is(err, errNoSocket) {
		t.Errorf("a port that nobody has: %v", err)
	}

	// The name goes. Who stayed would keep the namespace for ever.
	var p Port
	defer p.Close()
	tap, err := p.follow(space, port, 1, &portSubscriber{
		event: func(bpf.UplinkEvent) {}, foreign: func() {}, lost: func() {}, broken: func(error) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer tap.close()
	if ok, err := tap.bound(); !ok || err != nil {
		t.Errorf("the socket is there: %v, %v", ok, err)
	}
	// A step home, when there is a socket, too.
	if ok, err := tap.guess(space); ok || err != nil {
		t.Errorf("a guess, with no socket at home: %v, %v", ok, err)
	}
	err = space.Do(func() error {
		c, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", port))
		if err == nil {
			t.Cleanup(func() { c.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := tap.guess(space); !ok || err != nil {
		t.Errorf("a guess, with a socket at home: %v, %v", ok, err)
	}
	if home, named, err := locate(space, port); err != nil || named != nil {
		t.Errorf("located under a name (%v), not at home: %v", named, err)
	} else {
		home.Close()
	}
	run(t, here, "umount", "-l", "/run/netns/"+name)
	if ok, err := tap.bound(); ok || err != nil {
		t.Errorf("the name is gone: %v, %v", ok, err)
	}
}

// TestPortForeign: a guest on a macvlan of the gateway's uplink sends what looks like
// the gateway's data, and somebody else gives the hint. Nobody believes it.
func TestPortForeign(t *testing.T) {
	needIP(t)
	l := newLab(t, lab.Config{})
	gw, c := l.Gateways[0], l.Clients[0]
	tap := tapOf(t, gw)
	v := start(t, gw, ported(t))
	reach(t, c)
	v.provenAt(c, c.Endpoint())
	hint := tap.next(device.MessageTransportType)
	v.silence()
	run(t, gw.Do, "ip", "link", "add", "guest", "link", "lan0", "type", "macvlan")
	guest := l.Gateways[1]
	run(t, gw.Do, "ip", "link", "set", "guest", "netns", guest.NetNS())
	run(t, guest.Do, "ip", "link", "set", "guest", "up")

	conn, forged := attacker(t, l.Gateways[1])
	send(t, conn, hint) // repeated, which WireGuard drops
	v.Tracker.mu.Lock()
	var remote uint32
	for remote = range v.sessions.remote {
	}
	v.Tracker.mu.Unlock()
	payload := make([]byte, 32)
	payload[0] = device.MessageTransportType
	binary.LittleEndian.PutUint32(payload[4:], remote)
	resyncs := v.Status().Resyncs
	err := guest.Do(func() error {
		return sendRaw("guest", netip.MustParseAddrPort("192.0.2.77:"+strconv.Itoa(lab.ListenPort)), forged, payload)
	})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		await(t, "a dump", func() bool { return v.Status().Resyncs > resyncs })
		resyncs = v.Status().Resyncs
		v.wantDump()
	}
	v.only(c, c.Endpoint())
	// It has seen the packet, as the first one of the session that goes elsewhere.
	var ep netip.AddrPort
	if ep, err = c.RoamPort(); err != nil {
		t.Fatal(err)
	}
	reach(t, c)
	v.provenAt(c, ep)
}

// sendRaw sends a UDP datagram over IPv4 from whatever address.
func sendRaw(link string, from, to netip.AddrPort, payload []byte) error {
	ifi, err := net.InterfaceByName(link)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := []byte{0x45, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(28+len(payload)))
	b = append(b, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	b = append(b, from.Addr().AsSlice()...)
	b = append(b, to.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	b = append(b, 0, 0)
	proto := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
	return unix.Sendto(fd, append(b, payload...), 0, &unix.SockaddrLinklayer{
		Ifindex: ifi.Index, Protocol: proto, Halen: 6, Addr: [8]byte{2, 0, 0, 0, 0, 1},
	})
}

// TestPortLinks: a link that comes later is watched, and forgotten when it goes.
func TestPortLinks(t *testing.T) {
	needIP(t)
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	kernel := ported(t)
	start(t, gw, kernel)
	watched := func(index int) bool {
		p := ports[kernel]
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, s := range p.spaces {
			s.mu.Lock()
			err, ok := s.links[index]
			s.mu.Unlock()
			if ok && err == nil {
				return true
			}
		}
		return false
	}
	run(t, gw.Do, "ip", "link", "add", "later", "type", "veth", "peer", "name", "later2")
	var later wg.Link
	if err := gw.Do(func() (err error) { later, err = wg.LinkByName("later"); return err }); err != nil {
		t.Fatal(err)
	}
	await(t, "the new link is watched", func() bool { return watched(later.Ifindex) })
	run(t, gw.Do, "ip", "link", "del", "later")
	await(t, "the link is forgotten", func() bool { return !watched(later.Ifindex) })
}
