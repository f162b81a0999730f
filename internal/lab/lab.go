// SPDX-License-Identifier: MIT

// Package lab builds a small internet in network namespaces: gateways that
// share a WireGuard key on one LAN, a virtual IP that one of them holds, a
// router, and clients that roam. The WireGuard devices are real: the kernel's
// where it has them, else wireguard-go in this process. It serves the
// end-to-end tests and `wgroam demo`.
//
//	                      router
//	10.0.0.1, fd00::1 |          | 198.18.0.1, 2001:db8::1
//	      LAN bridge -+          +- uplink
//	        |     |                  |
//	       a      h   ...        clients: one WireGuard device each,
//	 10.0.0.2    10.0.0.3        with its own outer address and port
//	  fd00::2    fd00::3
//	VIP 10.0.0.100, fd00::100
//
// Inside the tunnel the gateways are 10.99.0.1 and fd99::1, all of them, and
// the clients follow.
package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
)

// Fixed addresses. Every lab has the same; namespaces keep labs apart.
var (
	VIP4 = netip.MustParseAddr("10.0.0.100")
	VIP6 = netip.MustParseAddr("fd00::100")
	// Inner4 and Inner6 are every gateway's addresses inside the tunnel.
	Inner4 = netip.MustParseAddr("10.99.0.1")
	Inner6 = netip.MustParseAddr("fd99::1")

	lan4    = netip.MustParsePrefix("10.0.0.1/24")
	lan6    = netip.MustParsePrefix("fd00::1/64")
	uplink4 = netip.MustParsePrefix("198.18.0.1/15")
	uplink6 = netip.MustParsePrefix("2001:db8::1/64")
	inner4  = netip.PrefixFrom(Inner4, 16)
	inner6  = netip.PrefixFrom(Inner6, 64)
)

// ListenPort is the WireGuard port of every gateway.
const ListenPort = 51820

// Ports that every gateway serves inside the tunnel, over UDP.
const (
	EchoPort    = 7 // sends every datagram back
	DiscardPort = 9 // takes datagrams and does not answer
)

// Names of links inside the namespaces.
const (
	bridge = "lan"    // router: the gateways' LAN
	uplink = "uplink" // both ends of router to clients
	lanDev = "lan0"   // a gateway's LAN link
	trunk  = "trunk"  // what these two are above, if they are VLANs
)

// Config describes a lab. The zero value is two gateways, "a" and "h", and one client.
type Config struct {
	// Gateways names the gateways: one to four of a-z and 0-9 each, a letter first.
	// The first holds the virtual IP at the start. Default "a", "h"; at most 90.
	Gateways []string
	// Clients is the number of clients, at most 1000. Default 1.
	Clients int
	// Keepalive is the clients' persistent keepalive, in whole seconds; 0 is off.
	Keepalive time.Duration
	// OwnSource makes the routes of the gateways prefer their own addresses, also
	// where the virtual IP is.
	OwnSource bool
	// Userspace makes the WireGuard devices wireguard-go's, whatever the kernel has.
	Userspace bool
	// VLAN makes the LAN a VLAN. What passes a gateway's link has the tag beside it, or with
	// InFrame in it.
	VLAN, InFrame bool
	// Delay is how long packets are on their way between clients and gateways, each way. The
	// kernel has to have netem.
	Delay time.Duration
	// Batches makes wireguard-go in this process send and receive many packets at once, by
	// UDP GSO and GRO, with its own bind. That is no good over IPv6: see bind.
	Batches bool
	// GatewayProgram and ClientProgram are executables of wireguard-go that run the
	// devices, each in a process of its own. Empty: those of the kernel, or
	// wireguard-go in this process.
	GatewayProgram, ClientProgram string
	// Log receives what wireguard-go says; nil discards it.
	Log *slog.Logger
}

// Lab is a running lab. Its methods may be called concurrently.
type Lab struct {
	Gateways []*Gateway
	Clients  []*Client
	// Kernel tells that the WireGuard devices are the kernel's.
	Kernel bool

	ownSource bool
	batches   bool
	vlan      bool
	inFrame   bool
	prefix    string // of the names of userspace devices
	router    *namespace
	clients   *namespace
	key       wgtypes.Key // the gateways' private key

	// mu guards what follows, the clients' addresses, and all changes to links
	// against Close.
	mu     sync.Mutex
	holder *Gateway // of the virtual IP
	addrs  int      // outer addresses handed out so far
	ports  int      // client ports handed out so far
	closed bool
}

// New builds a lab and starts its traffic services. The caller closes it; when
// New fails, or ctx ends before New does, nothing is left behind. Nor is when
// the process dies, but for the sockets of userspace devices: New removes those
// of dead processes.
//
// The error wraps os.ErrPermission when the process lacks privileges (root, in practice).
func New(ctx context.Context, cfg Config) (*Lab, error) {
	if len(cfg.Gateways) == 0 {
		cfg.Gateways = []string{"a", "h"}
	}
	if cfg.Clients == 0 {
		cfg.Clients = 1
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if err := sweep(); err != nil {
		return nil, fmt.Errorf("remove what earlier labs left (needs root): %w", err)
	}
	prefix, err := namePrefix()
	if err != nil {
		return nil, err
	}
	l := &Lab{ownSource: cfg.OwnSource, batches: cfg.Batches, vlan: cfg.VLAN, inFrame: cfg.InFrame, Kernel: !cfg.Userspace && KernelWireGuard(), prefix: prefix}
	if err := l.build(ctx, cfg); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

var gatewayName = regexp.MustCompile(`^[a-z][a-z0-9]{0,3}$`)

func (cfg *Config) check() error {
	if len(cfg.Gateways) > 90 || cfg.Clients < 0 || cfg.Clients > 1000 {
		return fmt.Errorf("lab: %d gateways and %d clients: at most 90 and 1000", len(cfg.Gateways), cfg.Clients)
	}
	seen := map[string]bool{bridge: true, "lo": true} // links of the router
	for _, name := range cfg.Gateways {
		if !gatewayName.MatchString(name) || seen[name] {
			return fmt.Errorf("lab: gateway name %q: want one to four of a-z and 0-9, a letter first, each name once, not lan or lo", name)
		}
		seen[name] = true
	}
	return nil
}

func (l *Lab) build(ctx context.Context, cfg Config) error {
	var err error
	if l.key, err = wgtypes.GeneratePrivateKey(); err != nil {
		return err
	}
	if err := l.buildRouter(cfg.Delay); err != nil {
		return err
	}
	for i := range cfg.Clients {
		c, err := newClient(l, i)
		if err != nil {
			return err
		}
		l.Clients = append(l.Clients, c)
	}
	for i, name := range cfg.Gateways {
		if err := ctx.Err(); err != nil {
			return err
		}
		g := &Gateway{
			Name:    name,
			Addr4:   nth(lan4, 1+i),
			Addr6:   nth(lan6, 1+i),
			lab:     l,
			program: cfg.GatewayProgram,
		}
		l.Gateways = append(l.Gateways, g)
		if err := g.build(cfg.Log); err != nil {
			return fmt.Errorf("gateway %s: %w", name, err)
		}
	}
	for _, c := range l.Clients {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.build(cfg.ClientProgram, cfg.Log, cfg.Keepalive); err != nil {
			return fmt.Errorf("client %d: %w", c.n, err)
		}
	}
	return l.MoveVIP(l.Gateways[0])
}

func (l *Lab) buildRouter(delay time.Duration) error {
	var err error
	if l.router, err = newNamespace("the router"); err != nil {
		return err
	}
	if l.clients, err = newNamespace("the clients"); err != nil {
		return err
	}
	err = l.router.do(func() error {
		return sysctls("ipv4/ip_forward", "1", "ipv6/conf/all/forwarding", "1")
	})
	if err != nil {
		return fmt.Errorf("set up the router: %w", err)
	}
	if err := l.router.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: l.below(bridge)}}); err != nil {
		return fmt.Errorf("make a bridge (modprobe bridge): %w", err)
	}
	if err := l.router.linkUp(l.below(bridge)); err != nil {
		return err
	}
	if err := l.addVLAN(l.router, bridge); err != nil {
		return err
	}
	if err := l.router.addVeth(uplink, l.clients, uplink); err != nil {
		return err
	}
	if delay > 0 {
		if err := errors.Join(l.router.delay(uplink, delay), l.clients.delay(uplink, delay)); err != nil {
			return err
		}
	}
	return errors.Join(
		l.router.addAddr(bridge, lan4),
		l.router.addAddr(bridge, lan6),
		l.router.addAddr(uplink, uplink4),
		l.router.addAddr(uplink, uplink6),
		l.clients.addAddr(uplink, netip.PrefixFrom(nth(uplink4, 1), uplink4.Bits())),
		l.clients.addAddr(uplink, netip.PrefixFrom(nth(uplink6, 1), uplink6.Bits())),
	)
}

// MoveVIP moves the virtual IP to a gateway, v4 and v6: the holder gives it up
// unless it is dead, the router hears of the new one, and that takes it and prefers
// it as the source of what it sends through its default routes. The router is the
// first to know, because a gateway may send as soon as it has the address, and the
// answer would be lost.
func (l *Lab) MoveVIP(to *Gateway) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if from := l.holder; from != nil && from != to && !from.dead {
		if err := from.dropVIP(); err != nil {
			return fmt.Errorf("take the virtual IP from gateway %s: %w", from.Name, err)
		}
	}
	lan, err := to.ns.link(lanDev)
	if err == nil {
		err = l.router.learn(bridge, lan.Attrs().HardwareAddr, VIP4, VIP6)
	}
	if err == nil {
		err = to.takeVIP()
	}
	if err != nil {
		return fmt.Errorf("give the virtual IP to gateway %s: %w", to.Name, err)
	}
	l.holder = to
	return nil
}

// Rebuild deletes all WireGuard devices, calls between, which may load the module
// anew, and makes them again, as Gateway.Recreate does. No other method may be
// called meanwhile.
func (l *Lab) Rebuild(between func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, g := range l.Gateways {
		if err := g.dev.remove(); err != nil {
			return err
		}
	}
	for _, c := range l.Clients {
		if err := c.dev.remove(); err != nil {
			return err
		}
	}
	if err := between(); err != nil {
		return err
	}
	for _, g := range l.Gateways {
		if err := g.ns.openWG(); err != nil {
			return err
		}
		if err := g.makeDevice(nil); err != nil {
			return err
		}
	}
	if err := l.clients.openWG(); err != nil {
		return err
	}
	for _, c := range l.Clients {
		if err := c.makeDevice(nil); err != nil {
			return err
		}
	}
	return nil
}

// InVM reports whether this program was built for the machine of test/vm, which
// is its own: with the tag vm.
func InVM() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool {
		return s.Key == "-tags" && slices.Contains(strings.Split(s.Value, ","), "vm")
	})
}

// Rekey makes all clients take the gateways to have another private key, and
// forget their sessions. The gateways' devices stay as they are.
func (l *Lab) Rekey(key wgtypes.Key) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	former := l.key
	l.key = key
	for _, c := range l.Clients {
		err := c.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: former.PublicKey(), Remove: true}, c.peer()}})
		if err != nil {
			return err
		}
	}
	return nil
}

// PublicKey is the gateways' public key.
func (l *Lab) PublicKey() wgroam.Key { return wgroam.Key(l.key.PublicKey()) }

// Close ends the lab: devices, services, namespaces, and processes that
// Gateway.Start started. It may be called again.
func (l *Lab) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var errs []error
	for _, c := range l.Clients {
		c.close()
	}
	for _, g := range l.Gateways {
		errs = append(errs, g.close())
	}
	for _, n := range []*namespace{l.clients, l.router} {
		if n != nil {
			errs = append(errs, n.close())
		}
	}
	return errors.Join(errs...)
}

// Host makes all addresses of an IPv4 network the clients' own, and lets them reach
// the gateways and be reached.
func (l *Lab) Host(p netip.Prefix) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	clients, err := l.clients.link("lo")
	if err == nil {
		err = l.clients.nl.RouteReplace(&netlink.Route{
			LinkIndex: clients.Attrs().Index, Dst: ipNet(p), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		})
	}
	if err == nil {
		err = l.clients.nl.RouteReplace(&netlink.Route{Dst: ipNet(lan4.Masked()), Gw: uplink4.Addr().AsSlice()})
	}
	if err == nil {
		err = l.router.nl.RouteReplace(&netlink.Route{Dst: ipNet(p), Gw: nth(uplink4, 1).AsSlice()})
	}
	if err != nil {
		return fmt.Errorf("host %v: %w", p, err)
	}
	return nil
}

// addVeth makes a pair of links, both up: name here, peer in the other namespace.
func (n *namespace) addVeth(name string, other *namespace, peer string) error {
	err := n.nl.LinkAdd(&netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: name},
		PeerName:      peer,
		PeerNamespace: netlink.NsFd(other.handle),
	})
	if err != nil {
		return fmt.Errorf("make link %s to %s (modprobe veth): %w", name, other.name, err)
	}
	return errors.Join(n.linkUp(name), other.linkUp(peer))
}

// below is the link below one of the LAN.
func (l *Lab) below(name string) string {
	if l.vlan {
		return trunk
	}
	return name
}

// addVLAN makes a link of the LAN above the trunk, if it is a VLAN.
func (l *Lab) addVLAN(n *namespace, name string) error {
	if !l.vlan {
		return nil
	}
	below, err := n.link(trunk)
	if err != nil {
		return err
	}
	// A device that does not put the tag aside leaves it to those above.
	aside := !l.inFrame
	err = n.nl.LinkAdd(&netlink.Vlan{
		LinkAttrs: netlink.LinkAttrs{Name: name, ParentIndex: below.Attrs().Index}, VlanId: 7, ReorderHdr: &aside,
	})
	if err != nil {
		return fmt.Errorf("make a VLAN (modprobe 8021q): %w", err)
	}
	return n.linkUp(name)
}

// addAddr gives a link an address and waits until it is in use.
func (n *namespace) addAddr(dev string, p netip.Prefix) error {
	link, err := n.link(dev)
	if err == nil {
		err = n.nl.AddrReplace(link, &netlink.Addr{IPNet: ipNet(p)})
	}
	if err == nil && p.Addr().Is6() {
		err = n.settled(link)
	}
	if err != nil {
		return fmt.Errorf("add address %v to %s: %w", p, dev, err)
	}
	return nil
}

// settled waits until no IPv6 address of the link is tentative. Even without
// duplicate address detection the kernel leaves it to a work queue to join the
// group through which neighbours find an address (net/ipv6/addrconf.c
// addrconf_dad_begin); who asks before gets no answer and asks again a second
// later.
func (n *namespace) settled(link netlink.Link) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.After(10 * time.Second)
	for {
		addrs, err := n.nl.AddrList(link, netlink.FAMILY_V6)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
		if err == nil && !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 }) {
			return nil
		}
		select {
		case <-tick.C:
		case <-timeout:
			return errors.New("still tentative after 10 s")
		}
	}
}

// delAddr takes an address away; it need not be there.
func (n *namespace) delAddr(dev string, p netip.Prefix) error {
	link, err := n.link(dev)
	if err == nil {
		err = n.nl.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)})
	}
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("remove address %v from %s: %w", p, dev, err)
	}
	return nil
}

// learn makes neighbour entries, as neighbours that announce themselves do.
func (n *namespace) learn(dev string, at net.HardwareAddr, addrs ...netip.Addr) error {
	link, err := n.link(dev)
	if err != nil {
		return fmt.Errorf("find link %s: %w", dev, err)
	}
	for _, a := range addrs {
		err := n.nl.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: a.AsSlice(), HardwareAddr: at, State: netlink.NUD_REACHABLE})
		if err != nil {
			return fmt.Errorf("neighbour %v on %s: %w", a, dev, err)
		}
	}
	return nil
}

// forget removes neighbour entries; they need not be there.
func (n *namespace) forget(dev string, addrs ...netip.Addr) error {
	link, err := n.link(dev)
	if err != nil {
		return fmt.Errorf("find link %s: %w", dev, err)
	}
	for _, a := range addrs {
		err := n.nl.NeighDel(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: a.AsSlice()})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove neighbour %v from %s: %w", a, dev, err)
		}
	}
	return nil
}

// setDefault makes the default route of a table (0: main) lead to via, with src
// as the source address that it prefers.
func (n *namespace) setDefault(table int, dev string, via, src netip.Addr) error {
	link, err := n.link(dev)
	if err == nil {
		err = n.nl.RouteReplace(&netlink.Route{
			LinkIndex: link.Attrs().Index,
			Dst:       everything(via),
			Gw:        via.AsSlice(),
			Src:       src.AsSlice(),
			Table:     table,
		})
	}
	if err != nil {
		return fmt.Errorf("default route via %v from %v: %w", via, src, err)
	}
	return nil
}

// delDefault removes the default route of a table for the IP version of a.
func (n *namespace) delDefault(table int, dev string, a netip.Addr) error {
	link, err := n.link(dev)
	if err == nil {
		err = n.nl.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: everything(a), Table: table})
	}
	if err != nil {
		return fmt.Errorf("remove a default route: %w", err)
	}
	return nil
}

// everything is the network of all addresses of a's IP version.
func everything(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, 0).Masked()) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// nth returns the address n after the one in p, or the zero Addr when p ends before.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Addr().AsSlice()
	for i := len(b) - 1; i >= 0 && n > 0; i-- {
		n += int(b[i])
		b[i] = byte(n)
		n >>= 8
	}
	a, _ := netip.AddrFromSlice(b)
	if !p.Contains(a) {
		return netip.Addr{}
	}
	return a
}
