// SPDX-License-Identifier: MIT

// Package wg is wgroam's view of WireGuard's configuration interface: it reads a
// device, writes endpoints into it, and says when links come and go. It is the
// only package of the daemon that imports wgctrl, and it can write nothing but
// endpoints and keepalive intervals.
package wg

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
)

// Errors, for errors.Is.
var (
	// ErrNoDevice: there is no WireGuard device of that name here.
	ErrNoDevice = errors.New("no such WireGuard device")
	// ErrPrivilege: a capability is missing. The message names it.
	ErrPrivilege = errors.New("missing privilege")
	// ErrAccess: the socket of an implementation in user space is out of reach.
	ErrAccess = errors.New("no access to user space WireGuard")
	// ErrNoKey: the device has no private key yet.
	ErrNoKey = errors.New("device has no private key")
)

// ChunkPeers is the largest number of peers that one call of SetEndpoints should
// be given. wgctrl puts up to 32 peers into one netlink message; beyond that it
// sends a message per peer and is about ten times slower
// (wglinux/configure_linux.go, buildBatches).
const ChunkPeers = 32

// Peer is one peer of a device, as far as wgroam cares.
type Peer struct {
	Key wgroam.Key
	// Endpoint is the zero AddrPort when the device has none.
	Endpoint netip.AddrPort
	// LastHandshake is zero when there has been none.
	LastHandshake time.Time
	// Keepalive is the persistent keepalive interval in whole seconds; 0 is off.
	Keepalive time.Duration
	// Received counts the bytes that the peer has sent us.
	Received int64
}

// Device is a dump of a device without its secrets.
type Device struct {
	Name string
	// Kernel is false for an implementation in user space.
	Kernel    bool
	PublicKey wgroam.Key
	Port      int
	Peers     []Peer
}

// Endpoint is an endpoint to write.
type Endpoint struct {
	Peer     wgroam.Key
	Endpoint netip.AddrPort
}

// Client talks to the WireGuard devices of a network namespace. It is safe for
// concurrent use, but calls wait for each other: whoever must not wait for
// another's dump opens a Client of its own.
//
// Implementations in user space are known by name alone, in whatever namespace
// they are: their sockets are files.
type Client struct {
	space *Space

	mu   sync.Mutex
	ctrl *wgctrl.Client
}

// Open returns a Client for the network namespace of the calling thread, to be
// used on threads of that namespace: a call that finds no device looks anew
// where it is. It succeeds without any WireGuard on the host; that may come later.
func Open() (*Client, error) { return (*Space)(nil).Open() }

// Open returns a Client for this namespace, to be used on any thread.
func (s *Space) Open() (*Client, error) {
	ctrl, err := s.control()
	if err != nil {
		return nil, err
	}
	return &Client{space: s, ctrl: ctrl}, nil
}

// control makes a wgctrl client. Its socket is in the namespace of the thread that
// made it, whoever uses it.
func (s *Space) control() (ctrl *wgctrl.Client, err error) {
	err = s.Do(func() (err error) {
		ctrl, err = wgctrl.New()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open WireGuard control: %w", err)
	}
	return ctrl, nil
}

// Close releases the client.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ctrl.Close()
}

// do runs f, a second time on a fresh wgctrl client if there was nothing at the
// other end: wgctrl looks for the kernel module once, when it is opened, and
// the module's netlink family gets a new number each time it is loaded.
func (c *Client) do(device string, f func(*wgctrl.Client) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := f(c.ctrl)
	if errors.Is(err, fs.ErrNotExist) {
		fresh, openErr := c.space.control()
		if openErr != nil {
			return openErr
		}
		_ = c.ctrl.Close() // replaced
		c.ctrl = fresh
		err = f(c.ctrl)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s: create it, or correct the name", ErrNoDevice, device)
	case errors.Is(err, unix.EACCES):
		// Of a directory or a socket; netlink says EPERM.
		return fmt.Errorf("%w, where %s may be: run as their user, which is root in most cases, or grant CAP_DAC_OVERRIDE: %w", ErrAccess, device, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w CAP_NET_ADMIN for %s: run as root or grant it: %w", ErrPrivilege, device, err)
	case err != nil:
		return fmt.Errorf("device %s: %w", device, err)
	}
	return nil
}

// Device dumps a device. The error wraps ErrNoDevice, ErrPrivilege or ErrAccess.
//
// A dump that runs while peers are added or removed may miss some: the kernel
// marks it NLM_F_DUMP_INTR, which wgctrl does not report. The next one is whole.
func (c *Client) Device(name string) (Device, error) {
	var out Device
	err := c.do(name, func(ctrl *wgctrl.Client) error {
		d, err := ctrl.Device(name)
		if err != nil {
			return err
		}
		out = withoutSecrets(d)
		return nil
	})
	return out, err
}

// withoutSecrets returns what we keep of a dump, and zeroes the secrets in it.
func withoutSecrets(d *wgtypes.Device) Device {
	out := Device{
		Name:      d.Name,
		Kernel:    d.Type == wgtypes.LinuxKernel,
		PublicKey: wgroam.Key(d.PublicKey),
		Port:      d.ListenPort,
		Peers:     make([]Peer, len(d.Peers)),
	}
	for i := range d.Peers {
		p := &d.Peers[i]
		out.Peers[i] = Peer{
			Key:           wgroam.Key(p.PublicKey),
			Endpoint:      addrPort(p.Endpoint),
			LastHandshake: p.LastHandshakeTime,
			Keepalive:     p.PersistentKeepaliveInterval,
			Received:      p.ReceiveBytes,
		}
		clear(p.PresharedKey[:])
	}
	clear(d.PrivateKey[:])
	return out
}

// PrivateKey returns the device's private key as the kernel holds it, clamped.
// The caller zeroes it after use. The error wraps ErrNoDevice, ErrPrivilege,
// ErrAccess or ErrNoKey.
func (c *Client) PrivateKey(name string) ([32]byte, error) {
	var key [32]byte
	err := c.do(name, func(ctrl *wgctrl.Client) error {
		d, err := ctrl.Device(name)
		if err != nil {
			return err
		}
		key = d.PrivateKey
		clear(d.PrivateKey[:])
		for i := range d.Peers {
			clear(d.Peers[i].PresharedKey[:])
		}
		return nil
	})
	if err == nil && key == [32]byte{} {
		err = fmt.Errorf("%w: set one with: wg set %s private-key FILE", ErrNoKey, name)
	}
	return key, err
}

// Setups dumps a device as Device does, and how it is configured for its peers, in
// hashes under a key that whoever is to compare them shares.
func (c *Client) Setups(name string, key [32]byte) (dev Device, setups wgroam.Setups, err error) {
	err = c.do(name, func(ctrl *wgctrl.Client) error {
		d, err := ctrl.Device(name)
		if err != nil {
			return err
		}
		mac := hmac.New(sha256.New, key[:])
		list := make([]wgroam.Setup, len(d.Peers))
		for i := range d.Peers {
			list[i] = setupOf(mac, &d.Peers[i])
		}
		dev, setups = withoutSecrets(d), wgroam.NewSetups(d.ListenPort, list)
		return nil
	})
	return dev, setups, err
}

// setupOf hashes what a peer is configured with.
func setupOf(mac hash.Hash, p *wgtypes.Peer) wgroam.Setup {
	sum := func(what byte, value []byte) uint64 {
		var out [sha256.Size]byte
		mac.Reset()
		_, _ = mac.Write([]byte{what}) // none of these fails
		_, _ = mac.Write(p.PublicKey[:])
		_, _ = mac.Write(value)
		return binary.BigEndian.Uint64(mac.Sum(out[:0]))
	}
	allowed := make([]netip.Prefix, 0, len(p.AllowedIPs))
	for _, n := range p.AllowedIPs {
		addr, _ := netip.AddrFromSlice(n.IP)
		bits, of := n.Mask.Size()
		if of == 32 { // and not where IPv6 has IPv4 mapped
			addr = addr.Unmap()
		}
		allowed = append(allowed, netip.PrefixFrom(addr, bits))
	}
	// The kernel has them in no order that means anything.
	slices.SortFunc(allowed, netip.Prefix.Compare)
	var ips []byte
	for _, a := range allowed {
		ips = append(a.AppendTo(ips), ' ')
	}
	return wgroam.Setup{Peer: wgroam.Key(p.PublicKey), AllowedIPs: sum('a', ips), PresharedKey: sum('p', p.PresharedKey[:])}
}

// SetEndpoints writes the endpoints of peers that the device has, and nothing
// else. The keys must be distinct, and at most ChunkPeers. A peer that the
// device does not have is left out without an error.
//
// Writing an endpoint that the device holds already is not free: the kernel
// forgets the local address that it learned for the peer (netlink.c, set_peer).
func (c *Client) SetEndpoints(name string, eps []Endpoint) error {
	cfg := wgtypes.Config{Peers: make([]wgtypes.PeerConfig, len(eps))}
	for i, e := range eps {
		cfg.Peers[i] = wgtypes.PeerConfig{
			PublicKey:  wgtypes.Key(e.Peer),
			UpdateOnly: true,
			Endpoint:   net.UDPAddrFromAddrPort(e.Endpoint),
		}
	}
	return c.do(name, func(ctrl *wgctrl.Client) error { return ctrl.ConfigureDevice(name, cfg) })
}

// Keepalive is a persistent keepalive interval to write, in whole seconds from 0 to
// MaxKeepalive.
type Keepalive struct {
	Peer     wgroam.Key
	Interval time.Duration
}

// MaxKeepalive is the longest interval there is.
const MaxKeepalive = 65535 * time.Second

// SetKeepalives writes persistent keepalive intervals, with the same limits as
// SetEndpoints. An interval that was 0 and is not any more makes an interface that
// is up call the peer at once: by a keepalive if there is a session, else by a
// handshake (netlink.c, set_peer).
func (c *Client) SetKeepalives(name string, intervals []Keepalive) error {
	cfg := wgtypes.Config{Peers: make([]wgtypes.PeerConfig, len(intervals))}
	for i := range intervals {
		cfg.Peers[i] = wgtypes.PeerConfig{
			PublicKey:                   wgtypes.Key(intervals[i].Peer),
			UpdateOnly:                  true,
			PersistentKeepaliveInterval: &intervals[i].Interval,
		}
	}
	return c.do(name, func(ctrl *wgctrl.Client) error { return ctrl.ConfigureDevice(name, cfg) })
}

func addrPort(a *net.UDPAddr) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	ap := a.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
