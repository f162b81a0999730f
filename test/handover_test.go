// SPDX-License-Identifier: MIT

package test

import (
	"bufio"
	be "encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// handover runs wgroam handover on a node, and calls ready when the other one is.
func (n *node) handover(ready func(), args ...string) ([]control.HandoverStep, error) {
	n.t.Helper()
	cmd := exec.Command(binary(n.t), append([]string{"handover", "--json", "--socket", n.socket}, args...)...)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	var steps []control.HandoverStep
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var s control.HandoverStep
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			n.t.Errorf("handover printed %q: %v", lines.Text(), err)
		}
		steps = append(steps, s)
		if s.Step == control.HandoverReady && ready != nil {
			ready()
		}
	}
	return steps, cmd.Wait()
}

// last returns the last step.
func last(steps []control.HandoverStep) control.HandoverStep {
	if len(steps) == 0 {
		return control.HandoverStep{}
	}
	return steps[len(steps)-1]
}

// stream is traffic through the tunnel in both directions, a datagram each tick,
// whichever gateway has the peer.
type stream struct {
	every time.Duration
	began time.Time

	mu       sync.Mutex
	up, down map[uint64]bool // the ticks whose datagram has arrived
}

const streamPort = 999

func startStream(t testing.TB, l *lab.Lab, c *lab.Client, every time.Duration) *stream {
	t.Helper()
	s := &stream{every: every, began: time.Now(), up: map[uint64]bool{}, down: map[uint64]bool{}}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait) // after all that follow
	receive := func(conn net.PacketConn, into map[uint64]bool) {
		t.Cleanup(func() { conn.Close() })
		wg.Go(func() {
			buf := make([]byte, 64)
			for {
				n, _, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				if n == 8 {
					s.mu.Lock()
					into[be.BigEndian.Uint64(buf)] = true
					s.mu.Unlock()
				}
			}
		})
	}
	send := func(write func([]byte)) {
		wg.Go(func() {
			tick := time.NewTicker(every / 2)
			defer tick.Stop()
			next := uint64(0)
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				// A tick that this thread had no time for is sent late.
				for now := s.now(); next <= now; next++ {
					write(be.BigEndian.AppendUint64(nil, next))
				}
			}
		})
	}
	for _, gw := range l.Gateways {
		var conn net.PacketConn
		if err := gw.Do(func() (err error) { conn, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", streamPort)); return err }); err != nil {
			t.Fatal(err)
		}
		receive(conn, s.up)
		to := &net.UDPAddr{IP: c.Inner4.AsSlice(), Port: streamPort}
		send(func(b []byte) { _, _ = conn.WriteTo(b, to) }) // the standby's goes nowhere
	}
	var conn net.PacketConn
	if err := c.Do(func() (err error) {
		conn, err = net.ListenPacket("udp4", fmt.Sprintf("%v:%d", c.Inner4, streamPort))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	receive(conn, s.down)
	out, err := c.Dial(t.Context(), "udp4", streamPort)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	send(func(b []byte) { _, _ = out.Write(b) })
	t.Cleanup(func() { close(stop) })
	return s
}

// now returns the present tick.
func (s *stream) now() uint64 { return uint64(time.Since(s.began) / s.every) }

// awaitBoth waits until something of that tick or later has arrived on both sides.
func (s *stream) awaitBoth(t testing.TB, from uint64) {
	t.Helper()
	after := func(ticks map[uint64]bool) bool {
		for k := range ticks {
			if k >= from {
				return true
			}
		}
		return false
	}
	await(t, "traffic in both directions", func() (bool, string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		return after(s.up) && after(s.down), fmt.Sprintf("%d and %d datagrams", len(s.up), len(s.down))
	})
}

// lost counts the ticks between two that have not arrived.
func (s *stream) lost(from, to uint64) (up, down int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := from; k < to; k++ {
		if !s.up[k] {
			up++
		}
		if !s.down[k] {
			down++
		}
	}
	return up, down
}

// TestHandover: the role goes to and fro ten times beneath continuous traffic, asked for
// by either node.
func TestHandover(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) { handOverBeneath(t, mode, lab.Config{OwnSource: true}, 10) })
	}
}

// TestHandoverFar: where the way is long, a handover loses what WireGuard does, and little more.
// What the clients send is lost for two round trips: half of one was on its way, and after the
// call they use the new session when its first packet has come, one and a half later. What
// the gateway sends is lost for one, or waits in WireGuard's queue.
func TestHandoverFar(t *testing.T) {
	if !lab.InVM() {
		t.Skip("the kernel of this machine may have no netem, those of test/vm have")
	}
	const delay = 150 * time.Millisecond
	rtt, up, down := handOverBeneath(t, "silent", lab.Config{OwnSource: true, Delay: delay}, 5)
	if rtt < 2*delay {
		t.Errorf("the round trip is %v, want %v at least", rtt, 2*delay)
	}
	t.Logf("lost since the virtual IP has moved: %.2f round trips up, %.2f down (medians)", up.Seconds()/rtt.Seconds(), down.Seconds()/rtt.Seconds())
	if up > 3*rtt || down > 2*rtt {
		t.Errorf("that is %v up and %v down, and the round trip takes %v", up, down, rtt)
	}
}

// handOverBeneath hands the role to and fro beneath traffic that is sent at every tick in
// both directions, and returns the round trip and the medians of how much of it was lost, less
// what the virtual IP took to move.
func handOverBeneath(t *testing.T, mode string, cfg lab.Config, rounds int) (rtt, up, down time.Duration) {
	l := newLab(t, cfg)
	c := l.Clients[0]
	na, nh := startPair(t, l, mode)
	na.awaitState("open")
	nh.awaitState("quiet")
	ping(t, c)
	rtt = roundTrip(t, c)
	const every = 2 * time.Millisecond
	s := startStream(t, l, c, every)
	s.awaitBoth(t, 0)
	active, standby := na, nh
	var ups, downs []int
	var tookUp, tookDown []time.Duration
	for round := range rounds {
		roam(t, c, 0) // what the standby has to know
		asked := active
		if round%3 == 2 {
			asked = standby
		}
		from := s.now()
		s.awaitBoth(t, from)
		var moved time.Duration
		steps, err := asked.handover(func() {
			began := time.Now()
			if err := l.MoveVIP(standby.gw); err != nil {
				t.Error(err)
			}
			moved = time.Since(began)
		})
		if err != nil || last(steps).Step != control.HandoverDone {
			t.Fatalf("round %d: %v: %+v", round, err, steps)
		}
		s.awaitBoth(t, s.now())
		to := s.now()
		<-time.After(patienceForStragglers + cfg.Delay)
		up, down := s.lost(from, to)
		t.Logf("round %d, asked on %s: %d up, %d down of %d datagrams lost, one each %v; round trip %v, the virtual IP took %v; %+v",
			round, asked.gw.Name, up, down, to-from, every, rtt, moved, steps)
		ups, downs = append(ups, up), append(downs, down)
		tookUp, tookDown = append(tookUp, time.Duration(up)*every-moved), append(tookDown, time.Duration(down)*every-moved)
		standby.awaitRole("active", "vip")
		active.awaitRole("standby", "vip")
		// Who is called where it was before it roamed is called again 5 s later.
		if p := standby.awaitState("open").Promotion; p == nil || p.Answered != 1 || p.P99MS >= 5000 {
			t.Errorf("round %d: promotion %+v", round, p)
		}
		active.awaitState("quiet")
		active, standby = standby, active
	}
	slices.Sort(ups)
	slices.Sort(downs)
	t.Logf("%s: datagrams lost in a handover, one each %v, round trip %v: up median %d, most %d; down median %d, most %d",
		mode, every, rtt, ups[len(ups)/2], ups[len(ups)-1], downs[len(downs)/2], downs[len(downs)-1])
	return rtt, percentile(tookUp, 50), percentile(tookDown, 50)
}

// patienceForStragglers is how long a datagram may be on its way.
const patienceForStragglers = 50 * time.Millisecond

// roundTrip returns the median of some round trips through the tunnel.
func roundTrip(t testing.TB, c *lab.Client) time.Duration {
	t.Helper()
	var took []time.Duration
	for range 15 {
		d, err := c.Ping(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, d)
	}
	return percentile(took, 50)
}

// startAuto starts a daemon on every gateway of a lab, whose role nobody gives yet, and
// waits until they hear each other.
func startAuto(t testing.TB, l *lab.Lab) []*node {
	t.Helper()
	var nodes []*node
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		nodes = append(nodes, startNode(t, gw, dir, roleConfig(gw, dir, `role = "auto"`, "", others(l, gw)...)))
	}
	for _, n := range nodes {
		n.awaitNodes(len(nodes) - 1)
	}
	return nodes
}

// startVerbs starts a daemon on both gateways, whose roles the verb gives.
func startVerbs(t testing.TB, l *lab.Lab) (a, h *node) {
	t.Helper()
	nodes := startAuto(t, l)
	nodes[0].mustRole("active")
	nodes[0].awaitState("open")
	nodes[1].awaitState("quiet")
	return nodes[0], nodes[1]
}

// TestHandoverVerb: where the verb gives the role, the handover gives it to both nodes;
// what cannot be is refused, and changes nothing.
func TestHandoverVerb(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h := startVerbs(t, l)
	ping(t, l.Clients[0])
	awaitEndpoint(t, h.gw, l.Clients[0], l.Clients[0].Endpoint())
	for _, asked := range []*node{a, a, h, h} {
		await(t, "one active", func() (bool, string) {
			ra, rh := a.status().Role, h.status().Role
			return ra != rh, ra + " " + rh
		})
		before := a.status().Role
		steps, err := asked.handover(nil)
		if err != nil || last(steps).Step != control.HandoverDone {
			t.Fatalf("%v: %+v", err, steps)
		}
		t.Logf("asked on %s: %+v", asked.gw.Name, steps)
		want := map[string]string{"active": "standby", "standby": "active"}[before]
		a.awaitRole(want, "verb")
		h.awaitRole(before, "verb")
		// The peers of the new one are called from its address, and so say the beats.
		for _, n := range []*node{a, h} {
			n.awaitAlarms()
			await(t, "it hears of the other's role", func() (bool, string) {
				other := n.status().Feed.Nodes[0].Role
				return other != n.status().Role, other
			})
		}
	}
	if steps, err := a.handover(nil, "--to", "gw-x"); err == nil || !strings.Contains(last(steps).Detail, "gw-h") {
		t.Errorf("to a node that is not there: %v: %+v", err, steps)
	}
	h.stop()
	await(t, "the standby is stale", func() (bool, string) {
		s := a.status().Feed.Nodes[0].State
		return s == control.NodeStale, s
	})
	if steps, err := a.handover(nil); err == nil || !strings.Contains(last(steps).Detail, "no standby is heard") {
		t.Errorf("to a node that is silent: %v: %+v", err, steps)
	}
	a.awaitRole("active", "verb")
}

// TestHandoverRefused: nothing is handed over that would not be where the virtual IP is, or
// be forgotten with the next restart.
func TestHandoverRefused(t *testing.T) {
	refused := func(n *node, want string) {
		t.Helper()
		steps, err := n.handover(nil)
		if got := last(steps); err == nil || got.Step != control.HandoverFailed || !strings.Contains(got.Detail, want) {
			t.Errorf("handover on %s: %v: %+v, want %q", n.gw.Name, err, steps, want)
		}
	}
	t.Run("virtual IP", func(t *testing.T) {
		l := newLab(t, lab.Config{})
		a, h := startPair(t, l, "down")
		a.awaitState("open")
		h.awaitState("quiet")
		a.mustRole("active")
		refused(a, "the verb overrules vip here")
		h.mustRole("standby")
		refused(h, "the verb overrules vip here") // says the active
		a.mustRole("auto")
		refused(a, "by vip, that of gw-h by verb")
		a.awaitRole("active", "vip")
		h.awaitRole("standby", "verb")
		a.awaitAlarms()
		h.awaitAlarms()
	})
	t.Run("no memory", func(t *testing.T) {
		l := newLab(t, lab.Config{})
		a, h := startVerbs(t, l)
		h.mustRole("standby")
		inTheWay := filepath.Join(filepath.Dir(h.file), "failover-"+h.gw.Device()+".json.new")
		if err := os.Mkdir(inTheWay, 0o700); err != nil {
			t.Fatal(err)
		}
		refused(a, "make state.dir writable")
		a.awaitRole("active", "verb")
		h.awaitRole("standby", "verb")
		if err := os.Remove(inTheWay); err != nil {
			t.Fatal(err)
		}
		await(t, "each hears of the other's role, and the standby has nothing to complain of", func() (bool, string) {
			s := h.status()
			got := a.status().Feed.Nodes[0].Role + " " + s.Feed.Nodes[0].Role + " " + s.Failover.State + s.Failover.Error
			return got == "standby active quiet", got
		})
		if steps, err := a.handover(nil); err != nil {
			t.Errorf("%v: %+v", err, steps)
		}
	})
}

// TestHandoverEnded: what waits for the virtual IP does not wait for whom nobody waits any
// more.
func TestHandoverEnded(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h := startPair(t, l, "down")
	a.awaitState("open")
	h.awaitState("quiet")
	steps, err := a.handover(func() { a.mustRole("active") })
	if got := last(steps); err == nil || got.Step != control.HandoverFailed || !strings.Contains(got.Detail, "wgroam role has ended the handover") {
		t.Errorf("%v: %+v", err, steps)
	}
	a.awaitRole("active", "verb")
}

// TestHandoverOvertaken: a node that was killed when it had handed its role over does not
// take it back from another to which it has gone on.
func TestHandoverOvertaken(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "c"}})
	nodes := startAuto(t, l)
	a, h, c := nodes[0], nodes[1], nodes[2]
	for _, n := range nodes {
		n.mustRole("standby")
	}
	offered := ""
	for _, n := range a.status().Feed.Nodes {
		if n.Name == "gw-"+h.gw.Name {
			offered = n.ID
		}
	}
	// As if it had been killed as soon as the other node had taken the role.
	a.stop()
	path := filepath.Join(filepath.Dir(a.file), "failover-"+a.gw.Device()+".json")
	data, err := os.ReadFile(path)
	must(t, err)
	var memory map[string]any
	must(t, json.Unmarshal(data, &memory))
	memory["offered"] = offered
	data, err = json.Marshal(memory)
	must(t, err)
	must(t, os.WriteFile(path, data, 0o600))
	c.mustRole("active")
	a.run()
	await(t, "it is known what has become of the handover", func() (bool, string) {
		data, err := os.ReadFile(path)
		return err == nil && !strings.Contains(string(data), "offered"), string(data)
	})
	a.awaitRole("standby", "verb")
	c.awaitRole("active", "verb")
}

// TestHandoverKilled: whichever daemon is killed in the middle, in the end one node is
// active, and not both.
func TestHandoverKilled(t *testing.T) {
	t.Parallel()
	rounds := 8
	if lab.InVM() {
		rounds = 4
	}
	l := newLab(t, lab.Config{})
	a, h := startVerbs(t, l)
	for i := range rounds {
		active, standby := a, h
		if a.status().Role != "active" {
			active, standby = h, a
		}
		victim := []*node{active, standby}[i/2%2]
		done := make(chan struct{})
		killed := sync.OnceFunc(func() {
			if err := victim.cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			<-victim.exited
		})
		go func() {
			defer close(done)
			ready := killed
			if i%2 == 1 { // a moment later
				ready = func() { time.AfterFunc(time.Duration(5*i)*time.Millisecond, killed) }
			}
			steps, err := active.handover(ready)
			t.Logf("%d: %s killed: %v %+v", i, victim.gw.Name, err, steps)
		}()
		<-done
		killed()
		victim.run()
		var since time.Time
		await(t, "one active, for long", func() (bool, string) {
			ra, rh := a.status(), h.status()
			if (ra.Role == "active") == (rh.Role == "active") || len(ra.Alarms)+len(rh.Alarms) > 0 ||
				ra.Failover.State == "promoting" || rh.Failover.State == "promoting" {
				since = time.Time{}
			} else if since.IsZero() {
				since = time.Now()
			}
			return !since.IsZero() && time.Since(since) > 4*time.Second, fmt.Sprintf("%s and %s, %v %v", ra.Role, rh.Role, ra.Alarms, rh.Alarms)
		})
		a.awaitNodes(1)
		h.awaitNodes(1)
	}
}

// TestHandoverVRRP: keepalived gives the roles, and is asked to by a check that fails.
func TestHandoverVRRP(t *testing.T) {
	l := newLab(t, lab.Config{})
	var nodes []*node
	var fifos []*os.File
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		path := filepath.Join(dir, "fifo")
		n := startNode(t, gw, dir, roleConfig(gw, dir, "role = \"auto\"\nvrrp = \"VI_1\"", fmt.Sprintf("[keepalived]\nfifo = %q\n", path), others(l, gw)...))
		fifo, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { fifo.Close() })
		nodes, fifos = append(nodes, n), append(fifos, fifo)
	}
	say := func(i int, state string) {
		if _, err := fmt.Fprintf(fifos[i], "INSTANCE \"VI_1\" %s 100\n", state); err != nil {
			t.Error(err)
		}
	}
	check := func(n *node) error {
		return exec.Command(binary(t), "check", "--feed", "--socket", n.socket).Run()
	}
	say(0, "MASTER")
	say(1, "BACKUP")
	for _, n := range nodes {
		n.awaitNodes(1)
	}
	nodes[0].awaitState("open")
	nodes[1].awaitState("quiet")
	// It may come back, where the other keepalived is dead. Then it is not given up again.
	steps, err := nodes[0].handover(func() {
		say(0, "FAULT")
		nodes[0].awaitRole("standby", "vrrp")
		say(0, "MASTER")
	})
	if err == nil || !strings.Contains(last(steps).Detail, "has come back") {
		t.Errorf("%v: %+v", err, steps)
	}
	for from, to := range []int{1, 0} {
		if err := check(nodes[from]); err != nil {
			t.Errorf("%s before: %v", nodes[from].gw.Name, err)
		}
		steps, err := nodes[from].handover(func() {
			if check(nodes[from]) == nil {
				t.Error("keepalived would not prefer the other")
			}
			say(from, "BACKUP")
			say(to, "MASTER")
		})
		if err != nil || last(steps).Step != control.HandoverDone {
			t.Fatalf("%v: %+v", err, steps)
		}
		nodes[to].awaitState("open")
		nodes[from].awaitState("quiet")
		if check(nodes[from]) == nil {
			t.Error("keepalived would prefer the former active again")
		}
		await(t, "the new active has nothing to yield", func() (bool, string) {
			return check(nodes[to]) == nil, nodes[to].status().Failover.Yields
		})
	}
}
