// SPDX-License-Identifier: MIT

package test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/wgroam/wgroam/internal/lab"
)

// runAll runs the tests, and removes what daemons with the default configuration
// leave behind.
func runAll(m *testing.M) (status int) {
	const state = "/var/lib/wgroam"
	_, err := os.Stat(state)
	status = m.Run()
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.RemoveAll(state); err != nil {
			fmt.Fprintln(os.Stderr, err)
			status = 1
		}
	}
	return status
}

// TestPowerCycle: all gateways lose power at once, with their WireGuard devices
// and daemons, and know where the clients are when they come back.
func TestPowerCycle(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 3})
	nodes := startMesh(t, l)
	for i, c := range l.Clients {
		ping(t, c)
		ep := roam(t, c, i)
		awaitEndpoint(t, l.Gateways[1], c, ep)
	}
	for i, n := range nodes {
		// One of them has no time to write.
		if i == 0 {
			n.kill()
		}
		n.stop()
		if err := n.gw.Recreate(); err != nil {
			t.Fatal(err)
		}
		if eps, err := n.gw.Endpoints(); err != nil || len(eps) != 0 {
			t.Fatalf("a new device has endpoints %v, %v", eps, err)
		}
	}
	// The one that was killed begins alone: what it has not written it does not know.
	for _, i := range []int{1, 0} {
		n := nodes[i]
		cfg, err := os.ReadFile(n.file)
		if err != nil {
			t.Fatal(err)
		}
		nodes[i] = startNode(t, n.gw, filepath.Dir(n.file), string(cfg))
		for _, c := range l.Clients {
			awaitEndpoint(t, n.gw, c, c.Endpoint())
		}
	}
	for _, n := range nodes {
		if s := n.status(); s.Snapshot.Error != "" || s.LastError != "" {
			t.Errorf("%s: %+v", n.gw.Name, s)
		}
	}
}

// TestPowerCut: all gateways lose power at once while clients roam. What they knew when
// they last wrote it, ten seconds before at most, they know when they come back, and of all
// the rest as soon as the clients have spoken.
func TestPowerCut(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	// A file is written every ten seconds while something changes (snapshot.go, every).
	const written, writing = 10 * time.Second, time.Second
	w := newWorld(t, newLab(t, lab.Config{Clients: 5}))
	n := w.roams(written + 2*writing)
	cut := time.Now()
	for i := range w.nodes {
		w.kill(i)
	}
	for _, n := range w.nodes {
		w.must(n.gw.Recreate())
	}
	for i := range w.nodes {
		w.restart(i)
	}
	behind, took, lost := w.converge(cut.Add(-written - writing))
	t.Logf("%d roams; %d updates of before the last %v behind at the start, equal %v later; %d lost", n, behind, written, took.Round(time.Millisecond), lost)
	young, _ := w.missing(cut)
	for _, c := range w.lab.Clients {
		w.must(c.Forget())
	}
	w.rest(w.lab.Clients)
	_, took, lost = w.converge(time.Now())
	t.Logf("%d updates of the last %v behind until clients spoke, equal %v later; %d lost", young, written, took.Round(time.Millisecond), lost)
}
