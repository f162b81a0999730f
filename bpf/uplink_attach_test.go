// SPDX-License-Identifier: MIT

package bpf

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// enter moves the test to a network namespace of its own, which ends with it. Its
// loopback is up.
func enter(t testing.TB) {
	t.Helper()
	needRoot(t)
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer home.Close()
		if err := netns.Set(home); err != nil {
			t.Error(err) // and the thread stays locked, and ends with the goroutine
			return
		}
		runtime.UnlockOSThread()
	})
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := netlink.LinkSetUp(linkOf(t, "lo")); err != nil {
		t.Fatal(err)
	}
}

func linkOf(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// hooks runs a test with each way to attach that the kernel has.
func hooks(t *testing.T, test func(t *testing.T, open func() *Uplink)) {
	needRoot(t)
	for _, name := range []string{"tcx", "clsact"} {
		t.Run(name, func(t *testing.T) {
			if name == "tcx" && !haveTCX(t) {
				t.Skipf("the kernel, %s, has no tcx", kernel())
			}
			enter(t)
			test(t, func() *Uplink {
				u := openUplink(t, 1)
				u.clsact = name == "clsact"
				if err := u.Follow(near.Port()); err != nil {
					t.Fatal(err)
				}
				return u
			})
		})
	}
}

func haveTCX(t testing.TB) bool {
	t.Helper()
	u := openUplink(t, 1)
	a, err := attachTCX(1, u.objs.UplinkIngress, u.objs.UplinkEgress)
	if err != nil {
		if !errors.Is(err, ebpf.ErrNotSupported) {
			t.Fatal(err)
		}
		return false
	}
	if err := a.detach(); err != nil {
		t.Fatal(err)
	}
	return true
}

// sender is a socket at the device's port, and one of a peer, both on loopback.
type sender struct {
	t          testing.TB
	near, peer *net.UDPConn
}

func newSender(t testing.TB) *sender {
	t.Helper()
	s := &sender{t: t}
	for _, c := range []struct {
		conn **net.UDPConn
		addr netip.AddrPort
	}{{&s.near, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), near.Port())}, {&s.peer, netip.MustParseAddrPort("127.0.0.2:7")}} {
		*c.conn = listen(t, c.addr)
	}
	return s
}

// listen opens a socket that waits for nothing for too long.
func listen(t testing.TB, addr netip.AddrPort) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetReadDeadline(time.Now().Add(2 * patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// out and in send a message to and from the peer, and wait for it.
func (s *sender) out(payload []byte) { s.send(s.near, s.peer, payload) }
func (s *sender) in(payload []byte)  { s.send(s.peer, s.near, payload) }

func (s *sender) send(from, to *net.UDPConn, payload []byte) {
	s.t.Helper()
	if _, err := from.WriteTo(payload, to.LocalAddr()); err != nil {
		s.t.Fatal(err)
	}
	if _, _, err := to.ReadFrom(make([]byte, 1<<16)); err != nil {
		s.t.Fatal(err)
	}
}

// TestUplinkAttach: both directions, once, until Detach.
func TestUplinkAttach(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		u := open()
		w, s := &wire{t, u}, newSender(t)
		peer := s.peer.LocalAddr().(*net.UDPAddr).AddrPort()
		for i := range uint32(2) {
			l, r := 10+i, 20+i
			for range 2 {
				if err := u.Attach(1); err != nil {
					t.Fatal(err)
				}
			}
			s.out(response(l, r))
			s.in(data(l))
			s.out(data(r))
			w.want(
				UplinkEvent{Kind: UplinkResponse, Local: l, Remote: r, Addr: peer, Message: response(l, r)[:76]},
				UplinkEvent{Kind: UplinkHint, Local: l, Addr: peer},
				UplinkEvent{Kind: UplinkConfirmed, Remote: r, Addr: peer},
			)
			for range 2 {
				if err := u.Detach(1); err != nil {
					t.Fatal(err)
				}
			}
			s.out(data(30))
			w.want()
		}
		if err := u.Attach(4711); !errors.Is(err, unix.ENODEV) {
			t.Errorf("Attach to no link: %v, want %v", err, unix.ENODEV)
		}
	})
}

// witness is another program on the same hook: it counts what passes, and ends with
// a verdict.
type witness struct {
	prog *ebpf.Program
	seen *ebpf.Map
}

func newWitness(t testing.TB, verdict int32) *witness {
	t.Helper()
	seen, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 16, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { seen.Close() })
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual MIT/GPL", Instructions: asm.Instructions{
		// Two numbers: all packets, and those whose data lies elsewhere in part.
		asm.LoadMem(asm.R6, asm.R1, 80, asm.Word), // data_end
		asm.LoadMem(asm.R7, asm.R1, 76, asm.Word), // data
		asm.LoadMem(asm.R8, asm.R1, 0, asm.Word),  // len
		asm.Sub.Reg(asm.R6, asm.R7),
		asm.LoadMapValue(asm.R1, seen.FD(), 0),
		asm.Mov.Imm(asm.R2, 1),
		asm.StoreXAdd(asm.R1, asm.R2, asm.DWord),
		asm.JGE.Reg(asm.R6, asm.R8, "out"),
		asm.LoadMapValue(asm.R1, seen.FD(), 8),
		asm.StoreXAdd(asm.R1, asm.R2, asm.DWord),
		asm.Mov.Imm(asm.R0, verdict).WithSymbol("out"),
		asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return &witness{prog, seen}
}

// packets returns how many have passed, and how many of them were not in one piece.
func (w *witness) packets(t testing.TB) (all, split int) {
	t.Helper()
	var n [2]uint64
	if err := w.seen.Lookup(uint32(0), &n); err != nil {
		t.Fatal(err)
	}
	return int(n[0]), int(n[1])
}

// stand puts a witness on both directions of loopback, before or behind what is
// there.
func (w *witness) stand(t testing.TB, hook string, first bool) {
	t.Helper()
	if hook == "tcx" {
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			anchor := link.Tail()
			if first {
				anchor = link.Head()
			}
			l, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: w.prog, Attach: at, Anchor: anchor})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}
		return
	}
	priority := uint16(100)
	if first {
		priority = 1
	}
	for _, parent := range clsactParents {
		err := netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: 1, Parent: parent, Priority: priority, Protocol: unix.ETH_P_IP},
			Fd:          w.prog.FD(), Name: "witness", DirectAction: true,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// talk makes a session, and has the packets of it reported once by each Uplink.
func (s *sender) talk(session uint32, uplinks ...*Uplink) {
	s.t.Helper()
	peer := s.peer.LocalAddr().(*net.UDPAddr).AddrPort()
	s.out(response(session, session))
	s.in(data(session))
	s.out(data(session))
	for _, u := range uplinks {
		(&wire{s.t, u}).want(
			UplinkEvent{Kind: UplinkResponse, Local: session, Remote: session, Addr: peer, Message: response(session, session)[:76]},
			UplinkEvent{Kind: UplinkHint, Local: session, Addr: peer},
			UplinkEvent{Kind: UplinkConfirmed, Remote: session, Addr: peer},
		)
	}
}

func addClsact(t testing.TB) {
	t.Helper()
	if err := netlink.QdiscAdd((&clsact{link: linkOf(t, "lo")}).qdisc()); err != nil {
		t.Fatal(err)
	}
}

func hasClsact(t testing.TB, l netlink.Link) bool {
	t.Helper()
	qdiscs, err := netlink.QdiscList(l)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range qdiscs {
		if q.Type() == "clsact" {
			return true
		}
	}
	return false
}

// TestUplinkNeighbours: other programs before and behind see every packet, and we see
// every packet though they let none further.
func TestUplinkNeighbours(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		u, s := open(), newSender(t)
		hook := "tcx"
		if u.clsact {
			hook = "clsact"
			addClsact(t)
		}
		early, late := newWitness(t, -1), newWitness(t, 0) // 0 ends it: the packet is good
		if u.clsact {
			early.stand(t, hook, true)
			late.stand(t, hook, false)
		} else {
			late.stand(t, hook, false)
		}
		if err := u.Attach(1); err != nil {
			t.Fatal(err)
		}
		if !u.clsact {
			early.stand(t, hook, true)
		}
		s.talk(1, u)
		for name, w := range map[string]*witness{"before": early, "behind": late} {
			if n, _ := w.packets(t); n != 6 { // each leaves and comes in
				t.Errorf("the program %s saw %d packets, want 6", name, n)
			}
		}
		if err := u.Close(); err != nil {
			t.Fatal(err)
		}
		s.out(data(1))
		for name, w := range map[string]*witness{"before": early, "behind": late} {
			if n, _ := w.packets(t); n != 8 {
				t.Errorf("after Close the program %s saw %d packets, want 8", name, n)
			}
		}
		if u.clsact && !hasClsact(t, linkOf(t, "lo")) {
			t.Error("the others' qdisc is gone")
		}
	})
}

// TestUplinkTwo: two at once on one link, as of two daemons, and each for itself.
func TestUplinkTwo(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		a, b, s := open(), open(), newSender(t)
		for _, u := range []*Uplink{a, b} {
			if err := u.Attach(1); err != nil {
				t.Fatal(err)
			}
		}
		s.talk(1, a, b)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		s.talk(2, b)
		c := open()
		if err := c.Attach(1); err != nil {
			t.Fatal(err)
		}
		s.talk(3, b, c)
		if err := errors.Join(b.Detach(1), c.Close()); err != nil {
			t.Fatal(err)
		}
		s.talk(4)
		(&wire{t, b}).want()
	})
}

// Another process, which init makes of this program.
const childVar = "WGROAM_TEST_UPLINK"

func init() {
	if os.Getenv(childVar) == "" {
		return
	}
	u, err := OpenUplink(1)
	if err == nil {
		u.clsact = true
		err = u.Attach(1)
	}
	fmt.Println("attached:", err)
	select {} // until it is killed
}

func startChild(t *testing.T) *exec.Cmd {
	t.Helper()
	// Killed with this thread, which is locked.
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVar+"=1")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "attached: <nil>\n" {
		t.Fatalf("the other process says %q, error %v", line, err)
	}
	return cmd
}

func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // that it was killed is known
}

// TestUplinkKilled: filters of processes that were killed go when the next one comes,
// and those of the living stay.
func TestUplinkKilled(t *testing.T) {
	enter(t)
	ours := func() (n int) {
		t.Helper()
		for _, parent := range clsactParents {
			filters, err := netlink.FilterList(linkOf(t, "lo"), parent)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range filters {
				if b, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(b.Name, "wgroam") {
					n++
				}
			}
		}
		return n
	}
	check := func(when string, want int) {
		t.Helper()
		if n := ours(); n != want {
			t.Errorf("%s: %d filters, want %d", when, n, want)
		}
	}
	living := startChild(t)
	defer kill(t, living)
	for range 3 {
		kill(t, startChild(t))
		check("after a process was killed", 4)
	}
	u := openUplink(t, 1)
	u.clsact = true
	if err := errors.Join(u.Follow(near.Port()), u.Attach(1)); err != nil {
		t.Fatal(err)
	}
	check("after we have attached", 4)
	newSender(t).talk(1, u)
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
	check("after Close", 2)

	// A name that tells nothing, and those of other machines.
	p, err := self()
	if err != nil {
		t.Fatal(err)
	}
	if p.outlived("") || p.outlived("wgroam-uplink 1") || p.outlived(p.filter()) || p.outlived(process{p.namespace + 1, 1 << 30, 1}.filter()) {
		t.Error("a filter was taken for a dead process's")
	}
	if !p.outlived(process{p.namespace, 1 << 30, 1}.filter()) || !p.outlived(process{p.namespace, p.pid, p.start - 1}.filter()) {
		t.Error("a filter of a dead process was not known for one")
	}
}

// TestUplinkClsact: the qdisc goes if it is ours and nobody else has come to use it.
func TestUplinkClsact(t *testing.T) {
	enter(t)
	lo := linkOf(t, "lo")
	attach := func() *Uplink {
		t.Helper()
		u := openUplink(t, 1)
		u.clsact = true
		if err := u.Attach(1); err != nil {
			t.Fatal(err)
		}
		return u
	}
	u := attach()
	if err := u.Close(); err != nil || hasClsact(t, lo) {
		t.Errorf("our own qdisc is left, error %v", err)
	}
	u = attach()
	newWitness(t, -1).stand(t, "clsact", false)
	if err := u.Close(); err != nil || !hasClsact(t, lo) {
		t.Errorf("a qdisc that others use is gone, error %v", err)
	}
	u = attach()
	if err := u.Detach(1); err != nil || !hasClsact(t, lo) {
		t.Errorf("a qdisc that others made is gone, error %v", err)
	}

	// Somebody has removed everything: the next Attach brings it back.
	if err := u.Follow(near.Port()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := u.Attach(1); err != nil {
			t.Fatal(err)
		}
		if err := netlink.QdiscDel((&clsact{link: lo}).qdisc()); err != nil {
			t.Fatal(err)
		}
	}
	if err := u.Attach(1); err != nil {
		t.Fatal(err)
	}
	newSender(t).talk(1, u)
}

// TestUplinkLinkGone: a link is deleted under the programs, and another gets its
// number.
func TestUplinkLinkGone(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		u := open()
		const index = 77
		add := func() netlink.Link {
			t.Helper()
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.Index = "gone", index
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
				t.Fatal(err)
			}
			return linkOf(t, "gone")
		}
		for _, forget := range []bool{false, true, false} {
			l := add()
			if err := u.Attach(index); err != nil {
				t.Fatal(err)
			}
			if !isAttached(t, u, index) {
				t.Error("not attached")
			}
			if err := netlink.LinkDel(l); err != nil {
				t.Fatal(err)
			}
			if isAttached(t, u, index) {
				t.Error("still attached")
			}
			if forget {
				if err := u.Detach(index); err != nil {
					t.Error(err)
				}
			}
		}
		if err := u.Attach(index); !errors.Is(err, unix.ENODEV) {
			t.Errorf("Attach: %v, want %v", err, unix.ENODEV)
		}
	})
}

func isAttached(t *testing.T, u *Uplink, index int) bool {
	t.Helper()
	ok, err := u.links[index].attached(index)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

// TestUplinkUnknown: where it cannot be told whether the programs are still on a link,
// they stay, and the error says so.
func TestUplinkUnknown(t *testing.T) {
	needRoot(t)
	u := openUplink(t, 1)
	a := &unknown{}
	u.links[77] = a
	if err := u.Attach(77); !errors.Is(err, errUnknown) {
		t.Errorf("Attach: %v, want %v", err, errUnknown)
	}
	if a.detached {
		t.Error("detached")
	}
}

// unknown is an attachment that cannot be asked for.
type unknown struct{ detached bool }

var errUnknown = errors.New("no answer")

func (*unknown) attached(int) (bool, error) { return false, errUnknown }
func (u *unknown) detach() error            { u.detached = true; return nil }

// TestUplinkLinkMoved: a link goes to another namespace, with the programs and with
// its number, and another one gets the number here.
func TestUplinkLinkMoved(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		u := open()
		const index = 77
		elsewhere := make(chan int, 1)
		go func() {
			runtime.LockOSThread() // and never back: the thread ends
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				elsewhere <- -1
				return
			}
			fd, _ := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
			elsewhere <- fd
		}()
		fd := <-elsewhere
		if fd < 0 {
			t.Fatal("no namespace to move a link to")
		}
		defer unix.Close(fd)
		for i := range 2 {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.Index = "mover", index
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: fmt.Sprint("peer", i)}); err != nil {
				t.Fatal(err)
			}
			l := linkOf(t, "mover")
			defer func() { _ = netlink.LinkDel(linkOf(t, fmt.Sprint("peer", i))) }()
			if u.links[index] != nil && isAttached(t, u, index) {
				t.Error("attached to a link that has moved")
			}
			if err := u.Attach(index); err != nil {
				t.Fatal(err)
			}
			if !isAttached(t, u, index) {
				t.Error("not attached")
			}
			if i > 0 {
				break
			}
			if err := netlink.LinkSetNsFd(l, fd); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// tun makes a link whose packets begin with the IP header.
func tun(t testing.TB, addr string) (fd int, l netlink.Link) {
	t.Helper()
	_ = exec.Command("modprobe", "tun").Run() // where it is built in, there is none
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	ifr, err := unix.NewIfreq("tun7")
	if err == nil {
		ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		t.Fatal(err)
	}
	l = linkOf(t, "tun7")
	a, err := netlink.ParseAddr(addr)
	if err == nil {
		err = errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd, l
}

// TestUplinkTUN: a link without Ethernet.
func TestUplinkTUN(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		u := open()
		fd, l := tun(t, near.Addr().String()+"/24")
		if err := u.Attach(l.Attrs().Index); err != nil {
			t.Fatal(err)
		}
		conn := listen(t, near)
		peer := netip.MustParseAddrPort("198.51.100.9:99")
		if _, err := conn.WriteToUDPAddrPort(response(1, 2), peer); err != nil {
			t.Fatal(err)
		}
		f := frame{src: peer, dst: near, payload: data(1), bare: true}
		if _, err := unix.Write(fd, f.bytes()); err != nil {
			t.Fatal(err)
		}
		if _, _, err := conn.ReadFromUDPAddrPort(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.WriteToUDPAddrPort(data(2), peer); err != nil {
			t.Fatal(err)
		}
		(&wire{t, u}).want(
			UplinkEvent{Kind: UplinkResponse, Local: 1, Remote: 2, Addr: peer, Message: response(1, 2)[:76]},
			UplinkEvent{Kind: UplinkHint, Local: 1, Addr: peer},
			UplinkEvent{Kind: UplinkConfirmed, Remote: 2, Addr: peer},
		)
	})
}

// TestUplinkSplit: messages that are not in the packet's linear part, alone and many
// in one.
func TestUplinkSplit(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		u, s := open(), newSender(t)
		if err := u.Attach(1); err != nil {
			t.Fatal(err)
		}
		w := newWitness(t, -1)
		if !u.clsact {
			w.stand(t, "tcx", false)
		} else {
			w.stand(t, "clsact", false)
		}
		peer := s.peer.LocalAddr().(*net.UDPAddr).AddrPort()
		raw, err := s.near.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var serr error
		err = raw.Control(func(fd uintptr) {
			// As wireguard-go does: the payload is in pages of its own then (ip_output.c,
			// __ip_append_data).
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000)
		})
		if err := errors.Join(err, serr); err != nil {
			t.Fatal(err)
		}
		s.out(initiation(1))
		s.out(response(3, 4))
		s.out(data(2))
		many := message(4, 20_000, 5)
		for i := 0; i < len(many); i += 1000 {
			copy(many[i:], data(5))
		}
		if _, err := s.near.WriteTo(many, s.peer.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		for range len(many) / 1000 {
			if _, _, err := s.peer.ReadFrom(make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
		}
		(&wire{t, u}).want(
			UplinkEvent{Kind: UplinkInitiation, Local: 1, Addr: peer, Message: initiation(1)[:132]},
			UplinkEvent{Kind: UplinkResponse, Local: 3, Remote: 4, Addr: peer, Message: response(3, 4)[:76]},
			UplinkEvent{Kind: UplinkUnknown, Remote: 2, Addr: peer},
			UplinkEvent{Kind: UplinkUnknown, Remote: 5, Addr: peer},
		)
		all, split := w.packets(t)
		if all != 8 || split != 8 {
			t.Errorf("%d packets of which %d were split, want 8 of 8, the last of them as one", all, split)
		}
	})
}

// held counts what this process and the kernel hold of BPF.
func held(t testing.TB) map[string]int {
	t.Helper()
	runtime.GC() // the counters' memory lives as long as the Uplink
	n := make(map[string]int)
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n["file descriptors"] = len(fds)
	for id := ebpf.ProgramID(0); ; n["programs"]++ {
		if id, err = ebpf.ProgramGetNextID(id); err != nil {
			break
		}
	}
	for id := ebpf.MapID(0); ; n["maps"]++ {
		if id, err = ebpf.MapGetNextID(id); err != nil {
			break
		}
	}
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		n["links"]++
	}
	return n
}

// TestUplinkLeaks: Close gives back what OpenUplink and Attach take, with no more
// privileges than they need.
func TestUplinkLeaks(t *testing.T) {
	hooks(t, func(t *testing.T, open func() *Uplink) {
		clsact := open().clsact
		before := held(t)
		for range 2 {
			unprivileged(t, []int{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_NET_ADMIN}, func() {
				u, err := OpenUplink(1)
				if err != nil {
					t.Error(err)
					return
				}
				u.clsact = clsact
				if err := errors.Join(u.Attach(1), u.Follow(1), u.Close(), u.Close()); err != nil {
					t.Error(err)
				}
			})
		}
		// The kernel lets go of programs and maps in the background.
		await(t, "the same numbers as before", func() bool {
			after := held(t)
			for what, n := range after {
				if n > before[what] {
					t.Logf("%d %s, %d before", n, what, before[what])
					return false
				}
			}
			return true
		})
	})
}

// TestUplinkPrivileges: what is missing is named.
func TestUplinkPrivileges(t *testing.T) {
	needRoot(t)
	for _, test := range []struct {
		have    []int
		missing string
	}{
		{nil, "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"},
		{[]int{unix.CAP_NET_ADMIN}, "CAP_BPF, CAP_PERFMON"},
		{[]int{unix.CAP_BPF, unix.CAP_NET_ADMIN}, "CAP_PERFMON"},
		{[]int{unix.CAP_BPF, unix.CAP_PERFMON}, "CAP_NET_ADMIN"},
	} {
		unprivileged(t, test.have, func() {
			u, err := OpenUplink(1)
			if err == nil {
				u.Close()
			}
			if !errors.Is(err, ErrPrivilege) || !strings.Contains(fmt.Sprint(err), "needs "+test.missing+":") {
				t.Errorf("OpenUplink: %v, want %v and %s", err, ErrPrivilege, test.missing)
			}
		})
	}
	enter(t)
	u := openUplink(t, 1)
	if err := explainUplink(fmt.Errorf("add qdisc: %w", errNoTC)); !errors.Is(err, ErrUnsupported) || !errors.Is(err, errNoTC) {
		t.Errorf("without modules: %v, want %v", err, ErrUnsupported)
	}
	if err := explainUplink(unix.ENOMEM); !errors.Is(err, unix.ENOMEM) || errors.Is(err, ErrUnsupported) {
		t.Errorf("%v, want %v", err, unix.ENOMEM)
	}
	for range 2 { // what failed can be tried again
		if err := u.Attach(1); err != nil {
			t.Error(err)
		}
	}
}

// TestUplinkClose: a reader that waits is told, and nothing else works any more.
func TestUplinkClose(t *testing.T) {
	enter(t)
	u := openUplink(t, 1)
	result := make(chan error, 1)
	go func() {
		_, _, err := u.Read()
		result <- err
	}()
	if err := errors.Join(u.Attach(1), u.Close(), u.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, ErrClosed) {
		t.Errorf("Read: %v, want %v", err, ErrClosed)
	}
	if _, _, err := u.Read(); !errors.Is(err, ErrClosed) {
		t.Errorf("Read once more: %v, want %v", err, ErrClosed)
	}
	if _, err := u.Flush(); err == nil {
		t.Error("Flush: no error")
	}
	for what, err := range map[string]error{"Attach": u.Attach(1), "Follow": u.Follow(1), "Unfollow": u.Unfollow(1)} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v, want %v", what, err, ErrClosed)
		}
	}
	if err := u.Detach(1); err != nil {
		t.Errorf("Detach: %v", err)
	}
}

// TestUplinkFollow: ports by the bit.
func TestUplinkFollow(t *testing.T) {
	w := &wire{t, openUplink(t, 1)}
	ports := []uint16{1, 63, 64, 51820, 51821, 65535}
	send := func(want ...uint16) {
		t.Helper()
		w.reset()
		var events []UplinkEvent
		for _, port := range ports {
			f := frame{src: netip.AddrPortFrom(near.Addr(), port), dst: far(1), payload: data(1)}
			w.pass(w.u.objs.UplinkEgress, f.bytes(), nil)
		}
		for _, port := range want {
			events = append(events, UplinkEvent{Kind: UplinkUnknown, Port: port, Remote: 1, Addr: far(1)})
		}
		w.want(events...)
	}
	send()
	for i, port := range ports {
		for range 2 {
			if err := w.u.Follow(port); err != nil {
				t.Fatal(err)
			}
		}
		send(ports[:i+1]...)
	}
	for i, port := range ports {
		for range 2 {
			if err := w.u.Unfollow(port); err != nil {
				t.Fatal(err)
			}
		}
		send(ports[i+1:]...)
	}
}

// TestUplinkWireGuard: what a real device does, the kernel's where it has one.
func TestUplinkWireGuard(t *testing.T) {
	needRoot(t)
	l, err := lab.New(t.Context(), lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	gw, c := l.Gateways[0], l.Clients[0]
	w := newWire(t)
	err = gw.Do(func() error {
		lan, err := netlink.LinkByName("lan0")
		if err != nil {
			return err
		}
		return w.u.Attach(lan.Attrs().Index)
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	// awaitEvent makes traffic until there has been an event. It may be there before:
	// of what Reach has sent until the first answer, some is still on its way when the
	// client moves, and comes from its new place.
	var seen []UplinkEvent
	awaitEvent := func(kind UplinkKind, addr netip.AddrPort, traffic func() error) (found UplinkEvent) {
		t.Helper()
		await(t, fmt.Sprintf("%v at %v", kind, addr), func() bool {
			if err := traffic(); err != nil {
				t.Fatal(err)
			}
			seen = append(seen, w.events()...)
			i := slices.IndexFunc(seen, func(e UplinkEvent) bool { return e.Kind == kind && e.Addr == addr })
			if i >= 0 {
				found = seen[i]
			}
			return i >= 0
		})
		return found
	}
	send := func() error { return c.Send(1) } // which nobody answers, for now
	reach := func() error {
		_, err := c.Reach(ctx)
		return err
	}
	if _, err := c.Reach(ctx); err != nil {
		t.Fatal(err)
	}
	events := w.events()
	if len(events) < 3 || events[0].Kind != UplinkResponse || events[1].Kind != UplinkHint || events[1].Local != events[0].Local {
		t.Fatalf("events %+v, want a response and a hint", events)
	}
	remote := events[0].Remote
	for _, e := range events {
		if e.Addr != c.Endpoint() || e.Kind != UplinkHint && e.Remote != remote {
			t.Errorf("event %+v", e)
		}
	}
	last := c.Endpoint()
	for _, roam := range []func() (netip.AddrPort, error){c.RoamPort, c.RoamAddress, c.RoamFamily, c.RoamPort, c.RoamFamily} {
		ep, err := roam()
		if err != nil {
			t.Fatal(err)
		}
		awaitEvent(UplinkHint, ep, send)
		if e := awaitEvent(UplinkMoved, ep, reach); e.Old != last || e.Remote != remote {
			t.Errorf("event %+v, want that %d moved from %v", e, remote, last)
		}
		last = ep
	}

	// What the gateway forwards into the tunnel is its own when it comes out.
	var fd int
	err = gw.Do(func() error {
		fd, _ = tun(t, "10.77.0.1/24")
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	inner := frame{
		src: netip.MustParseAddrPort("10.77.0.2:1"), dst: netip.AddrPortFrom(c.Inner4, lab.DiscardPort),
		payload: make([]byte, 100), bare: true,
	}.bytes()
	for range 2 {
		ep, err := c.RoamFamily()
		if err != nil {
			t.Fatal(err)
		}
		awaitEvent(UplinkHint, ep, send)
		awaitEvent(UplinkMoved, ep, func() error {
			_, err := unix.Write(fd, inner)
			return err
		})
	}
	if lost, _ := w.counters(); lost != 0 {
		t.Errorf("%d lost", lost)
	}
}
