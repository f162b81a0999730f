// SPDX-License-Identifier: MIT

package lab

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
)

// Gateway is one of the hosts that share the WireGuard key.
type Gateway struct {
	Name string
	// Addr4 and Addr6 are the gateway's own addresses on the LAN.
	Addr4, Addr6 netip.Addr

	lab     *Lab
	ns      *namespace
	program string // of the device; see Config
	dev     *wgDevice
	echo    net.PacketConn
	discard net.PacketConn
	wg      sync.WaitGroup // the echo service
	dead    bool           // guarded by lab.mu
}

func (g *Gateway) build(log *slog.Logger) error {
	var err error
	if g.ns, err = newNamespace("gateway " + g.Name); err != nil {
		return err
	}
	if err := g.lab.router.addVeth(g.Name, g.ns, g.lab.below(lanDev)); err != nil {
		return err
	}
	if err := g.lab.addVLAN(g.ns, lanDev); err != nil {
		return err
	}
	port, err := g.lab.router.link(g.Name)
	if err != nil {
		return err
	}
	master, err := g.lab.router.link(g.lab.below(bridge))
	if err != nil {
		return err
	}
	if err := g.lab.router.nl.LinkSetMaster(port, master); err != nil {
		return fmt.Errorf("join the LAN: %w", err)
	}
	err = errors.Join(
		g.ns.addAddr(lanDev, netip.PrefixFrom(g.Addr4, lan4.Bits())),
		g.ns.addAddr(lanDev, netip.PrefixFrom(g.Addr6, lan6.Bits())),
		g.prefer(g.Addr4, g.Addr6),
	)
	if err != nil {
		return err
	}

	if err := g.makeDevice(log); err != nil {
		return err
	}
	return g.serve()
}

// makeDevice makes the WireGuard device, with a peer for each client and no
// endpoints.
func (g *Gateway) makeDevice(log *slog.Logger) error {
	name := "wg0"
	if g.program != "" || !g.lab.Kernel {
		name = g.lab.prefix + g.Name
	}
	listen := ListenPort
	cfg := wgtypes.Config{PrivateKey: &g.lab.key, ListenPort: &listen}
	for _, c := range g.lab.Clients {
		cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{
			PublicKey:  c.key.PublicKey(),
			AllowedIPs: []net.IPNet{*ipNet(host(c.Inner4)), *ipNet(host(c.Inner6))},
		})
	}
	var err error
	g.dev, err = newWGDevice(g.lab, g.ns, name, g.program, log, inner4, inner6, cfg)
	return err
}

// serve opens the ports that clients talk to.
func (g *Gateway) serve() error {
	err := g.ns.do(func() (err error) {
		if g.echo, err = net.ListenPacket("udp", fmt.Sprintf(":%d", EchoPort)); err != nil {
			return err
		}
		// Nobody reads this one: the kernel drops what does not fit its buffer.
		g.discard, err = net.ListenPacket("udp", fmt.Sprintf(":%d", DiscardPort))
		return err
	})
	if err != nil {
		return err
	}
	g.wg.Go(func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := g.echo.ReadFrom(buf)
			if err != nil {
				return
			}
			// A reply that cannot be sent is a lost datagram to the client.
			_, _ = g.echo.WriteTo(buf[:n], from)
		}
	})
	return nil
}

func (g *Gateway) close() error {
	for _, c := range []net.PacketConn{g.echo, g.discard} {
		if c != nil {
			c.Close()
		}
	}
	g.wg.Wait()
	if g.dev != nil {
		g.dev.close()
	}
	if g.ns != nil {
		return g.ns.close()
	}
	return nil
}

// Device is the name of the gateway's WireGuard device, within its namespace.
func (g *Gateway) Device() string { return g.dev.name }

// NetNS is a path of the gateway's network namespace, good for other processes
// until the lab closes: nsenter --net=PATH.
func (g *Gateway) NetNS() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), g.ns.handle) }

// Do runs f on a thread in the gateway's namespace and returns its error.
// Sockets that f opens stay in the namespace; goroutines that f starts do not
// run there. Calls may be nested and concurrent.
func (g *Gateway) Do(f func() error) error { return g.ns.do(f) }

// Start starts cmd in the gateway's namespace; the caller waits for it. When
// cmd has no SysProcAttr, the process is killed when the lab closes or this
// process dies.
func (g *Gateway) Start(cmd *exec.Cmd) error { return g.ns.start(cmd) }

// WG is a WireGuard client in the gateway's namespace, usable on any thread
// until the lab closes. Its Devices method is not: name the device.
func (g *Gateway) WG() *wgctrl.Client { return g.ns.wg }

// Peers reads the device's peers.
func (g *Gateway) Peers() ([]wgtypes.Peer, error) {
	d, err := g.ns.wg.Device(g.dev.name)
	if err != nil {
		return nil, fmt.Errorf("read WireGuard device %s of gateway %s: %w", g.dev.name, g.Name, err)
	}
	return d.Peers, nil
}

// Endpoints reads the endpoint of every peer that the device has one for.
func (g *Gateway) Endpoints() (map[wgroam.Key]netip.AddrPort, error) {
	peers, err := g.Peers()
	if err != nil {
		return nil, err
	}
	eps := make(map[wgroam.Key]netip.AddrPort, len(peers))
	for _, p := range peers {
		if p.Endpoint != nil {
			ep := p.Endpoint.AddrPort()
			eps[wgroam.Key(p.PublicKey)] = netip.AddrPortFrom(ep.Addr().Unmap(), ep.Port())
		}
	}
	return eps, nil
}

// Endpoint reads the endpoint of one peer: the zero AddrPort when it has none.
func (g *Gateway) Endpoint(peer wgroam.Key) (netip.AddrPort, error) {
	eps, err := g.Endpoints()
	return eps[peer], err
}

// LinkDown sets the WireGuard device down: sessions and routes go, endpoints stay.
func (g *Gateway) LinkDown() error {
	g.lab.mu.Lock()
	defer g.lab.mu.Unlock()
	return g.dev.down()
}

// LinkUp sets the WireGuard device up again, with its addresses.
func (g *Gateway) LinkUp() error {
	g.lab.mu.Lock()
	defer g.lab.mu.Unlock()
	return g.dev.up()
}

// Recreate deletes the WireGuard device and makes it anew: sessions, endpoints
// and what the peers' handshakes were dated are gone.
func (g *Gateway) Recreate() error {
	g.lab.mu.Lock()
	defer g.lab.mu.Unlock()
	if err := g.dev.remove(); err != nil {
		return err
	}
	return g.makeDevice(nil)
}

// Kill cuts the gateway off the LAN, as a crash would: its programs run on but
// nobody hears them.
func (g *Gateway) Kill() error {
	g.lab.mu.Lock()
	defer g.lab.mu.Unlock()
	g.dead = true
	return g.lab.router.linkDown(g.Name)
}

// Revive puts a killed gateway back on the LAN, without the virtual IP if that
// has moved meanwhile.
func (g *Gateway) Revive() error {
	g.lab.mu.Lock()
	defer g.lab.mu.Unlock()
	if g.lab.holder != g {
		if err := g.dropVIP(); err != nil {
			return err
		}
	}
	g.dead = false
	if err := g.lab.router.linkUp(g.Name); err != nil {
		return err
	}
	// Whom it has asked for in vain it would ask for again after a second.
	neighbours := []netip.Addr{lan4.Addr(), lan6.Addr()}
	for _, o := range g.lab.Gateways {
		neighbours = append(neighbours, o.Addr4, o.Addr6)
	}
	return g.ns.forget(lanDev, neighbours...)
}

// Lose makes all that this gateway sends to another's own IPv4 address get lost on the
// way, until Reach: the address gets a hardware address that nobody has. Neither of them
// is told, and what the other sends arrives.
func (g *Gateway) Lose(to *Gateway) error {
	link, err := g.ns.link(lanDev)
	if err == nil {
		err = g.ns.nl.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT,
			IP: to.Addr4.AsSlice(), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 0},
		})
	}
	if err != nil {
		return fmt.Errorf("lose what gateway %s sends to %s: %w", g.Name, to.Name, err)
	}
	return nil
}

// Reach ends Lose.
func (g *Gateway) Reach(to *Gateway) error { return g.ns.forget(lanDev, to.Addr4) }

func (g *Gateway) takeVIP() error {
	err := errors.Join(
		g.ns.addAddr(lanDev, host(VIP4)),
		g.ns.addAddr(lanDev, host(VIP6)),
	)
	if g.lab.ownSource {
		return err
	}
	return errors.Join(err, g.prefer(VIP4, VIP6))
}

// dropVIP changes the routes first: the kernel removes a route together with
// the address that it prefers.
func (g *Gateway) dropVIP() error {
	return errors.Join(
		g.prefer(g.Addr4, g.Addr6),
		g.ns.delAddr(lanDev, host(VIP4)),
		g.ns.delAddr(lanDev, host(VIP6)),
	)
}

// prefer sets the sources of the default routes.
func (g *Gateway) prefer(src4, src6 netip.Addr) error {
	return errors.Join(
		g.ns.setDefault(0, lanDev, lan4.Addr(), src4),
		g.ns.setDefault(0, lanDev, lan6.Addr(), src6),
	)
}
