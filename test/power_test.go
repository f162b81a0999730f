// SPDX-License-Identifier: MIT

package test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

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
			if err := n.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			<-n.exited
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
