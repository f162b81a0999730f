// SPDX-License-Identifier: MIT

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/wgroam/wgroam/internal/lab"
)

// roleConfig is config with more keys for the device, and more tables.
func roleConfig(gw *lab.Gateway, dir, device, tables string, others ...*lab.Gateway) string {
	return strings.Replace(config(gw, dir, others...), "[nats]", device+"\n[nats]", 1) + tables
}

// awaitRole waits for the role that a node has, and who gives it.
func (n *node) awaitRole(role, by string) {
	n.t.Helper()
	await(n.t, fmt.Sprintf("%s is %s by %s", n.gw.Name, role, by), func() (bool, string) {
		s := n.status()
		return s.Role == role && s.RoleBy == by, s.Role + " by " + s.RoleBy
	})
}

// awaitAlarms waits until a node has these alarms and no others.
func (n *node) awaitAlarms(want ...string) {
	n.t.Helper()
	await(n.t, fmt.Sprintf("%s has the alarms %v", n.gw.Name, want), func() (bool, string) {
		var got []string
		for _, a := range n.status().Alarms {
			got = append(got, a.Alarm)
		}
		return strings.Join(got, " ") == strings.Join(want, " "), fmt.Sprint(got)
	})
}

// role runs wgroam role and returns what it prints.
func (n *node) role(args ...string) (string, error) {
	out, err := exec.Command(binary(n.t), append(append([]string{"role"}, args...), "--socket", n.socket)...).CombinedOutput()
	return string(out), err
}

func (n *node) mustRole(word string) {
	n.t.Helper()
	if out, err := n.role(word); err != nil {
		n.t.Fatalf("wgroam role %s: %v: %s", word, err, out)
	}
}

// TestRole: the virtual IP, keepalived's FIFO and the verb give a node its role, in
// that order from the weakest; the other nodes hear of it; and what should not be
// raises an alarm.
func TestRole(t *testing.T) {
	l := newLab(t, lab.Config{})
	var (
		nodes []*node
		fifo  string
	)
	for i, gw := range l.Gateways {
		dir := t.TempDir()
		device := fmt.Sprintf("role = \"auto\"\nvip = [%q, %q]", lab.VIP4, lab.VIP6)
		tables := ""
		if i == 1 {
			fifo = filepath.Join(dir, "fifo")
			device += "\nvrrp = \"VI_1\""
			tables = fmt.Sprintf("[keepalived]\nfifo = %q\n", fifo)
		}
		nodes = append(nodes, startNode(t, gw, dir, roleConfig(gw, dir, device, tables, others(l, gw)...)))
	}
	a, h := nodes[0], nodes[1]
	a.awaitNodes(1)

	// The virtual IP, as long as nobody else has spoken.
	a.awaitRole("active", "vip")
	h.awaitRole("standby", "vip")
	await(t, "a hears of the other's role", func() (bool, string) {
		other := a.status().Feed.Nodes[0]
		return other.Role == "standby", other.Role
	})
	if err := l.MoveVIP(h.gw); err != nil {
		t.Fatal(err)
	}
	h.awaitRole("active", "vip")
	a.awaitRole("standby", "vip")

	// keepalived comes before that.
	keepalived, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer keepalived.Close()
	if _, err := keepalived.WriteString("INSTANCE \"VI_2\" MASTER 100\nINSTANCE \"VI_1\" BACKUP 100\n"); err != nil {
		t.Fatal(err)
	}
	h.awaitRole("standby", "vrrp")
	h.awaitAlarms("conflict")

	// The verb comes before both. Its word is remembered, as keepalived's is.
	h.mustRole("active")
	h.awaitRole("active", "verb")
	h.stop()
	h.run()
	h.awaitRole("active", "verb")
	// What was said to the daemon before does not count beside the virtual IP.
	if _, err := keepalived.WriteString("INSTANCE \"VI_1\" BACKUP 100\n"); err != nil {
		t.Fatal(err)
	}
	a.awaitNodes(1)
	a.mustRole("active")
	a.awaitAlarms("conflict", "two_actives")
	h.awaitAlarms("conflict", "two_actives")
	// An alarm goes for a moment where a heartbeat is late.
	await(t, "wgroam role shows the role and the alarm", func() (bool, string) {
		out, err := h.role()
		return err == nil && strings.Contains(out, h.gw.Device()+"  active by verb") && strings.Contains(out, "two_actives: also active: gw-a"),
			fmt.Sprintf("%v: %s", err, out)
	})
	a.mustRole("standby")
	h.awaitAlarms("conflict")
	h.mustRole("auto")
	h.awaitRole("standby", "vrrp")
	if _, err := keepalived.WriteString("INSTANCE \"VI_1\" MASTER 100\n"); err != nil {
		t.Fatal(err)
	}
	h.awaitRole("active", "vrrp")
	h.awaitAlarms()
	a.awaitAlarms()

	for _, word := range []string{"always", "master"} {
		if out, err := h.role(word); err == nil || !strings.Contains(out, "is not a role to set") {
			t.Errorf("wgroam role %s: %v: %s", word, err, out)
		}
	}
	for _, args := range [][]string{{"active", "--device", "wg9"}, {"--device", "wg9"}} {
		if out, err := h.role(args...); err == nil || !strings.Contains(out, "no device wg9") {
			t.Errorf("wgroam role for a device that is not there: %v: %s", err, out)
		}
	}
}

// TestTraffic: peers that talk to a standby are noticed, though its gate lets nothing in.
func TestTraffic(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		t.Run(mode, func(t *testing.T) {
			l := newLab(t, lab.Config{})
			a, c, dir := l.Gateways[0], l.Clients[0], t.TempDir()
			const listen = "127.0.0.1:9586"
			n := startNode(t, a, dir, roleConfig(a, dir, fmt.Sprintf("role = \"auto\"\nstandby = %q", mode), fmt.Sprintf("[metrics]\nlisten = %q\n", listen)))
			n.mustRole("active")
			n.awaitState("open")
			ping(t, c)
			n.awaitAlarms()
			// The address stays here, as where a route or a cloud leads it to the wrong node.
			n.mustRole("standby")
			n.awaitState("quiet")
			await(t, "the alarm", func() (bool, string) {
				must(t, c.Send(1))
				s := n.status()
				return len(s.Alarms) == 1 && s.Alarms[0].Alarm == "traffic", fmt.Sprintf("%+v", s.Alarms)
			})
			n.says("alarm=traffic")
			n.awaitFinding("role", "traffic")
			raised := regexp.MustCompile(`(?m)^wgroam_role_alarm\{.*alarm="traffic".* 1$`)
			if m, _ := scrape(t, a, listen); !raised.MatchString(m) {
				t.Errorf("the metrics do not say so:\n%s", m)
			}
			n.mustRole("active")
			n.awaitAlarms()
			reach(t, c)
		})
	}
}

// TestRoleFixed: what the configuration fixes, nobody changes.
func TestRoleFixed(t *testing.T) {
	l := newLab(t, lab.Config{})
	dir := t.TempDir()
	n := startNode(t, l.Gateways[0], dir, roleConfig(l.Gateways[0], dir, `role = "active"`, ""))
	n.awaitRole("active", "config")
	for _, args := range [][]string{{"standby"}, {"standby", "--device", l.Gateways[0].Device()}} {
		if out, err := n.role(args...); err == nil || !strings.Contains(out, `set role = "auto"`) {
			t.Errorf("wgroam role %v: %v: %s", args, err, out)
		}
	}
	n.awaitRole("active", "config")
}

// TestRoleNamespace: where the virtual IP was in a namespace is nothing when the
// namespace has lost its name, and looked for anew in the next of that name.
func TestRoleNamespace(t *testing.T) {
	l := newLab(t, lab.Config{})
	a, h := l.Gateways[0], l.Gateways[1]
	blue := netnsName(t, "role")
	attach(t, a, blue)
	dir := t.TempDir()
	n := startNode(t, a, dir, roleConfig(a, dir, fmt.Sprintf("netns = %q\nrole = \"auto\"\nvip = [%q]", blue, lab.VIP4), ""))
	role := func(want, by string) {
		t.Helper()
		await(t, fmt.Sprintf("the role is %s by %s", want, by), func() (bool, string) {
			d := n.devices()[a.Device()+"@"+blue]
			return d.Role == want && d.RoleBy == by, fmt.Sprintf("%s by %s, all %v", d.Role, d.RoleBy, n.devices())
		})
	}
	role("active", "vip")
	unname(t, blue)
	role("unknown", "none")
	attach(t, h, blue)
	role("standby", "vip")
}
