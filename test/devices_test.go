// SPDX-License-Identifier: MIT

package test

import (
	"fmt"
	"strings"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// TestTwoDevices: two nodes with two devices each, of two groups, over one server
// in each node. What happens to one device does not concern the other.
func TestTwoDevices(t *testing.T) {
	if lab.InVM() {
		t.Skip("nothing here depends on the kernel, and this one is emulated")
	}
	// The devices of the second lab are in other namespaces than the daemons.
	near, far := newLab(t, lab.Config{}), newLab(t, lab.Config{})
	var nodes []*node
	var names []string
	for i, gw := range near.Gateways {
		dir, netns := t.TempDir(), netnsName(t, gw.Name)
		attach(t, far.Gateways[i], netns)
		names = append(names, fmt.Sprintf("%s@%s", far.Gateways[i].Device(), netns))
		second := fmt.Sprintf("[[device]]\nname = %q\nnetns = %q\npoll_interval = \"20ms\"\nsweep_interval = \"1s\"\n[nats]", far.Gateways[i].Device(), netns)
		nodes = append(nodes, startNode(t, gw, dir, strings.Replace(config(gw, dir, others(near, gw)...), "[nats]", second, 1)))
	}
	home := func(i int) string { return near.Gateways[i].Device() + "@" }
	inStep := func(which ...string) {
		t.Helper()
		for i, n := range nodes {
			await(t, "in step", func() (bool, string) {
				d := n.devices()[which[i]]
				ok := d.State == control.StateUp && len(d.Feed.Nodes) == 1 && d.Feed.Nodes[0].State == control.NodeSynced
				return ok, fmt.Sprintf("%+v", d)
			})
		}
	}
	inStep(home(0), home(1))
	inStep(names...)
	if a, b := nodes[0].devices()[home(0)].Group, nodes[0].devices()[names[0]].Group; a == b {
		t.Fatalf("two devices, one group: %s", a)
	}
	roams := func(l *lab.Lab) {
		t.Helper()
		for way := range 3 {
			ep := roam(t, l.Clients[0], way)
			awaitEndpoint(t, l.Gateways[1], l.Clients[0], ep)
		}
	}
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
