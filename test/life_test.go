// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

var (
	lifeFor  = flag.Duration("life", 20*time.Second, "how long TestLife goes on")
	lifeSeed = flag.Uint64("seed", 0, "what TestLife and TestFailoverKilled draw from; 0 draws a seed")
)

// life is a pair of gateways with clients to whom everything happens.
type life struct {
	t      *testing.T
	rng    *rand.Rand
	lab    *lab.Lab
	nodes  []*node
	dirs   []string
	base   []weights                      // what each daemon held when it was first at rest; nil when not yet
	sniff  []*sniffer                     // at the gateways
	spare  int                            // of the names of links
	holder int                            // of the virtual IP
	extra  map[*lab.Gateway][]wgtypes.Key // peers that never speak
	stale  map[*lab.Client]bool           // its session is of a device that is gone
}

// step is one thing that can happen.
type step struct {
	name   string
	weight int
	do     func(*life) error
}

var steps = []step{
	{"roam", 40, (*life).roam},
	{"two clients at once", 4, (*life).both},
	{"back and forth", 4, (*life).flap},
	{"handshake", 15, (*life).handshake},
	{"flood", 6, (*life).flood},
	{"admin", 6, (*life).admin},
	{"peer removed and added", 4, (*life).readd},
	{"silent peer added or removed", 4, (*life).silent},
	{"link down and up", 3, (*life).bounce},
	{"device deleted and made again", 2, (*life).recreate},
	{"device renamed and back", 2, (*life).rename},
	{"module unloaded and loaded", 2, (*life).reload},
	{"virtual IP moved", 2, (*life).failover},
	{"listen port changed and back", 3, (*life).port},
	{"uplink added and removed", 3, (*life).uplink},
	{"daemon killed and started", 2, (*life).kill},
	{"settle", 10, (*life).settle},
}

// TestLife: a random life of devices, modules, links, peers, roams, floods and
// daemons ends with what every daemon knows equal to what its kernel has, with
// nothing for the sweep to repair, and with nothing leaked. The same seed draws the
// same steps; how many there is time for, and which packets are on the wire for a
// flood to repeat, is the machine's.
func TestLife(t *testing.T) {
	seed := *lifeSeed
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("to repeat these steps: -test.run TestLife -seed %d -life %v", seed, *lifeFor)
	v := &life{
		t: t, rng: rand.New(rand.NewPCG(seed, 0)), lab: newLab(t, lab.Config{Clients: 5}),
		dirs: []string{t.TempDir(), t.TempDir()}, base: make([]weights, 2), nodes: make([]*node, 2),
		stale: make(map[*lab.Client]bool), extra: make(map[*lab.Gateway][]wgtypes.Key),
	}
	before := loaded(t)
	for i, gw := range v.lab.Gateways {
		v.sniff = append(v.sniff, sniff(t, gw))
		v.start(i)
	}
	total := 0
	for _, s := range steps {
		total += s.weight
	}
	took := make(map[string]int)
	deadline := time.Now().Add(*lifeFor)
	var last []string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last steps: %s", strings.Join(last, ", "))
		}
	})
	must := func(s step) {
		took[s.name]++
		last = append(last[max(0, len(last)-30):], s.name)
		if err := s.do(v); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	for time.Now().Before(deadline) {
		n := v.rng.IntN(total)
		for _, s := range steps {
			if n -= s.weight; n < 0 {
				must(s)
				break
			}
		}
	}
	must(step{"settle", 0, (*life).settle})
	for i, n := range v.nodes {
		s := n.status()
		t.Logf("%s: detector %s, %d changes, %d lost, %d resyncs, %d repaired by the sweep; held at rest at first %v, at the end %v",
			n.gw.Name, s.Detector.Rung, s.Events, s.Lost, s.Resyncs, s.SweepRepairs, v.base[i], v.weigh(i))
	}
	t.Logf("steps: %v", took)
	for _, n := range v.nodes {
		n.stop()
	}
	if lab.InVM() { // nobody else loads any
		await(t, "the kernel has let go of all programs", func() (bool, string) {
			now := loaded(t)
			return now == before, fmt.Sprintf("programs, maps, links: before %v, now %v", before, now)
		})
	}
}

// loaded counts the BPF programs, maps and links of the kernel.
func loaded(t *testing.T) (counts [3]int) {
	for i, next := range []uintptr{unix.BPF_PROG_GET_NEXT_ID, unix.BPF_MAP_GET_NEXT_ID, unix.BPF_LINK_GET_NEXT_ID} {
		var attr struct{ start, next, flags uint32 } // linux/bpf.h, union bpf_attr
		for ; ; counts[i]++ {
			_, _, errno := unix.Syscall(unix.SYS_BPF, next, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
			if errno == unix.ENOENT {
				break // that was the last
			}
			if errno != 0 {
				t.Fatalf("list what BPF has loaded: %v", errno)
			}
			attr.start = attr.next
		}
	}
	return counts
}

// start starts the daemon of a gateway. It sweeps so often that a miss cannot
// hide.
func (v *life) start(i int) {
	gw := v.lab.Gateways[i]
	cfg := config(gw, v.dirs[i], others(v.lab, gw)...) + "[metrics]\nlisten = \"127.0.0.1:9586\"\n"
	cfg = strings.Replace(cfg, "[[device]]\n", "[[device]]\nsweep_interval = \"1s\"\n", 1)
	v.nodes[i] = startNode(v.t, gw, v.dirs[i], cfg)
	v.base[i] = nil
}

func (v *life) client() *lab.Client { return v.lab.Clients[v.rng.IntN(len(v.lab.Clients))] }
func (v *life) gateway() *lab.Gateway {
	return v.lab.Gateways[v.rng.IntN(len(v.lab.Gateways))]
}

// roam moves a client and lets it speak, or not.
func (v *life) roam() error {
	c := v.client()
	var err error
	switch v.rng.IntN(5) {
	case 0:
		_, err = c.RoamAddress()
	case 1:
		_, err = c.RoamFamily()
	default:
		_, err = c.RoamPort()
	}
	if err == nil && v.rng.IntN(4) > 0 {
		err = c.Send(1 + v.rng.IntN(3))
	}
	return err
}

func (v *life) both() error { return errors.Join(v.roam(), v.roam()) }

// flap moves a client many times in a row.
func (v *life) flap() error {
	c := v.client()
	for range 1 + v.rng.IntN(20) {
		if _, err := c.RoamPort(); err != nil {
			return err
		}
		if err := c.Send(1); err != nil {
			return err
		}
	}
	return nil
}

func (v *life) handshake() error {
	c := v.client()
	delete(v.stale, c)
	if err := c.Forget(); err != nil {
		return err
	}
	return c.Send(1)
}

// flood sends forged packets to both gateways, from several places.
func (v *life) flood() error {
	return v.lab.Clients[0].Do(func() error {
		for range 8 {
			conn, err := net.ListenUDP("udp4", nil)
			if err != nil {
				return err
			}
			for range 64 {
				p := forge(v.rng, v.sniff[v.rng.IntN(len(v.sniff))])
				// A full queue on the way is none of our business.
				_, _ = conn.WriteToUDPAddrPort(p, netip.AddrPortFrom(v.gateway().Addr4, lab.ListenPort))
			}
			if err := conn.Close(); err != nil {
				return err
			}
		}
		return nil
	})
}

// admin sets an endpoint by hand, on either gateway.
func (v *life) admin() error {
	ep := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + v.rng.IntN(250))}), uint16(1024+v.rng.IntN(60000)))
	setEndpoint(v.t, v.gateway(), v.client().Key(), ep)
	return nil
}

func (v *life) readd() error {
	gw, c := v.gateway(), v.client()
	peers, err := gw.Peers()
	if err != nil {
		return err
	}
	for _, p := range peers {
		if wgroam.Key(p.PublicKey) != c.Key() {
			continue
		}
		for _, cfg := range []wgtypes.PeerConfig{
			{PublicKey: p.PublicKey, Remove: true},
			{PublicKey: p.PublicKey, AllowedIPs: p.AllowedIPs},
		} {
			if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{cfg}}); err != nil {
				return err
			}
		}
	}
	v.stale[c] = true
	return nil
}

// silent adds a peer that never speaks, with or without an endpoint, or removes
// one.
func (v *life) silent() error {
	gw := v.gateway()
	var cfg wgtypes.PeerConfig
	if n := len(v.extra[gw]); n > 0 && v.rng.IntN(2) == 0 {
		cfg = wgtypes.PeerConfig{PublicKey: v.extra[gw][n-1], Remove: true}
		v.extra[gw] = v.extra[gw][:n-1]
	} else {
		key, err := wgtypes.GenerateKey()
		if err != nil {
			return err
		}
		cfg.PublicKey = key
		v.extra[gw] = append(v.extra[gw], key)
		if v.rng.IntN(2) == 0 {
			cfg.Endpoint = &net.UDPAddr{IP: net.IPv4(192, 0, 2, byte(v.rng.IntN(250))), Port: 9}
		}
	}
	return gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{Peers: []wgtypes.PeerConfig{cfg}})
}

func (v *life) bounce() error {
	gw := v.gateway()
	if err := gw.LinkDown(); err != nil {
		return err
	}
	v.forgotten()
	return gw.LinkUp()
}

func (v *life) recreate() error {
	v.forgotten()
	gw := v.gateway()
	delete(v.extra, gw)
	return gw.Recreate()
}

// reload loads the module anew, which every daemon has to let go of before; where
// the module is not ours, it takes away all devices and makes them again.
func (v *life) reload() error {
	v.forgotten()
	clear(v.extra)
	return v.lab.Rebuild(func() error {
		if !v.lab.Kernel || !lab.InVM() {
			return nil
		}
		await(v.t, "the module is free", func() (bool, string) {
			out, err := exec.Command("modprobe", "-r", "wireguard").CombinedOutput()
			return err == nil, string(out)
		})
		return exec.Command("modprobe", "wireguard").Run()
	})
}

// failover moves the virtual IP to the other gateway.
func (v *life) failover() error {
	v.forgotten()
	v.holder = 1 - v.holder
	return v.lab.MoveVIP(v.lab.Gateways[v.holder])
}

// forgotten: the sessions of all clients are gone.
func (v *life) forgotten() {
	for _, c := range v.lab.Clients {
		v.stale[c] = true
	}
}

// rename gives the device another name, and its own again. wireguard-go's
// socket keeps the old name, so that there is nothing to see.
func (v *life) rename() error {
	if !v.lab.Kernel {
		return nil
	}
	gw := v.gateway()
	if err := gw.LinkDown(); err != nil {
		return err
	}
	v.forgotten()
	err := gw.Do(func() error {
		link, err := netlink.LinkByName(gw.Device())
		if err != nil {
			return err
		}
		if err := netlink.LinkSetName(link, "wgother"); err != nil {
			return err
		}
		return netlink.LinkSetName(link, gw.Device())
	})
	if err != nil {
		return err
	}
	return gw.LinkUp()
}

// port changes where a gateway listens for a moment. A client that hears from there
// sends there from then on.
func (v *life) port() error {
	v.forgotten()
	gw := v.gateway()
	for _, port := range []int{lab.ListenPort + 1 + v.rng.IntN(100), lab.ListenPort} {
		if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{ListenPort: &port}); err != nil {
			return err
		}
	}
	return nil
}

// uplink adds a pair of links, and takes away the one before.
func (v *life) uplink() error {
	return v.lab.Gateways[0].Do(func() error {
		name := func() string { return fmt.Sprintf("spare%d", v.spare%100) }
		if old, err := netlink.LinkByName(name()); err == nil {
			if err := netlink.LinkDel(old); err != nil {
				return err
			}
		}
		v.spare++
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name(), Flags: net.FlagUp}, PeerName: name() + "p"})
	})
}

// kill ends a daemon as a crash would, and starts it again. The other lives to the
// end, so that what leaks adds up.
func (v *life) kill() error {
	n := v.nodes[0]
	if err := n.cmd.Process.Kill(); err != nil {
		return err
	}
	<-n.exited
	v.start(0)
	return nil
}

// settle lets every client speak from a new place, and compares what the daemons
// and the devices know.
func (v *life) settle() error {
	for _, n := range v.nodes {
		n.awaitNodes(len(v.nodes) - 1)
		// By polling it does until a new device has its port, and holds less then.
		await(v.t, n.gw.Name+" follows its device", func() (bool, string) {
			s := n.status()
			return s.State == control.StateUp && s.Peers >= len(v.lab.Clients) && s.Detector.Rung != control.RungPolling, fmt.Sprintf("%+v", s)
		})
	}
	want := make(map[wgroam.Key]netip.AddrPort)
	for _, c := range v.lab.Clients {
		ep, err := c.RoamPort()
		if err == nil && v.stale[c] {
			err = c.Forget()
		}
		if err != nil {
			return err
		}
		delete(v.stale, c)
		// A handshake that was lost in a flood is tried again after 5 s.
		ctx, cancel := context.WithTimeout(v.t.Context(), 2*patience)
		_, err = c.Reach(ctx)
		cancel()
		if err != nil {
			return fmt.Errorf("%w: %v at %v; %s", err, c.Key(), ep, v.state(c))
		}
		want[c.Key()] = ep
	}
	for i, n := range v.nodes {
		await(v.t, n.gw.Name+" agrees", func() (bool, string) { return v.agrees(n, want) })
		if s := n.status(); s.SweepRepairs != 0 {
			v.t.Errorf("%s: the sweep repaired %d: %+v", n.gw.Name, s.SweepRepairs, s)
		}
		if v.base[i] == nil {
			v.base[i] = v.weigh(i)
		}
		await(v.t, n.gw.Name+" has let go", func() (bool, string) {
			now := v.weigh(i)
			return now.within(v.base[i]), fmt.Sprintf("at first %v, now %v", v.base[i], now)
		})
	}
	return nil
}

// state tells what all devices say of a client's session.
func (v *life) state(c *lab.Client) string {
	var out strings.Builder
	err := c.Do(func() error {
		client, err := wgctrl.New()
		if err != nil {
			return err
		}
		defer client.Close()
		d, err := client.Device(c.Device())
		if err == nil {
			fmt.Fprintf(&out, "client: port %d, %s", d.ListenPort, session(d.Peers[0]))
		}
		return err
	})
	for _, gw := range v.lab.Gateways {
		peers, perr := gw.Peers()
		err = errors.Join(err, perr)
		for _, p := range peers {
			if wgroam.Key(p.PublicKey) == c.Key() {
				fmt.Fprintf(&out, "\n%s: %s", gw.Name, session(p))
			}
		}
	}
	if err != nil {
		fmt.Fprintf(&out, "\n%v", err)
	}
	return out.String()
}

func session(p wgtypes.Peer) string {
	return fmt.Sprintf("%v, handshake %v, %d bytes received, %d sent", p.Endpoint, p.LastHandshakeTime, p.ReceiveBytes, p.TransmitBytes)
}

// agrees compares the clients' endpoints with the device and with what the
// daemon says of it.
func (v *life) agrees(n *node, want map[wgroam.Key]netip.AddrPort) (bool, string) {
	device, err := n.gw.Endpoints()
	if err != nil {
		v.t.Fatal(err)
	}
	held, table := make(map[wgroam.Key]netip.AddrPort), make(map[wgroam.Key]netip.AddrPort)
	for _, p := range n.peers() {
		if p.Held.IsValid() {
			held[p.Peer] = p.Held
		}
		if p.Endpoint.IsValid() {
			table[p.Peer] = p.Endpoint
		}
	}
	for k, ep := range want {
		if device[k] != ep {
			return false, fmt.Sprintf("clients %v\ndevice  %v", want, device)
		}
	}
	return maps.Equal(device, held) && maps.Equal(table, want),
		fmt.Sprintf("clients %v\ndevice  %v\nheld    %v\ntable   %v", want, device, held, table)
}

// weights is what a daemon holds of the kernel and of memory, by kind.
type weights map[string]int

// weigh counts a daemon's file descriptors by what they are, and its goroutines.
func (v *life) weigh(i int) weights {
	n := v.nodes[i]
	w := weights{}
	dir := fmt.Sprintf("/proc/%d/fd", n.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		v.t.Fatal(err)
	}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		kind, _, _ := strings.Cut(to, ":")
		if strings.Contains(to, "bpf") {
			kind = to // anon_inode:bpf-map, bpf-prog, bpf_link
		} else if strings.HasPrefix(to, "/") {
			kind = "file"
		}
		w[kind]++
	}
	client := http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, addr string) (conn net.Conn, err error) {
			err = n.gw.Do(func() error { conn, err = net.Dial(network, addr); return err })
			return conn, err
		},
	}}
	resp, err := client.Get("http://127.0.0.1:9586/metrics")
	if err != nil {
		v.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		v.t.Fatal(err)
	}
	for line := range bytes.Lines(body) {
		if value, ok := bytes.CutPrefix(line, []byte("go_goroutines ")); ok {
			w["goroutines"], _ = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
		if value, ok := bytes.CutPrefix(line, []byte("process_resident_memory_bytes ")); ok {
			f, _ := strconv.ParseFloat(string(bytes.TrimSpace(value)), 64)
			w["MB"] = int(f / 1e6)
		}
	}
	return w
}

// within reports whether w is no more than base, but for what may be under way:
// a request of ours, a connection that is being replaced, the newest uplinks. Memory may grow to
// what the garbage collector aims at.
func (w weights) within(base weights) bool {
	for kind, n := range w {
		slack := 3
		switch {
		case strings.Contains(kind, "bpf_link"):
			slack = 4 // both directions of the pair of links that step uplink leaves
		case strings.Contains(kind, "bpf"):
			slack = 0
		case kind == "goroutines":
			slack = 10
		case kind == "MB":
			slack = 60
		}
		if n > base[kind]+slack {
			return false
		}
	}
	return true
}
