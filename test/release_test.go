// SPDX-License-Identifier: MIT

package test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"

	"github.com/wgroam/wgroam/internal/lab"
)

// tables returns the names of a gateway's nftables tables.
func tables(t testing.TB, gw *lab.Gateway) (names []string) {
	t.Helper()
	err := gw.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		all, err := conn.ListTables()
		for _, table := range all {
			names = append(names, table.Name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// TestRelease: a device is given back as it was, from both ways to stand by and from an
// active, while no daemon runs.
func TestRelease(t *testing.T) {
	for _, mode := range []string{"down", "silent"} {
		l := newLab(t, lab.Config{Clients: 4})
		gw, dir := l.Gateways[0], t.TempDir()
		furnish(t, l, gw)
		before := dumpsOf(t, gw)
		release := func(n *node) string {
			t.Helper()
			var out []byte
			_ = gw.Do(func() (err error) {
				out, err = exec.Command(binary(t), "release", "--config", n.file).CombinedOutput()
				return err // and it is told in out
			})
			return string(out)
		}
		plain := func(what string, n *node) {
			t.Helper()
			if out := release(n); out != gw.Device()+" is as without wgroam\n" {
				t.Fatalf("%s, %s: wgroam release says %q", mode, what, out)
			}
			if diff := cmp.Diff(before, dumpsOf(t, gw)); diff != "" {
				t.Errorf("%s, %s (-before +after):\n%s", mode, what, diff)
			}
			if names := tables(t, gw); len(names) > 0 {
				t.Errorf("%s, %s: the tables %v are left", mode, what, names)
			}
		}
		n := startNode(t, gw, dir, roleConfig(gw, dir, "role = \"auto\"\nvip = [\"192.0.2.77\"]\nstandby = \""+mode+"\"", ""))
		n.awaitState("quiet")
		if out := release(n); !strings.Contains(out, "stop it first") {
			t.Errorf("with a daemon, wgroam release says %q", out)
		}
		n.stop()
		isQuiet(t, gw, mode)
		if len(tables(t, gw)) != 1 {
			t.Error("there is no gate")
		}
		plain("a standby", n)
		plain("what is plain", n)

		n = startNode(t, gw, dir, roleConfig(gw, dir, "role = \"active\"\nvip = [\"192.0.2.77\"]\nstandby = \""+mode+"\"", ""))
		n.awaitState("open")
		if len(tables(t, gw)) != 1 {
			t.Error("there is no gate")
		}
		n.stop()
		plain("an active", n)
	}
}
