// SPDX-License-Identifier: MIT

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/config"
)

func TestCheckFiles(t *testing.T) {
	dir := t.TempDir()
	about := []finding{
		{Device: "wg0", Check: "device"}, {Device: "wg0", Check: "failover"},
		{Device: "wg1", Netns: "blue", Check: "failover"}, {Device: "wg2", Check: "failover"},
	}
	for text, saves := range map[string]bool{
		"[Interface]\nSaveConfig = true\n":  true,
		"[Interface]\n saveconfig=true # x": true,
		"[Interface]\nSaveConfig = True":    true,
		"SaveConfig = false\n":              false,
		"# SaveConfig = true\n":             false,
		"SaveConfig = yes":                  false,
		"":                                  false,
	} {
		for _, name := range []string{"wg0", "wg1"} {
			if err := os.WriteFile(filepath.Join(dir, name+".conf"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got := checkFiles(dir, about)
		if (len(got) == 1) != saves || len(got) > 1 || saves && (got[0].Device != "wg0" || got[0].State != checkFail || got[0].Do == "") {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func TestCompared(t *testing.T) {
	peer := func(n, ips, psk int) wgroam.Setup {
		return wgroam.Setup{Peer: wgroam.Key{0, byte(n), byte(n >> 8)}, AllowedIPs: uint64(ips), PresharedKey: uint64(psk)}
	}
	var many []wgroam.Setup
	for n := range 5000 {
		many = append(many, peer(n, n, 1))
	}
	for name, c := range map[string]struct {
		here, there []wgroam.Setup
		state, want string
	}{
		"equal": {[]wgroam.Setup{peer(1, 1, 1)}, []wgroam.Setup{peer(1, 1, 1)}, checkOK, "1, set up as on gw-b"},
		"all": {
			[]wgroam.Setup{peer(1, 1, 1), peer(2, 2, 5), peer(3, 3, 4)}, []wgroam.Setup{peer(1, 7, 1), peer(2, 2, 7), peer(4, 1, 2)},
			checkFail, "not as on gw-b (3 peers here, 3 there): 1 missing here, 1 missing there, 1 allowed-ips, 1 preshared-key",
		},
		"too many": {nil, many, checkFail, "missing here, and more: that is "},
	} {
		here, there := wgroam.NewSetups(0, c.here), wgroam.NewSetups(0, c.there)
		ask := here.Digests()
		r := rehearsal{d: &device{cfg: config.Device{Name: "wg0"}}}
		r.compared("gw-b", here, there.Differing(&ask, 1000))
		if len(r.out) != 1 || r.out[0].State != c.state || !strings.Contains(r.out[0].Detail, c.want) {
			t.Errorf("%s: %+v, want %s %q", name, r.out, c.state, c.want)
		}
	}
}

// TestPorts: after a failover peers send to the port of the other node.
func TestPorts(t *testing.T) {
	for _, c := range []struct {
		role         config.Role
		ours, theirs int
		state        string // empty for nothing to say
	}{
		{config.RoleAuto, 51820, 51820, ""},
		{config.RoleAuto, 51820, 0, ""}, // a former version
		{config.RoleAuto, 51820, 41234, checkFail},
		{config.RoleAlways, 51820, 41234, checkWarn},
	} {
		r := rehearsal{d: roleDevice(t, config.Device{Role: c.role})}
		r.port("gw-b", c.ours, c.theirs)
		switch {
		case c.state == "" && r.out == nil:
		case len(r.out) == 1 && r.out[0].State == c.state && r.out[0].Check == "peers":
		default:
			t.Errorf("%+v: %+v", c, r.out)
		}
	}
}
