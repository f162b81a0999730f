// SPDX-License-Identifier: MIT

// Package crowd is thousands of WireGuard peers behind one socket, for what a lab's
// clients would be too few for. They speak when they are spoken to: they answer the
// handshakes of a gateway, and take what it sends in the new session.
package crowd

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/flynn/noise"
	"golang.org/x/crypto/blake2s"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/lab"
)

// network has an address for each peer, all with the same port.
var network = netip.MustParsePrefix("100.64.0.0/16")

const port = 51820

// WireGuard's messages, by their first byte, and how long those are that we read.
const (
	initiation, initiationSize = 1, 148
	response, responseSize     = 2, 92
	cookie                     = 3
	data                       = 4
)

var suite = noise.NewCipherSuite(noise.DH25519, noise.CipherChaChaPoly, noise.HashBLAKE2s)

// Crowd are the peers. They belong to a lab, and end before it.
type Crowd struct {
	peers []peer
	mac1  []byte // key of what is sent to the gateways
	conn  *net.UDPConn
	done  sync.WaitGroup

	queue chan int // those of calls

	mu      sync.Mutex
	calls   map[int]call // not answered yet
	cookies int
	strange map[netip.Addr]int
}

// call is the newest handshake initiation that a peer has got. An older one is of no
// use: the gateway has forgotten it.
type call struct {
	message [initiationSize]byte
	from    netip.AddrPort
	control []byte // to answer from where it came to
}

type peer struct {
	key noise.DHKey

	// Guarded by Crowd.mu.
	session noise.Cipher // of the newest session, from the gateway
	begun   time.Time    // when its first packet came
}

// New makes a crowd of so many peers, 60 000 at most.
func New(l *lab.Lab, size int) (*Crowd, error) {
	gateway := l.PublicKey()
	mac1 := blake2s.Sum256(append([]byte("mac1----"), gateway[:]...))
	c := &Crowd{peers: make([]peer, size), mac1: mac1[:], queue: make(chan int, size), calls: make(map[int]call), strange: make(map[netip.Addr]int)}
	for i := range c.peers {
		var err error
		if c.peers[i].key, err = suite.GenerateKeypair(rand.Reader); err != nil {
			return nil, err
		}
	}
	if err := l.Host(network); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var serr error
		err := raw.Control(func(fd uintptr) {
			serr = errors.Join(
				// Which of them a packet is for, and which one answers.
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			)
		})
		return errors.Join(err, serr)
	}}
	err := l.Clients[0].Do(func() error {
		conn, err := lc.ListenPacket(context.Background(), "udp4", fmt.Sprintf(":%d", port))
		if err == nil {
			c.conn = conn.(*net.UDPConn)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("a crowd of peers: %w", err)
	}
	c.done.Go(c.receive)
	for range runtime.GOMAXPROCS(0) {
		c.done.Go(c.answer)
	}
	return c, nil
}

// Close ends all peers.
func (c *Crowd) Close() {
	c.conn.Close()
	c.done.Wait()
}

// Key is the public key of a peer.
func (c *Crowd) Key(i int) wgroam.Key { return wgroam.Key(c.peers[i].key.Public) }

// Endpoint is where a peer is.
func (c *Crowd) Endpoint(i int) netip.AddrPort {
	a := network.Addr().As4()
	binary.BigEndian.PutUint16(a[2:], uint16(1+i))
	return netip.AddrPortFrom(netip.AddrFrom4(a), port)
}

// Sessions returns when each of the peers got the first packet in its newest session;
// zero if it has none.
func (c *Crowd) Sessions() []time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]time.Time, len(c.peers))
	for i, p := range c.peers {
		out[i] = p.begun
	}
	return out
}

// Cookies returns how many of their answers a gateway did not take because it was
// under load, as its cookie replies say.
func (c *Crowd) Cookies() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cookies
}

// Strangers returns how many packets came from others than the virtual IP.
func (c *Crowd) Strangers() map[netip.Addr]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.strange)
}

func (c *Crowd) receive() {
	defer close(c.queue)
	buf, oob := make([]byte, 2048), make([]byte, 128)
	for {
		n, oobn, _, from, err := c.conn.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			return
		}
		to, ok := destination(oob[:oobn])
		if i := int(binary.BigEndian.Uint16(to[2:])) - 1; ok && i >= 0 && i < len(c.peers) && n > 0 {
			c.take(i, buf[:n], oob[:oobn], from)
		}
	}
}

// take takes a message to a peer.
func (c *Crowd) take(i int, b, control []byte, from netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if src := from.Addr().Unmap(); src != lab.VIP4 {
		c.strange[src]++
	}
	switch {
	case b[0] == initiation && len(b) == initiationSize:
		if _, ok := c.calls[i]; !ok {
			c.queue <- i // has room for all
		}
		c.calls[i] = call{[initiationSize]byte(b), from, slices.Clone(control)}
	case b[0] == cookie:
		c.cookies++
	case b[0] == data:
		c.peers[i].data(b)
	}
}

// answer answers calls.
func (c *Crowd) answer() {
	for i := range c.queue {
		c.mu.Lock()
		call := c.calls[i]
		delete(c.calls, i)
		c.mu.Unlock()
		answer, session, err := c.respond(i, call.message[:])
		if err != nil {
			continue // not for this peer
		}
		c.mu.Lock()
		c.peers[i].session, c.peers[i].begun = session, time.Time{}
		c.mu.Unlock()
		// What cannot be sent is lost, like others.
		_, _, _ = c.conn.WriteMsgUDPAddrPort(answer, call.control, call.from)
	}
}

// destination returns the address that a packet came to.
func destination(oob []byte) (to [4]byte, ok bool) {
	messages, err := unix.ParseSocketControlMessage(oob)
	for i := range messages {
		if h := messages[i].Header; h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(messages[i].Data) >= unix.SizeofInet4Pktinfo {
			// struct in_pktinfo: ifindex, spec_dst, addr.
			return [4]byte(messages[i].Data[8:12]), err == nil
		}
	}
	return to, false
}

// respond makes a peer's response to a handshake initiation, and the session.
func (c *Crowd) respond(i int, b []byte) ([]byte, noise.Cipher, error) {
	hs, err := noise.NewHandshakeState(noise.Config{
		CipherSuite: suite, Pattern: noise.HandshakeIK, StaticKeypair: c.peers[i].key,
		Prologue:     []byte("WireGuard v1 zx2c4 Jason@zx2c4.com"),
		PresharedKey: make([]byte, 32), PresharedKeyPlacement: 2,
	})
	if err != nil {
		return nil, nil, err
	}
	// Ephemeral and static key, timestamp.
	if _, _, _, err := hs.ReadMessage(nil, b[8:116]); err != nil {
		return nil, nil, err
	}
	out := make([]byte, 12, responseSize)
	out[0] = response
	binary.LittleEndian.PutUint32(out[4:], uint32(i))
	copy(out[8:], b[4:8])
	out, fromGateway, _, err := hs.WriteMessage(out, nil)
	if err != nil {
		return nil, nil, err
	}
	mac, err := blake2s.New128(c.mac1)
	if err != nil {
		return nil, nil, err
	}
	mac.Write(out)
	return mac.Sum(out)[:responseSize], fromGateway.Cipher(), nil
}

// data notes the first packet in a session.
func (p *peer) data(b []byte) {
	const header = 16
	if p.session == nil || !p.begun.IsZero() || len(b) < header {
		return
	}
	if _, err := p.session.Decrypt(nil, binary.LittleEndian.Uint64(b[8:]), nil, b[header:]); err == nil {
		p.begun = time.Now()
	}
}
