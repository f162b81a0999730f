// SPDX-License-Identifier: MIT

package tracker

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/wg"
)

// atClient starts a tracker of a client's device at its UDP port. Its only peer is the
// gateway.
func atClient(t *testing.T, c *lab.Client, port *Port) *live {
	t.Helper()
	v := &live{t: t, view: wgroam.NewView(), done: make(chan error, 1)}
	cfg := Config{
		Device: c.Device(), Kernel: polled(t), Port: port, View: v.view,
		Changed: func(o wgroam.Observation) {
			v.mu.Lock()
			defer v.mu.Unlock()
			v.changed = append(v.changed, o)
		},
		Proven: func(wgroam.Observation) {},
		Poll:   time.Hour, Sweep: time.Hour, Log: quiet(),
	}
	err := c.Do(func() (err error) {
		if cfg.Space, err = wg.OpenSpace("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		cfg.WG, err = wg.Open()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	v.begin(cfg)
	if s := v.Status(); s.Rung != RungPort {
		t.Fatalf("status %+v", s)
	}
	v.run()
	return v
}

// TestPortTwo: two devices in one namespace share the program, and neither hears of the
// other's packets.
func TestPortTwo(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 2})
	gw := l.Gateways[0]
	var port Port
	t.Cleanup(func() {
		if err := port.Close(); err != nil {
			t.Error(err)
		}
	})
	var both []*live
	for _, c := range l.Clients {
		both = append(both, atClient(t, c, &port))
	}
	if len(port.spaces) != 1 {
		t.Errorf("%d namespaces are watched", len(port.spaces))
	}
	for _, c := range l.Clients {
		reach(t, c)
	}
	// The gateway goes elsewhere, and each client hears of it at another time.
	ep := netip.AddrPortFrom(lab.VIP4, lab.ListenPort+1)
	run(t, gw.Do, "wg", "set", gw.Device(), "listen-port", strconv.Itoa(int(ep.Port())))
	for i, v := range both {
		tell(t, gw, l.Clients[i])
		at := func(v *live) netip.AddrPort {
			h, _ := v.view.Get(l.PublicKey())
			return h.Endpoint
		}
		await(t, "the client has heard of the gateway", func() bool { return at(v) == ep })
		for _, later := range both[i+1:] {
			if got := at(later); got == ep {
				t.Errorf("another client has heard of it, too: %v", got)
			}
		}
		changed, _ := v.said()
		if len(changed) != 1 || changed[0].Cause != wgroam.CauseData {
			t.Errorf("changes %+v, want one", changed)
		}
	}
	// One leaves.
	both[0].stop()
	tell(t, gw, l.Clients[1])
	if s := both[1].Status(); s.Rung != RungPort || len(port.spaces) != 1 {
		t.Errorf("status %+v, %d namespaces are watched", s, len(port.spaces))
	}
}

// TestPortVLAN: the uplink is a VLAN, so that the program is on two links and sees a packet
// twice: with the tag beside it or, where a device leaves that to those above, in it.
func TestPortVLAN(t *testing.T) {
	if !lab.InVM() {
		t.Skip("the kernel of this machine may have no VLANs, those of test/vm have")
	}
	for name, cfg := range map[string]lab.Config{
		"tag beside, kernel":       {VLAN: true},
		"tag in, kernel":           {VLAN: true, InFrame: true},
		"tag beside, wireguard-go": {VLAN: true, Userspace: true, Batches: true},
		"tag in, wireguard-go":     {VLAN: true, InFrame: true, Userspace: true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, cfg)
			c := l.Clients[0]
			v := start(t, l.Gateways[0], ported(t))
			reach(t, c)
			eps := []netip.AddrPort{c.Endpoint()}
			v.provenAt(c, c.Endpoint())
			roams := []func() (netip.AddrPort, error){c.RoamPort, c.RoamAddress}
			if !cfg.Batches {
				roams = append(roams, c.RoamFamily, c.RoamPort)
			}
			for _, roam := range roams {
				ep, err := roam()
				if err != nil {
					t.Fatal(err)
				}
				reach(t, c)
				v.provenAt(c, ep)
				eps = append(eps, ep)
			}
			v.only(c, eps...)
			// Each by one of the two links alone. A dump might show the roam as well; that it is
			// hinted at shows that the program understands the packets of that link.
			tap := v.ladder.tap
			for _, link := range []string{"trunk", "lan0"} {
				index := 0
				err := v.gw.Do(func() error {
					l, err := netlink.LinkByName(link)
					if err == nil {
						index = l.Attrs().Index
					}
					return err
				})
				if err == nil {
					err = tap.s.uplink.Detach(index)
				}
				if err != nil {
					t.Fatal(err)
				}
				ep, err := c.RoamPort()
				if err != nil {
					t.Fatal(err)
				}
				reach(t, c)
				await(t, "a hint without "+link, func() bool {
					v.Tracker.mu.Lock()
					defer v.Tracker.mu.Unlock()
					return v.peers[c.Key()].hints.list[0].from == ep
				})
				v.provenAt(c, ep)
				if err := v.gw.Do(func() error { return tap.s.uplink.Attach(index) }); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestPortBulk: the peer roams in the midst of TCP in both directions; also where
// wireguard-go gives the kernel many packets as one, and takes them so.
func TestPortBulk(t *testing.T) {
	t.Run("one by one", func(t *testing.T) { portBulk(t, lab.Config{}) })
	if lab.InVM() {
		return // it takes minutes there, and has nothing to do with the kernel's WireGuard
	}
	t.Run("GSO and GRO", func(t *testing.T) { portBulk(t, lab.Config{Userspace: true, Batches: true}) })
}

func portBulk(t *testing.T, cfg lab.Config) {
	l := newLab(t, cfg)
	gw, c := l.Gateways[0], l.Clients[0]
	v := start(t, gw, ported(t))
	reach(t, c)
	eps := []netip.AddrPort{c.Endpoint()}
	v.provenAt(c, c.Endpoint())

	const tcp = 5001
	var listener net.Listener
	err := gw.Do(func() (err error) {
		listener, err = net.Listen("tcp4", netip.AddrPortFrom(lab.Inner4, tcp).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := c.Dial(t.Context(), "tcp4", tcp)
	if err != nil {
		t.Fatal(err)
	}
	other, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var ends sync.WaitGroup
	defer ends.Wait()
	defer other.Close()
	defer conn.Close()
	ends.Go(func() {
		for b := make([]byte, 1<<16); ; {
			n, err := other.Read(b)
			if err == nil {
				_, err = other.Write(b[:n])
			}
			if err != nil {
				return // the test is over
			}
		}
	})
	var echoed atomic.Int64
	ends.Go(func() {
		for b := make([]byte, 1<<16); ; {
			if _, err := conn.Write(b); err != nil {
				return
			}
		}
	})
	ends.Go(func() {
		for b := make([]byte, 1<<16); ; {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			echoed.Add(int64(n))
		}
	})
	flows := func() {
		t.Helper()
		was := echoed.Load()
		await(t, "TCP goes on", func() bool { return echoed.Load() > was+1<<20 })
	}
	flows()
	for range 3 {
		ep, err := c.RoamPort()
		if err != nil {
			t.Fatal(err)
		}
		v.provenAt(c, ep)
		eps = append(eps, ep)
		flows()
	}
	v.only(c, eps...)
	// Of a link between namespaces, such a packet is counted as one.
	err = gw.Do(func() error {
		link, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		n := link.Attrs().Statistics
		in, out := n.RxBytes/n.RxPackets, n.TxBytes/n.TxPackets
		t.Logf("%d and %d bytes a packet, in and out", in, out)
		if mtu := uint64(link.Attrs().MTU); cfg.Batches != (in > mtu && out > mtu) {
			t.Errorf("batches %v at an MTU of %d", cfg.Batches, mtu)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestPortBackToHook: a device that had to do with its UDP port gets the hook when that
// works.
func TestPortBackToHook(t *testing.T) {
	needKernel(t)
	l := newLab(t, lab.Config{})
	gw, c := l.Gateways[0], l.Clients[0]
	var works atomic.Bool
	kernel := &Kernel{attach: func(peers int) (*bpf.Hook, error) {
		if !works.Load() {
			return nil, errors.New("not yet")
		}
		return bpf.AttachKprobe(peers)
	}}
	ports[kernel] = &Port{}
	defer func() {
		if err := errors.Join(ports[kernel].Close(), kernel.Close()); err != nil {
			t.Error(err)
		}
		delete(ports, kernel)
	}()
	v := prepare(t, gw, kernel, 300*time.Millisecond)
	if s := v.Status(); s.Rung != RungPort {
		t.Fatalf("status %+v", s)
	}
	v.ladder.portErr = errors.New("of long ago")
	v.run()
	reach(t, c)
	v.awaitAt(c, c.Endpoint())
	works.Store(true)
	await(t, "the hook", func() bool { return v.Status().Rung == RungKprobe })
	for range 3 {
		ep, err := c.RoamPort()
		if err != nil {
			t.Fatal(err)
		}
		reach(t, c)
		v.awaitAt(c, ep)
	}
	v.stop()
	if v.ladder.portErr != nil || v.ladder.tap != nil || len(ports[kernel].spaces) != 0 {
		t.Errorf("the port is not left: %v, %v", v.ladder.portErr, v.ladder.tap)
	}
}
