// SPDX-License-Identifier: MIT

package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
)

// Client is a WireGuard peer of all gateways. It talks to the virtual IP, over
// IPv4 at first. All clients share a namespace; each has a WireGuard device, an
// outer address and a port for itself.
//
// The Roam methods tell the gateway nothing: it learns of a roam from the next
// packet, which Send or Ping sends.
type Client struct {
	// Inner4 and Inner6 are the client's addresses inside the tunnel.
	Inner4, Inner6 netip.Addr

	lab     *Lab
	n       int    // index in lab.Clients
	program string // of the device; see Config
	key     wgtypes.Key
	dev     *wgDevice
	alive   time.Duration // persistent keepalive

	// Guarded by lab.mu.
	addr netip.Addr // outer
	port int        // outer
	vip  netip.Addr // which of the two it talks to
}

func newClient(l *Lab, n int) (*Client, error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return nil, err
	}
	return &Client{
		Inner4: nth(inner4, 1+n),
		Inner6: nth(inner6, 1+n),
		lab:    l,
		n:      n,
		key:    key,
	}, nil
}

// mark is the device's firewall mark, and its routing table: WireGuard does not
// bind its sockets to an address, so the route has to choose the source.
func (c *Client) mark() int { return 1000 + c.n }

func (c *Client) build(program string, log *slog.Logger, keepalive time.Duration) error {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	c.alive = keepalive
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rule := netlink.NewRule()
		rule.Family, rule.Mark, rule.Table = family, uint32(c.mark()), c.mark()
		if err := c.lab.clients.nl.RuleAdd(rule); err != nil {
			return fmt.Errorf("routing rule: %w", err)
		}
	}
	if err := c.move(VIP4); err != nil {
		return err
	}
	c.program, c.port = program, c.lab.nextPort()
	return c.makeDevice(log)
}

// makeDevice makes the WireGuard device at the client's port.
func (c *Client) makeDevice(log *slog.Logger) error {
	name := "wg" + strconv.Itoa(c.n)
	if c.program != "" || !c.lab.Kernel {
		name = c.lab.prefix + strconv.Itoa(c.n)
	}
	mark := c.mark()
	cfg := wgtypes.Config{
		PrivateKey:   &c.key,
		ListenPort:   &c.port,
		FirewallMark: &mark,
		Peers:        []wgtypes.PeerConfig{c.peer()},
	}
	var err error
	c.dev, err = newWGDevice(c.lab, c.lab.clients, name, c.program, log,
		netip.PrefixFrom(c.Inner4, inner4.Bits()), netip.PrefixFrom(c.Inner6, inner6.Bits()), cfg)
	return err
}

// peer configures the client's only peer.
func (c *Client) peer() wgtypes.PeerConfig {
	return wgtypes.PeerConfig{
		PublicKey:                   c.lab.key.PublicKey(),
		Endpoint:                    c.remote(),
		AllowedIPs:                  []net.IPNet{*ipNet(inner4.Masked()), *ipNet(inner6.Masked())},
		PersistentKeepaliveInterval: &c.alive,
	}
}

func (c *Client) remote() *net.UDPAddr {
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(c.vip, ListenPort))
}

func (c *Client) close() {
	if c.dev != nil {
		c.dev.close()
	}
}

// Key is the client's public key.
func (c *Client) Key() wgroam.Key { return wgroam.Key(c.key.PublicKey()) }

// Device is the name of the client's WireGuard device, within its namespace.
func (c *Client) Device() string { return c.dev.name }

// Do runs f on a thread in the clients' namespace, like Gateway.Do.
func (c *Client) Do(f func() error) error { return c.lab.clients.do(f) }

// Endpoint is where the client's packets come from: what the gateway sees after
// the next one.
func (c *Client) Endpoint() netip.AddrPort {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	return c.endpoint()
}

func (c *Client) endpoint() netip.AddrPort { return netip.AddrPortFrom(c.addr, uint16(c.port)) }

// RoamPort moves the client to another port, as a NAT would that forgot it, and
// returns the new endpoint.
func (c *Client) RoamPort() (netip.AddrPort, error) {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	port := c.lab.nextPort()
	if err := c.configure(wgtypes.Config{ListenPort: &port}); err != nil {
		return netip.AddrPort{}, err
	}
	c.port = port
	return c.endpoint(), nil
}

// RoamAddress takes the client's outer address away, gives it a new one, as
// another network would, and returns the new endpoint. A lab never gives out an
// address twice; it has 130000.
func (c *Client) RoamAddress() (netip.AddrPort, error) {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	return c.roam(c.vip)
}

// RoamFamily takes the client to a network of the other IP version: a new outer
// address, another virtual IP. It returns the new endpoint.
func (c *Client) RoamFamily() (netip.AddrPort, error) {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	vip := VIP4
	if c.vip == VIP4 {
		vip = VIP6
	}
	ep, err := c.roam(vip)
	if err != nil {
		return ep, err
	}
	// An answer to the old address that the device was still decrypting turns it
	// back to the old virtual IP. No more of them arrive.
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for quiet := 0; quiet < 10; quiet++ {
		<-tick.C
		d, err := c.lab.clients.wg.Device(c.dev.name)
		if err != nil {
			return ep, fmt.Errorf("client %d: read %s: %w", c.n, c.dev.name, err)
		}
		if to := d.Peers[0].Endpoint; !to.IP.Equal(c.remote().IP) {
			quiet = 0
			if err := c.aim(); err != nil {
				return ep, err
			}
		}
	}
	return ep, nil
}

func (c *Client) roam(vip netip.Addr) (netip.AddrPort, error) {
	if err := c.move(vip); err != nil {
		return netip.AddrPort{}, err
	}
	return c.endpoint(), c.aim()
}

// aim points the device at the client's virtual IP. The device forgets the
// source address that it used before.
func (c *Client) aim() error {
	return c.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{
		PublicKey:  c.lab.key.PublicKey(),
		UpdateOnly: true,
		Endpoint:   c.remote(),
	}}})
}

// move takes the client to where it reaches a virtual IP from its next address.
// The old address goes before the device turns to the new one, so that no more
// answers come to it.
func (c *Client) move(vip netip.Addr) error {
	network, old := uplink4, c.addr
	if vip.Is6() {
		network = uplink6
	}
	c.lab.addrs++
	const reserved = 15 // for the router and the namespace itself
	addr := nth(network, reserved+c.lab.addrs)
	if !addr.IsValid() {
		return fmt.Errorf("client %d: the lab has no outer address left after %d", c.n, c.lab.addrs)
	}
	ns := c.lab.clients
	err := ns.addAddr(uplink, host(addr))
	if err == nil && old.IsValid() && c.vip != vip {
		// Else the device could send from any other address of the namespace.
		err = ns.delDefault(c.mark(), uplink, old)
	}
	if err == nil {
		err = ns.setDefault(c.mark(), uplink, network.Addr(), addr)
	}
	if err == nil && old.IsValid() {
		err = errors.Join(
			ns.delAddr(uplink, host(old)),
			// Else thousands of roams fill the kernel's neighbour table.
			c.lab.router.forget(uplink, old),
		)
	}
	if err != nil {
		return fmt.Errorf("client %d: %w", c.n, err)
	}
	c.addr, c.vip = addr, vip
	return nil
}

// Forget makes the client drop its session: the next packet starts a handshake.
// The endpoint stays. Forget waits until a gateway would accept that handshake.
func (c *Client) Forget() error {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	d, err := c.lab.clients.wg.Device(c.dev.name)
	if err != nil {
		return fmt.Errorf("client %d: read %s: %w", c.n, c.dev.name, err)
	}
	err = c.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: c.lab.key.PublicKey(), Remove: true}}})
	if err != nil {
		return err
	}
	for _, p := range d.Peers {
		// A gateway ignores an initiation that follows another within 20 ms, or bears
		// the same timestamp of 17 ms resolution (drivers/net/wireguard/noise.c
		// wg_noise_handshake_consume_initiation), and the client tries again after 5 s.
		<-time.After(time.Until(p.LastHandshakeTime.Add(50 * time.Millisecond)))
	}
	return c.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{c.peer()}})
}

// KeepAlive gives the client another persistent keepalive than the lab's, in whole
// seconds; 0 is off.
func (c *Client) KeepAlive(every time.Duration) error {
	c.lab.mu.Lock()
	defer c.lab.mu.Unlock()
	c.alive = every
	return c.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{
		PublicKey:                   c.lab.key.PublicKey(),
		UpdateOnly:                  true,
		PersistentKeepaliveInterval: &c.alive,
	}}})
}

func (c *Client) configure(cfg wgtypes.Config) error {
	if err := c.lab.clients.wg.ConfigureDevice(c.dev.name, cfg); err != nil {
		return fmt.Errorf("client %d: configure %s: %w", c.n, c.dev.name, err)
	}
	return nil
}

// nextPort returns a port that no client has, below the ports that the kernel
// gives to other sockets.
func (l *Lab) nextPort() int {
	const first, count = 10000, 20000
next:
	for {
		port := first + l.ports%count
		l.ports++
		for _, c := range l.Clients {
			if c.port == port {
				continue next
			}
		}
		return port
	}
}

// Dial opens a connection through the client's tunnel to a port of the
// gateway's inner address. The network is udp4, udp6, tcp4 or tcp6.
func (c *Client) Dial(ctx context.Context, network string, port int) (net.Conn, error) {
	local, remote := c.Inner4, Inner4
	if network == "udp6" || network == "tcp6" {
		local, remote = c.Inner6, Inner6
	}
	d := net.Dialer{
		// All clients have a route to the gateway; the socket chooses between them.
		Control: func(_, _ string, raw syscall.RawConn) error {
			var serr error
			err := raw.Control(func(fd uintptr) { serr = unix.BindToDevice(int(fd), c.dev.name) })
			return errors.Join(err, serr)
		},
	}
	if network == "tcp4" || network == "tcp6" {
		d.LocalAddr = &net.TCPAddr{IP: local.AsSlice()}
	} else {
		d.LocalAddr = &net.UDPAddr{IP: local.AsSlice()}
	}
	var conn net.Conn
	err := c.Do(func() (err error) {
		conn, err = d.DialContext(ctx, network, netip.AddrPortFrom(remote, uint16(port)).String())
		return err
	})
	return conn, err
}

// Send sends n small datagrams through the tunnel that the gateway does not
// answer. They may get lost like any others.
func (c *Client) Send(n int) error {
	conn, err := c.Dial(context.Background(), "udp4", DiscardPort)
	if err != nil {
		return err
	}
	defer conn.Close()
	for range n {
		if _, err := conn.Write([]byte("wgroam")); err != nil {
			return fmt.Errorf("client %d: %w", c.n, err)
		}
	}
	return nil
}

// Ping sends one datagram through the tunnel and waits for its echo until ctx
// ends, in which case the error wraps the context's. It returns the time in
// between.
func (c *Client) Ping(ctx context.Context) (time.Duration, error) {
	return c.echo(ctx, 0)
}

// Reach sends a datagram through the tunnel every 10 ms until one comes back,
// whatever happens to the others, or ctx ends, in which case the error wraps
// the context's. It returns how long that took.
func (c *Client) Reach(ctx context.Context) (time.Duration, error) {
	return c.echo(ctx, 10*time.Millisecond)
}

// echo sends once, or every so often.
func (c *Client) echo(ctx context.Context, every time.Duration) (time.Duration, error) {
	conn, err := c.Dial(ctx, "udp4", EchoPort)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	// The port may have been another ping's, whose echo is late.
	nonce := make([]byte, 8)
	rand.Read(nonce)
	buf := make([]byte, 64)
	start := time.Now()
	for {
		sent := time.Now()
		_, err := conn.Write(nonce)
		if every > 0 {
			err = conn.SetReadDeadline(sent.Add(every))
		}
		for err == nil {
			var n int
			if n, err = conn.Read(buf); err == nil && bytes.Equal(buf[:n], nonce) {
				return time.Since(start), nil
			}
		}
		if ctx.Err() == nil && every > 0 {
			// Errors other than the deadline come at once.
			select {
			case <-time.After(time.Until(sent.Add(every))):
				continue
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("client %d: no echo: %w", c.n, ctx.Err())
		}
		return 0, fmt.Errorf("client %d: no echo: %w", c.n, err)
	}
}
