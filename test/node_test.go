// SPDX-License-Identifier: MIT

package test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// patience bounds every wait. Emulated machines are slow; none waits this long
// in health.
const patience = 30 * time.Second

// binary returns the wgroam to test: the one on the PATH, where make puts it.
func binary(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("wgroam")
	if err != nil {
		t.Fatalf("no wgroam on the PATH: run the tests with make: %v", err)
	}
	return path
}

// newLab returns a lab that ends with the test.
func newLab(t testing.TB, cfg lab.Config) *lab.Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("network namespaces need root")
		}
		t.Skip("network namespaces need root")
	}
	l, err := lab.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// needKernel skips a test that is about kernel WireGuard on a kernel without.
func needKernel(t testing.TB, l *lab.Lab) {
	t.Helper()
	if !l.Kernel {
		t.Skip("the kernel has no WireGuard")
	}
}

// await returns when cond says true, and fails the test with what it said last
// if that takes too long.
func await(t testing.TB, what string, cond func() (bool, string)) {
	t.Helper()
	awaitFor(t, patience, what, cond)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// awaitFor is await where more patience is due.
func awaitFor(t testing.TB, patience time.Duration, what string, cond func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, state := cond()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %v: %s", what, patience, state)
		}
		<-tick.C
	}
}

// buffer collects the output of a process.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// process is a wgroam, or another program, in a gateway's namespace.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	stdout buffer // of those that are confined
	stderr buffer
	exited chan struct{}
	err    error
}

func start(t testing.TB, gw *lab.Gateway, stdout *os.File, args ...string) *process {
	t.Helper()
	cmd := exec.Command(binary(t), args...)
	if stdout != nil {
		cmd.Stdout = stdout
	}
	return startCommand(t, gw, cmd)
}

// startCommand starts any program, which has to end on SIGTERM.
func startCommand(t testing.TB, gw *lab.Gateway, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, exited: make(chan struct{})}
	p.cmd.Stderr = &p.stderr
	if err := gw.Start(p.cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("%s on %s:\n%s", strings.Join(cmd.Args, " "), gw.Name, &p.stderr)
		}
	})
	return p
}

// stop asks the process to end and returns how long that took.
func (p *process) stop() time.Duration {
	p.t.Helper()
	began := time.Now()
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.exited:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		p.t.Errorf("%v does not end on SIGTERM", p.cmd.Args)
	}
	return time.Since(began)
}

// kill leaves the process no time for anything.
func (p *process) kill() {
	p.t.Helper()
	must(p.t, p.cmd.Process.Kill())
	<-p.exited
}

// says waits until the process has written text to stderr.
func (p *process) says(text string) {
	p.t.Helper()
	await(p.t, fmt.Sprintf("%v says %q", p.cmd.Args, text), func() (bool, string) {
		out := p.stderr.String()
		select {
		case <-p.exited:
			if !strings.Contains(out, text) {
				p.t.Fatalf("%v ended (%v) without saying %q:\n%s", p.cmd.Args, p.err, text, out)
			}
		default:
		}
		return strings.Contains(out, text), out
	})
}

// node is a daemon on a gateway.
type node struct {
	*process
	gw     *lab.Gateway
	socket string
	file   string
}

// config returns a configuration of gw as a member of a mesh of embedded
// servers.
func config(gw *lab.Gateway, dir string, others ...*lab.Gateway) string {
	var peers []string
	for _, o := range others {
		peers = append(peers, fmt.Sprintf("%q", netip.AddrPortFrom(o.Addr4, 4950)))
	}
	return fmt.Sprintf(`
node = "gw-%s"
[[device]]
name = %q
poll_interval = "20ms"
[nats]
listen = "%s:4950"
peers = [%s]
[state]
dir = %q
[control]
socket = %q
`, gw.Name, gw.Device(), gw.Addr4, strings.Join(peers, ", "), dir, filepath.Join(dir, "control.sock"))
}

// run starts wgroam again.
func (n *node) run() {
	n.t.Helper()
	n.process = start(n.t, n.gw, nil, "run", "--config", n.file)
	n.says("following endpoint changes")
}

// startNode starts a daemon on gw with the given configuration; config makes
// one.
func startNode(t testing.TB, gw *lab.Gateway, dir, cfg string) *node {
	t.Helper()
	n := &node{gw: gw, socket: filepath.Join(dir, "control.sock"), file: filepath.Join(dir, "wgroam.toml")}
	if err := os.WriteFile(n.file, []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	n.process = start(t, gw, nil, "run", "--config", n.file)
	n.says("following endpoint changes")
	return n
}

// startMesh starts a daemon on every gateway of a lab and waits until they hear
// each other.
func startMesh(t testing.TB, l *lab.Lab) []*node {
	t.Helper()
	nodes := make([]*node, len(l.Gateways))
	for i, gw := range l.Gateways {
		dir := t.TempDir()
		nodes[i] = startNode(t, gw, dir, config(gw, dir, others(l, gw)...))
	}
	for _, n := range nodes {
		n.awaitNodes(len(nodes) - 1)
	}
	return nodes
}

func others(l *lab.Lab, gw *lab.Gateway) []*lab.Gateway {
	var out []*lab.Gateway
	for _, o := range l.Gateways {
		if o != gw {
			out = append(out, o)
		}
	}
	return out
}

func (n *node) status() control.DeviceStatus {
	n.t.Helper()
	s := n.whole()
	if len(s.Devices) != 1 {
		n.t.Fatalf("status has %d devices, want 1", len(s.Devices))
	}
	return s.Devices[0]
}

// whole returns all that the node says of itself.
func (n *node) whole() control.Status {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var s control.Status
	if err := control.Get(ctx, n.socket, control.VerbStatus, &s); err != nil {
		n.t.Fatal(err)
	}
	return s
}

// awaitRung waits until the node follows its device by that rung, for a reason
// that contains why.
func (n *node) awaitRung(rung, why string) {
	n.t.Helper()
	await(n.t, "detector "+rung, func() (bool, string) {
		d := n.status().Detector
		return d.Rung == rung && strings.Contains(d.Reason, why), fmt.Sprintf("%+v", d)
	})
}

// awaitNodes waits until the node is in step with so many others.
func (n *node) awaitNodes(count int) {
	n.t.Helper()
	await(n.t, fmt.Sprintf("%s in step with %d nodes", n.gw.Name, count), func() (bool, string) {
		s := n.status()
		synced := 0
		for _, o := range s.Feed.Nodes {
			if o.State == control.NodeSynced {
				synced++
			}
		}
		return synced == count, fmt.Sprintf("%+v", s.Feed)
	})
}

// watcher is a running wgroam watch --json and what it has printed.
type watcher struct {
	*process
	mu         sync.Mutex
	events     []control.Event
	promotions []control.Promotion
}

// watch starts wgroam watch on gw and waits until it watches.
func watch(t testing.TB, gw *lab.Gateway, args ...string) *watcher {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	watch := &watcher{}
	watch.process = start(t, gw, w, append([]string{"watch", "--json", "--device", gw.Device()}, args...)...)
	w.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer r.Close()
		for lines := bufio.NewScanner(r); lines.Scan(); {
			var l struct {
				control.Event
				Promotion *control.Promotion `json:"promotion"`
			}
			dec := json.NewDecoder(bytes.NewReader(lines.Bytes()))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&l); err != nil {
				t.Errorf("watch printed %q: %v", lines.Text(), err)
			}
			watch.mu.Lock()
			if l.Promotion != nil {
				watch.promotions = append(watch.promotions, *l.Promotion)
			} else {
				watch.events = append(watch.events, l.Event)
			}
			watch.mu.Unlock()
		}
	}()
	t.Cleanup(func() { watch.stop(); <-done })
	return watch
}

func (w *watcher) seen() []control.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]control.Event(nil), w.events...)
}

// awaitPromotion waits until watch shows that a promotion has ended, and checks that it
// has shown the beginning as well.
func (w *watcher) awaitPromotion(want control.Promotion) {
	w.t.Helper()
	await(w.t, "watch shows the end of the promotion", func() (bool, string) {
		w.mu.Lock()
		defer w.mu.Unlock()
		n := len(w.promotions)
		return n > 0 && cmp.Equal(w.promotions[n-1], want), fmt.Sprintf("%+v, want %+v", w.promotions, want)
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	if first := (control.Promotion{Began: want.Began}); !slices.Contains(w.promotions, first) {
		w.t.Errorf("watch shows %+v, want %+v first", w.promotions, first)
	}
}

// find waits for the event that brought peer to ep, among those after the first
// skip, and returns it.
func (w *watcher) find(peer wgroam.Key, ep netip.AddrPort, skip int) control.Event {
	w.t.Helper()
	var found control.Event
	await(w.t, fmt.Sprintf("watch shows %v at %v", peer, ep), func() (bool, string) {
		events := w.seen()
		for _, e := range events[min(skip, len(events)):] {
			if e.Peer == peer && e.New == ep {
				found = e
				return true, ""
			}
		}
		return false, fmt.Sprintf("%d events: %+v", len(events), events[max(0, len(events)-3):])
	})
	return found
}

// awaitEndpoint waits until gw holds ep for a client.
func awaitEndpoint(t testing.TB, gw *lab.Gateway, c *lab.Client, ep netip.AddrPort) {
	t.Helper()
	await(t, fmt.Sprintf("%s holds %v", gw.Name, ep), func() (bool, string) {
		got, err := gw.Endpoint(c.Key())
		if err != nil {
			t.Fatal(err)
		}
		return got == ep, got.String()
	})
}

// ping makes sure that a client has a session with whoever holds the virtual IP.
func ping(t testing.TB, c *lab.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		try, stop := context.WithTimeout(ctx, 2*time.Second)
		_, err := c.Ping(try)
		stop()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// roam moves a client in one of the three ways and lets it speak. It returns the
// new endpoint.
func roam(t testing.TB, c *lab.Client, way int) netip.AddrPort {
	t.Helper()
	var (
		ep  netip.AddrPort
		err error
	)
	switch way % 3 {
	case 0:
		ep, err = c.RoamPort()
	case 1:
		ep, err = c.RoamAddress()
	case 2:
		ep, err = c.RoamFamily()
	}
	if err == nil {
		err = c.Send(1)
	}
	if err != nil {
		t.Fatal(err)
	}
	return ep
}
