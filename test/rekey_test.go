// SPDX-License-Identifier: MIT

package test

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/lab"
)

// roamsWhile moves clients, one after the other, until f has returned.
func (w *world) roamsWhile(f func()) (n int) {
	end, done := make(chan struct{}), make(chan error)
	go func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ; ; n++ {
			select {
			case <-end:
				done <- nil
				return
			case <-tick.C:
			}
			if err := w.move(w.lab.Clients[n%len(w.lab.Clients)]); err != nil {
				<-end
				done <- err
				return
			}
		}
	}()
	func() {
		defer close(end) // also when f fails the test
		f()
	}()
	w.must(<-done)
	return n
}

// step does something to a node while clients roam, and then wants all devices
// to be right without anybody speaking.
func (w *world) step(what string, f func()) {
	w.t.Helper()
	n := w.roamsWhile(f) + w.roams(time.Second)
	_, took, lost := w.converge(time.Now())
	repaired := uint64(0)
	for _, node := range w.nodes {
		repaired += node.status().SweepRepairs
	}
	w.t.Logf("%s: %d roams; tables and devices equal after %v; %d lost, %d repaired by the sweep", what, n, took.Round(time.Millisecond), lost, repaired)
	if w.lab.Kernel && repaired != 0 {
		w.t.Errorf("%s: the sweep found %d changes that nobody had told", what, repaired)
	}
}

// inOneGroup waits until all nodes are in step in one group and in no other.
func (w *world) inOneGroup(former string) {
	w.t.Helper()
	for _, n := range w.nodes {
		await(w.t, n.gw.Name+" in step under the new keys", func() (bool, string) {
			s := n.status()
			ok := s.Group != former && s.Group == w.nodes[0].status().Group && len(s.Feed.Nodes) == len(w.nodes)-1
			for _, o := range s.Feed.Nodes {
				ok = ok && !o.Former && o.State == "synced"
			}
			return ok, fmt.Sprintf("%s %+v", s.Group, s.Feed.Nodes)
		})
	}
}

// TestSecretRoll gives a group that has no secret one, node by node, while
// clients roam.
func TestSecretRoll(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}, Clients: 3})
	w := newWorld(t, l)
	former := w.nodes[0].status().Group
	secret := filepath.Join(t.TempDir(), "secret")
	w.must(os.WriteFile(secret, []byte(hex.EncodeToString(key32(t))), 0o600))
	for _, phase := range []struct{ name, keys string }{
		{"in both groups", fmt.Sprintf("secret_file = %q\nformer_secret_file = \"/dev/null\"\n", secret)},
		{"in the new group", fmt.Sprintf("secret_file = %q\n", secret)},
	} {
		for i, n := range w.nodes {
			w.step(n.gw.Name+" "+phase.name, func() {
				n.stop()
				cfg := config(n.gw, filepath.Dir(n.file), others(l, n.gw)...)
				w.nodes[i] = startNode(t, n.gw, filepath.Dir(n.file), strings.Replace(cfg, "[nats]", phase.keys+"[nats]", 1))
			})
		}
	}
	w.inOneGroup(former)
}

func key32(t testing.TB) []byte {
	t.Helper()
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestKeyRoll gives the gateways another private key, one by one, the active
// last and with it the clients. Each daemon is restarted in the middle of it.
func TestKeyRoll(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}, Clients: 3})
	w := &world{t: t, lab: l, places: make(map[wgroam.Key][]place)}
	for i, gw := range l.Gateways {
		dir := t.TempDir()
		cfg := config(gw, dir, others(l, gw)...)
		if i < 2 {
			cfg = strings.Replace(cfg, "poll_interval", "sweep_interval = \"1s\"\npoll_interval", 1)
		}
		w.nodes = append(w.nodes, startNode(t, gw, dir, cfg))
	}
	w.settle()
	former := w.nodes[0].status().Group
	key, err := wgtypes.GeneratePrivateKey()
	w.must(err)
	for _, i := range []int{2, 1, 0} {
		n := w.nodes[i]
		roll := func() {
			w.must(n.gw.WG().ConfigureDevice(n.gw.Device(), wgtypes.Config{PrivateKey: &key}))
			if i == 0 {
				w.must(l.Rekey(key))
			}
		}
		inNewGroup := func() {
			await(t, n.gw.Name+" in the new group", func() (bool, string) {
				g := w.nodes[i].status().Group
				return g != former, g
			})
		}
		if i == 2 {
			// Whose next sweep is in five minutes: it is told no more than that it has to end.
			w.step(n.gw.Name+" has the new key when it is restarted", func() { roll(); n.stop(); w.restart(i); inNewGroup() })
			continue
		}
		w.step(n.gw.Name+" has the new key", func() { roll(); inNewGroup() })
		w.step(n.gw.Name+" was killed", func() { w.kill(i); w.restart(i); inNewGroup() })
	}
	w.inOneGroup(former)
}
