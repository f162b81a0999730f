// SPDX-License-Identifier: MIT

package test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// startPairs starts a node on each gateway of near, which follows its device and, with so much
// more configuration, that of a gateway of far in its namespace. It returns what the latter
// are called.
func startPairs(t *testing.T, near, far *lab.Lab, more string) (nodes []*node, names []string) {
	t.Helper()
	for i, gw := range near.Gateways {
		dir, netns := t.TempDir(), netnsName(t, gw.Name)
		attach(t, far.Gateways[i], netns)
		names = append(names, fmt.Sprintf("%s@%s", far.Gateways[i].Device(), netns))
		second := fmt.Sprintf("[[device]]\nname = %q\nnetns = %q\npoll_interval = \"20ms\"\nsweep_interval = \"1s\"\n%s[nats]", far.Gateways[i].Device(), netns, more)
		nodes = append(nodes, startNode(t, gw, dir, strings.Replace(config(gw, dir, others(near, gw)...), "[nats]", second, 1)))
	}
	return nodes, names
}

// pairInStep waits until the nodes are in step about the devices that are called so.
func pairInStep(t *testing.T, nodes []*node, which ...string) {
	t.Helper()
	for i, n := range nodes {
		await(t, "in step", func() (bool, string) {
			d := n.devices()[which[i]]
			ok := d.State == control.StateUp && len(d.Feed.Nodes) == 1 && d.Feed.Nodes[0].State == control.NodeSynced
			return ok, fmt.Sprintf("%+v", d)
		})
	}
}

// allWays has the first client of a lab roam in each way, and its standby follow.
func allWays(t *testing.T, l *lab.Lab) {
	t.Helper()
	for way := range 3 {
		awaitEndpoint(t, l.Gateways[1], l.Clients[0], roam(t, l.Clients[0], way))
	}
}

// TestTwoDevices: two nodes with two devices each, of two groups, over one server
// in each node. What happens to one device does not concern the other.
func TestTwoDevices(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	near, far := newLab(t, lab.Config{}), newLab(t, lab.Config{})
	nodes, names := startPairs(t, near, far, "")
	home := func(i int) string { return near.Gateways[i].Device() + "@" }
	pairInStep(t, nodes, home(0), home(1))
	pairInStep(t, nodes, names...)
	if a, b := nodes[0].devices()[home(0)].Group, nodes[0].devices()[names[0]].Group; a == b {
		t.Fatalf("two devices, one group: %s", a)
	}
	roams := func(l *lab.Lab) { t.Helper(); allWays(t, l) }
	for _, l := range []*lab.Lab{near, far} {
		ping(t, l.Clients[0])
	}
	roams(near)
	roams(far)
	if got, err := near.Gateways[1].Endpoints(); err != nil || len(got) != 1 {
		t.Errorf("the standby's first device has %v, %v", got, err)
	}

	// One goes, and comes back empty.
	since := nodes[1].devices()[home(1)].Feed.Connections
	if err := far.Gateways[1].Recreate(); err != nil {
		t.Fatal(err)
	}
	roams(near)
	awaitEndpoint(t, far.Gateways[1], far.Clients[0], far.Clients[0].Endpoint())
	roams(far)
	for i, c := range nodes[1].devices()[home(1)].Feed.Connections {
		if !c.Connected || !c.Since.Equal(since[i].Since) {
			t.Errorf("a connection of the other device: %+v, was %+v", c, since[i])
		}
	}

	// One gets the key of the other, which would make them one group.
	d, err := near.Gateways[0].WG().Device(near.Gateways[0].Device())
	if err != nil {
		t.Fatal(err)
	}
	if err := far.Gateways[0].WG().ConfigureDevice(far.Gateways[0].Device(), wgtypes.Config{PrivateKey: &d.PrivateKey}); err != nil {
		t.Fatal(err)
	}
	await(t, "the second device refused", func() (bool, string) {
		d := nodes[0].devices()[names[0]]
		return strings.Contains(d.LastError, "same private key as another device of this node"), d.LastError
	})
	roams(near)
}

// TestOneKey: two devices of a node that have one private key are two groups where one of
// them has a secret, too, and else one is refused.
func TestOneKey(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	near, far := newLab(t, lab.Config{}), newLab(t, lab.Config{})
	d, err := near.Gateways[0].WG().Device(near.Gateways[0].Device())
	if err != nil {
		t.Fatal(err)
	}
	// And one peer: the first client of near.
	both := wgtypes.PeerConfig{PublicKey: wgtypes.Key(near.Clients[0].Key())}
	for _, gw := range far.Gateways {
		if err := gw.WG().ConfigureDevice(gw.Device(), wgtypes.Config{PrivateKey: &d.PrivateKey, Peers: []wgtypes.PeerConfig{both}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := far.Rekey(d.PrivateKey); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, key32(t), 0o600); err != nil {
		t.Fatal(err)
	}
	line := fmt.Sprintf("secret_file = %q\n", secret)
	nodes, names := startPairs(t, near, far, line)
	home := []string{near.Gateways[0].Device() + "@", near.Gateways[1].Device() + "@"}
	pairInStep(t, nodes, home...)
	pairInStep(t, nodes, names...)
	if a, b := nodes[0].devices()[home[0]].Group, nodes[0].devices()[names[0]].Group; a == b {
		t.Fatalf("a secret, and still one group: %s", a)
	}
	for _, l := range []*lab.Lab{near, far} {
		ping(t, l.Clients[0])
		allWays(t, l)
	}
	if ep, err := far.Gateways[1].Endpoint(near.Clients[0].Key()); err != nil || ep.IsValid() {
		t.Errorf("what the first device saw is in the second: %v, %v", ep, err)
	}

	// Without the secret.
	n := nodes[0]
	n.stop()
	cfg, err := os.ReadFile(n.file)
	if err != nil {
		t.Fatal(err)
	}
	nodes[0] = startNode(t, n.gw, filepath.Dir(n.file), strings.Replace(string(cfg), line, "", 1))
	await(t, "one of them refused", func() (bool, string) {
		var up int
		var said string
		for _, d := range nodes[0].devices() {
			if d.State == control.StateUp {
				up++
			}
			said += d.LastError
		}
		return up == 1 && strings.Contains(said, "give each its own key, or a secret_file of its own"), fmt.Sprintf("%d up: %s", up, said)
	})
}

// TestTwoDaemons: two daemons follow one device, from one namespace. Neither takes anything
// from the other, however it ends.
func TestTwoDaemons(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h, c := l.Gateways[0], l.Gateways[1], l.Clients[0]
	first, second := netip.AddrPortFrom(a.Addr4, 4950), netip.AddrPortFrom(a.Addr4, 4951)
	dirs := []string{t.TempDir(), t.TempDir(), t.TempDir()}
	twin := strings.NewReplacer(`node = "gw-a"`, `node = "gw-b"`, first.String(), second.String())
	cfgs := []string{
		strings.Replace(config(a, dirs[0], h), "peers = [", fmt.Sprintf("peers = [%q, ", second), 1),
		strings.Replace(twin.Replace(config(a, dirs[1], h)), "peers = [", fmt.Sprintf("peers = [%q, ", first), 1),
		strings.Replace(config(h, dirs[2], a), "peers = [", fmt.Sprintf("peers = [%q, ", second), 1),
	}
	var nodes []*node
	for i, gw := range []*lab.Gateway{a, a, h} {
		nodes = append(nodes, startNode(t, gw, dirs[i], cfgs[i]))
	}
	inStep := func() {
		t.Helper()
		for _, n := range nodes {
			n.awaitNodes(2)
		}
	}
	inStep()
	ping(t, c)
	roams := func() {
		t.Helper()
		allWays(t, l)
	}
	roams()
	for i, end := range []func(*node){
		func(n *node) { n.kill() },
		func(n *node) { n.stop() },
	} {
		end(nodes[i])
		roams() // which only the other one sees
		nodes[i] = startNode(t, a, dirs[i], cfgs[i])
		inStep()
		roams()
	}

	// What they cannot share.
	dir := t.TempDir()
	cfg := strings.NewReplacer(`node = "gw-a"`, `node = "gw-c"`, ":4950\"\npeers", ":4952\"\npeers", filepath.Join(dirs[0], "control.sock"), filepath.Join(dir, "control.sock")).Replace(cfgs[0])
	fourth := &node{gw: a, socket: filepath.Join(dir, "control.sock"), file: filepath.Join(dir, "wgroam.toml")}
	if err := os.WriteFile(fourth.file, []byte(cfg), 0o600); err != nil {
		t.Fatal(err)
	}
	fourth.process = start(t, a, nil, "run", "--config", fourth.file)
	fourth.says("give each a state.dir of its own")
	third := start(t, a, nil, "run", "--config", nodes[0].file)
	select {
	case <-third.exited:
	case <-time.After(patience):
		t.Fatal("a second daemon with the same control socket goes on")
	}
	if out := third.stderr.String(); third.err == nil || !strings.Contains(out, "control.sock") || !strings.Contains(out, "in use") {
		t.Errorf("a second daemon with the same control socket: %v, %s", third.err, out)
	}
	roams()
}
