// SPDX-License-Identifier: MIT

package test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// steps is what may happen to a gateway, and how often beside the others. A step leaves
// nothing behind that keeps a client from the gateway for good. Add yours.
var steps = []struct {
	name   string
	weight int
	kernel bool // needs a device of the kernel
	do     func(*soak) error
}{
	{"roam to another port", 10, false, func(s *soak) error { return s.roam((*lab.Client).RoamPort) }},
	{"roam to another address", 6, false, func(s *soak) error { return s.roam((*lab.Client).RoamAddress) }},
	{"roam to another family", 4, false, func(s *soak) error { return s.roam((*lab.Client).RoamFamily) }},
	{"roam back and forth", 3, false, (*soak).flap},
	{"begin a handshake", 4, false, func(s *soak) error { c := s.client(); return errors.Join(c.Forget(), c.Send(1)) }},
	{"forge packets", 2, false, (*soak).forge},
	{"set an endpoint", 4, false, (*soak).set},
	{"remove and add a client", 3, false, (*soak).readd},
	{"add a peer", 3, false, (*soak).addPeer},
	{"remove a peer", 3, false, (*soak).removePeer},
	{"listen on another port", 2, false, (*soak).listen},
	{"link down and up", 2, false, func(s *soak) error { return errors.Join(s.gw.LinkDown(), s.pause(), s.gw.LinkUp()) }},
	{"another link comes and goes", 3, false, (*soak).link},
	{"rename the device away and back", 1, true, (*soak).rename},
	{"delete the device and make it again", 1, true, (*soak).remake},
	{"kill the daemon", 1, false, (*soak).kill},
}

// TestSoak: whatever happens, and in whatever order, the daemon's view comes to be what the
// device holds, without a sweep, and nothing is left behind.
//
// The order follows from the seed, the timing does not. "make soak SECONDS=1800 SEED=1" runs it for longer, or again.
func TestSoak(t *testing.T) {
	number := func(name string, byDefault int64) int64 {
		text := os.Getenv(name)
		if text == "" {
			return byDefault
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	length := time.Duration(number("SOAK_SECONDS", 30)) * time.Second
	seed := number("SOAK_SEED", time.Now().UnixNano()%1_000_000)
	t.Logf("SECONDS=%d SEED=%d", length/time.Second, seed)

	s := &soak{t: t, lab: newLab(t, lab.Config{Clients: 6}), dir: t.TempDir(), rng: mrand.New(mrand.NewPCG(uint64(seed), 0))}
	s.gw = s.lab.Gateways[0]
	h := s.lab.Gateways[1]
	hdir := t.TempDir()
	startNode(t, h, hdir, config(h, hdir, s.gw))
	s.begin()
	s.rest()

	total := 0
	for _, step := range steps {
		if !step.kernel || s.lab.Kernel {
			total += step.weight
		}
	}
	did := make(map[string]int)
	for n := 0; time.Since(s.began) < length; n++ {
		at := s.rng.IntN(total)
		for _, step := range steps {
			if step.kernel && !s.lab.Kernel {
				continue
			}
			if at -= step.weight; at >= 0 {
				continue
			}
			did[step.name]++
			if err := step.do(s); err != nil {
				t.Fatalf("step %d, %s: %v", n, step.name, err)
			}
			break
		}
		if n%25 == 24 {
			s.rest()
		}
	}
	s.rest()
	t.Logf("did %v", did)
}

// soak is a gateway under test.
type soak struct {
	t     testing.TB
	lab   *lab.Lab
	gw    *lab.Gateway
	node  *node
	dir   string
	rng   *mrand.Rand
	began time.Time
	extra []wgtypes.Key // peers that are no clients
	ports int

	// Of the daemon, at its first rest.
	open map[string]int // see files
	rss  int            // KiB
}

// begin starts the daemon.
func (s *soak) begin() {
	s.t.Helper()
	cfg := strings.Replace(config(s.gw, s.dir, s.lab.Gateways[1]), "[nats]", "sweep_interval = \"1s\"\n[nats]", 1)
	s.node = startNode(s.t, s.gw, s.dir, cfg)
	s.open = nil
	if s.began.IsZero() {
		s.began = time.Now()
	}
}

// rest lets all clients speak, and compares what should be equal by then.
func (s *soak) rest() {
	t := s.t
	t.Helper()
	for _, c := range s.lab.Clients {
		if err := c.Forget(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
		_, err := c.Reach(ctx)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		for _, gw := range s.lab.Gateways {
			awaitEndpoint(t, gw, c, c.Endpoint())
		}
	}
	await(t, "peers shows what the device holds", func() (bool, string) {
		want, err := s.gw.Endpoints()
		if err != nil {
			t.Fatal(err)
		}
		diff := cmp.Diff(want, s.held(), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }))
		return diff == "", diff
	})
	status := s.node.status()
	if status.SweepRepairs != 0 || s.lab.Kernel && status.Detector.Rung != control.RungFentry {
		t.Errorf("status: %+v", status)
	}

	pid := s.node.cmd.Process.Pid
	if s.open == nil {
		s.open, s.rss = files(t, pid), rss(t, pid)
		return
	}
	await(t, "the daemon has closed its files", func() (bool, string) {
		diff := cmp.Diff(s.open, files(t, pid))
		return diff == "", diff
	})
	// A garbage collector's heap may well double, and double again.
	if now := rss(t, pid); now > 3*s.rss+64<<10 {
		t.Errorf("the daemon has grown from %d to %d KiB", s.rss, now)
	}
}

// held returns the endpoints that the device holds, as the daemon says.
func (s *soak) held() map[wgroam.Key]netip.AddrPort {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var peers control.Peers
	if err := control.Get(ctx, s.node.socket, control.VerbPeers, &peers); err != nil {
		s.t.Fatal(err)
	}
	held := make(map[wgroam.Key]netip.AddrPort)
	for _, p := range peers.Peers {
		if p.Held.IsValid() {
			held[p.Peer] = p.Held
		}
	}
	return held
}

var instance = regexp.MustCompile(`^(socket|pipe):\[\d+\]$`)

// files counts the open files of a process by what they are: sockets, BPF maps,
// programs and links ("anon_inode:bpf-map" and so on) among them.
func files(t testing.TB, pid int) map[string]int {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	count := make(map[string]int)
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err == nil { // else closed meanwhile
			count[instance.ReplaceAllString(to, "$1")]++
		}
	}
	return count
}

// rss returns a process's resident memory in KiB.
func rss(t testing.TB, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	var kib int
	if _, err := fmt.Sscan(after, &kib); err != nil {
		t.Fatal(err)
	}
	return kib
}

func (s *soak) client() *lab.Client { return s.lab.Clients[s.rng.IntN(len(s.lab.Clients))] }

// pause lets time pass within a step: none, often, so that things also come at once.
func (s *soak) pause() error {
	time.Sleep(time.Duration(max(0, s.rng.IntN(100)-50)) * time.Millisecond)
	return nil
}

func (s *soak) configure(cfg wgtypes.Config) error {
	return s.gw.WG().ConfigureDevice(s.gw.Device(), cfg)
}

// peer changes one peer of the gateway.
func (s *soak) peer(p wgtypes.PeerConfig) error {
	return s.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{p}})
}

// somewhere returns an endpoint that nobody has.
func (s *soak) somewhere() *net.UDPAddr {
	s.ports++
	return &net.UDPAddr{IP: net.IPv4(192, 0, 2, byte(1+s.rng.IntN(250))), Port: 1 + s.ports%60_000}
}

func (s *soak) roam(way func(*lab.Client) (netip.AddrPort, error)) error {
	c := s.client()
	_, err := way(c)
	return errors.Join(err, c.Send(1+s.rng.IntN(3)))
}

func (s *soak) flap() error {
	c := s.client()
	for range 1 + s.rng.IntN(20) {
		if _, err := c.RoamPort(); err != nil {
			return err
		}
		if err := c.Send(1); err != nil {
			return err
		}
	}
	return nil
}

// forge sends what looks like WireGuard's messages, from the other gateway.
func (s *soak) forge() error {
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(lab.VIP4, lab.ListenPort))
	return s.lab.Gateways[1].Do(func() error {
		conn, err := net.DialUDP("udp4", nil, to)
		if err != nil {
			return err
		}
		defer conn.Close()
		for range 200 {
			kind := 1 + s.rng.IntN(4)
			packet := make([]byte, []int{148, 92, 64, 80}[kind-1]) // messages.h
			_, _ = rand.Read(packet)
			copy(packet, []byte{byte(kind), 0, 0, 0})
			_, _ = conn.Write(packet) // the gateway may refuse them
		}
		return nil
	})
}

func (s *soak) set() error {
	key := wgtypes.Key(s.client().Key())
	if len(s.extra) > 0 && s.rng.IntN(2) == 0 {
		key = s.extra[s.rng.IntN(len(s.extra))]
	}
	return s.peer(wgtypes.PeerConfig{PublicKey: key, UpdateOnly: true, Endpoint: s.somewhere()})
}

func (s *soak) readd() error {
	c := s.client()
	cfg := wgtypes.PeerConfig{PublicKey: wgtypes.Key(c.Key()), AllowedIPs: []net.IPNet{single(c.Inner4), single(c.Inner6)}}
	return errors.Join(
		s.peer(wgtypes.PeerConfig{PublicKey: cfg.PublicKey, Remove: true}), s.pause(),
		s.peer(cfg), c.Send(1),
	)
}

func (s *soak) addPeer() error {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return err
	}
	s.extra = append(s.extra, key.PublicKey())
	cfg := wgtypes.PeerConfig{PublicKey: key.PublicKey()}
	if s.rng.IntN(2) == 0 {
		cfg.Endpoint = s.somewhere()
	}
	return s.peer(cfg)
}

func (s *soak) removePeer() error {
	if len(s.extra) == 0 {
		return nil
	}
	i := s.rng.IntN(len(s.extra))
	key := s.extra[i]
	s.extra = append(s.extra[:i], s.extra[i+1:]...)
	return s.peer(wgtypes.PeerConfig{PublicKey: key, Remove: true})
}

func (s *soak) listen() error {
	there, home := lab.ListenPort+1+s.rng.IntN(100), lab.ListenPort
	return errors.Join(
		s.configure(wgtypes.Config{ListenPort: &there}), s.client().Send(1), s.pause(),
		s.configure(wgtypes.Config{ListenPort: &home}),
	)
}

func (s *soak) link() error {
	return s.gw.Do(func() error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "new0"}, PeerName: "new1"}
		err := netlink.LinkAdd(link)
		if err == nil {
			err = errors.Join(netlink.LinkSetUp(link), s.pause(), netlink.LinkDel(link))
		}
		return err
	})
}

func (s *soak) rename() error {
	name := func(from, to string) error {
		return s.gw.Do(func() error {
			link, err := netlink.LinkByName(from)
			if err == nil {
				err = netlink.LinkSetName(link, to)
			}
			return err
		})
	}
	// Before 6.2 (bd039b5ea2a9) a link had to be down for that.
	return errors.Join(
		s.gw.LinkDown(), name(s.gw.Device(), "away0"), s.pause(),
		name("away0", s.gw.Device()), s.gw.LinkUp(),
	)
}

func (s *soak) remake() error {
	old, err := s.gw.WG().Device(s.gw.Device())
	if err != nil {
		return err
	}
	cfg := wgtypes.Config{PrivateKey: &old.PrivateKey, ListenPort: &old.ListenPort}
	for _, p := range old.Peers {
		cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: p.PublicKey, AllowedIPs: p.AllowedIPs})
	}
	err = s.gw.Do(func() error {
		link, err := netlink.LinkByName(s.gw.Device())
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkDel(link), s.pause()); err != nil {
			return err
		}
		fresh := &netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: s.gw.Device(), MTU: link.Attrs().MTU}}
		if err := netlink.LinkAdd(fresh); err != nil {
			return err
		}
		inner := net.IPNet{IP: lab.Inner4.AsSlice(), Mask: net.CIDRMask(16, 32)}
		return netlink.AddrAdd(fresh, &netlink.Addr{IPNet: &inner})
	})
	return errors.Join(err, s.configure(cfg), s.gw.LinkUp())
}

func (s *soak) kill() error {
	if err := s.node.cmd.Process.Kill(); err != nil {
		return err
	}
	<-s.node.exited
	err := s.roam((*lab.Client).RoamPort)
	s.begin()
	return err
}

func single(a netip.Addr) net.IPNet {
	return net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}
