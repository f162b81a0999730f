// SPDX-License-Identifier: MIT

package failover

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDecide(t *testing.T) {
	for _, tt := range []struct {
		words    words
		role     Role
		by       Source
		conflict string
	}{
		{words{}, Standby, ByNone, ""},
		{words{wait: true}, "", ByNone, ""},
		{words{wait: true, VIP: Active}, Active, ByVIP, ""},
		{words{wait: true, Verb: Active}, Active, ByVerb, ""},
		{words{VIP: Active, VRRP: Standby}, Standby, ByVRRP, "vip says active"},
		{words{VIP: Active, VRRP: Standby, Verb: Active}, Active, ByVerb, "vrrp says standby"},
		{words{VIP: Standby, VRRP: Standby, Verb: Active}, Active, ByVerb, "vrrp says standby, vip says standby"},
		{words{VIP: Active, VRRP: Active, Verb: Active}, Active, ByVerb, ""},
		{words{Config: Active, VIP: Standby}, Active, ByConfig, "vip says standby"},
		{words{Config: Always, VIP: Standby}, Always, ByConfig, ""},
	} {
		role, by := tt.words.decide()
		if role != tt.role || by != tt.by || tt.words.conflict() != tt.conflict {
			t.Errorf("%+v: %q by %s, conflict %q; want %q by %s, conflict %q", tt.words, role, by, tt.words.conflict(), tt.role, tt.by, tt.conflict)
		}
	}
}

// testDesk returns a desk that logs into the buffer, with a memory in dir.
func testDesk(t *testing.T, dir string, cfg DeskConfig) (*Desk, *bytes.Buffer) {
	t.Helper()
	var err error
	if cfg.Memory, err = OpenMemory(dir, "wg0"); err != nil {
		t.Fatal(err)
	}
	log := new(bytes.Buffer)
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	return NewDesk(cfg), log
}

func (d *Desk) mustSay(t *testing.T, by Source, role Role) {
	t.Helper()
	if err := d.Say(by, role); err != nil {
		t.Fatal(err)
	}
}

func wantRole(t *testing.T, d *Desk, role Role, by Source) {
	t.Helper()
	if r, b, _ := d.Role(); r != role || b != by {
		t.Errorf("the role is %q by %s, want %q by %s", r, b, role, by)
	}
}

// TestDesk: the first source in the order that has spoken decides, and what
// cannot be seen again outlives the daemon.
func TestDesk(t *testing.T) {
	dir := t.TempDir()
	d, log := testDesk(t, dir, DeskConfig{VIP: true, VRRP: true})
	wantRole(t, d, "", ByNone)
	d.mustSay(t, ByVIP, Active)
	wantRole(t, d, Active, ByVIP)
	d.mustSay(t, ByVRRP, Standby)
	wantRole(t, d, Standby, ByVRRP)
	_, _, since := d.Role()
	d.mustSay(t, ByVRRP, Standby)
	if _, _, again := d.Role(); again != since {
		t.Error("a word that was said before began a new role")
	}
	if n := strings.Count(log.String(), "the role has changed"); n != 2 {
		t.Errorf("two changes of the role were logged %d times:\n%s", n, log)
	}

	d, _ = testDesk(t, dir, DeskConfig{VIP: true, VRRP: true})
	wantRole(t, d, Standby, ByVRRP)
	d.mustSay(t, ByVerb, Active)
	d, _ = testDesk(t, dir, DeskConfig{VIP: true, VRRP: true})
	wantRole(t, d, Active, ByVerb)
	d.mustSay(t, ByVerb, "")
	wantRole(t, d, Standby, ByVRRP)

	// What was said to an earlier boot of the host is nothing.
	path := filepath.Join(dir, "failover-wg0.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other := strings.Replace(string(data), d.cfg.Memory.boot, "11111111-2222-3333-4444-555555555555", 1)
	if err := os.WriteFile(path, []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	d, _ = testDesk(t, dir, DeskConfig{})
	wantRole(t, d, Standby, ByNone)

	d, _ = testDesk(t, dir, DeskConfig{Fixed: Active})
	wantRole(t, d, Active, ByConfig)
	if err := d.Say(ByVerb, Standby); !errors.Is(err, ErrFixed) {
		t.Errorf("a fixed role was set: %v", err)
	}
	wantRole(t, d, Active, ByConfig)
}

// TestDeskWaits: until keepalived speaks, the role is not known for a while; what it
// said to an earlier daemon counts until it or the virtual IP speaks.
func TestDeskWaits(t *testing.T) {
	dir := t.TempDir()
	d, log := testDesk(t, dir, DeskConfig{VRRP: true})
	d.look(d.started.Add(vrrpWithin), nil)
	wantRole(t, d, "", ByNone)
	d.look(d.started.Add(vrrpWithin+1), nil)
	wantRole(t, d, Standby, ByNone)
	if len(d.Changed()) != 1 || !strings.Contains(log.String(), "the role has changed") {
		t.Errorf("nobody was told:\n%s", log)
	}

	d, _ = testDesk(t, dir, DeskConfig{VRRP: true})
	d.mustSay(t, ByVRRP, Active)
	d.look(d.started.Add(vrrpWithin+1), nil)
	wantRole(t, d, Active, ByVRRP)

	d, _ = testDesk(t, dir, DeskConfig{VRRP: true, VIP: true})
	wantRole(t, d, Active, ByVRRP)
	d.mustSay(t, ByVIP, Standby)
	wantRole(t, d, Standby, ByVIP)
	if c := d.words.conflict(); c != "" {
		t.Errorf("the conflict %q with an old word", c)
	}
	d.mustSay(t, ByVRRP, Active)
	wantRole(t, d, Active, ByVRRP)
	d.mustSay(t, ByVIP, Active)
	d.mustSay(t, ByVIP, Standby)
	wantRole(t, d, Active, ByVRRP)

	d, _ = testDesk(t, dir, DeskConfig{VRRP: true, VIP: true})
	d.mustSay(t, ByVRRP, Active)
	d.mustSay(t, ByVIP, Standby)
	wantRole(t, d, Active, ByVRRP)

	// keepalived says nothing when a daemon is restarted, and goes on to count, until the
	// virtual IP moves without a word.
	d, _ = testDesk(t, dir, DeskConfig{VRRP: true, VIP: true})
	d.mustSay(t, ByVIP, Active)
	wantRole(t, d, Active, ByVRRP)
	d.mustSay(t, ByVIP, Standby)
	wantRole(t, d, Standby, ByVIP)
	if err := d.cfg.Memory.flush(); err != nil {
		t.Fatal(err)
	}
	d, _ = testDesk(t, dir, DeskConfig{VRRP: true, VIP: true})
	if said := d.Said(ByVRRP); said != "" {
		t.Errorf("the next daemon knows the word %s", said)
	}

	// Nor does a word count that nobody could take back.
	d.mustSay(t, ByVRRP, Active)
	d, _ = testDesk(t, dir, DeskConfig{VIP: true})
	d.mustSay(t, ByVIP, Active)
	wantRole(t, d, Active, ByVIP)
}

// TestMemoryRefused: a file that is not ours is kept, and the daemon goes on.
func TestMemoryRefused(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "failover-wg0@blue%2Fx.json")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := OpenMemory(dir, "wg0@blue/x")
	if m == nil || err == nil {
		t.Fatalf("memory %v, error %v", m, err)
	}
	if data, err := os.ReadFile(path + ".refused"); err != nil || string(data) != "{" {
		t.Errorf("the refused file is %q, error %v", data, err)
	}
	if err := m.keepWords(Active, ""); err != nil {
		t.Fatal(err)
	}
	if m, err = OpenMemory(dir, "wg0@blue/x"); err != nil || m.data.Words.Verb != Active {
		t.Errorf("memory %+v, error %v", m, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.keepWords(Standby, ""); err == nil || !strings.Contains(err.Error(), "state.dir") {
		t.Errorf("a memory that cannot be written: error %v", err)
	}
}

// TestAlarms: each comes up when its condition has held for its time, is said
// once, and goes.
func TestAlarms(t *testing.T) {
	d, log := testDesk(t, t.TempDir(), DeskConfig{VIP: true})
	now := time.Now()
	look := func(after time.Duration, actives ...string) string {
		now = now.Add(after)
		d.look(now, actives)
		var up []string
		for _, r := range d.Alarms() {
			up = append(up, string(r.Alarm)+": "+r.Detail)
		}
		return strings.Join(up, "; ")
	}
	want := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: alarms %q, want %q", what, got, want)
		}
	}
	d.mustSay(t, ByVIP, Active)
	want("at the start", look(0), "")
	d.mustSay(t, ByVRRP, Standby)
	want("a moment of disagreement", look(settle-1), "")
	d.mustSay(t, ByVIP, Standby)
	want("agreement", look(time.Hour), "")

	d.mustSay(t, ByVIP, Active)
	want("disagreement begins", look(0), "")
	const conflict = "conflict: standby by vrrp, but vip says active"
	want("disagreement", look(settle), conflict)
	want("goes on", look(time.Hour), conflict)
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("one alarm was logged %d times:\n%s", n, log)
	}
	d.mustSay(t, ByVRRP, Active)
	want("agreement again", look(1), "")

	want("another active", look(0, "gw-b"), "")
	want("another active for long", look(settle, "gw-b"), "two_actives: also active: gw-b")
	want("a third", look(1, "gw-b", "gw-c"), "two_actives: also active: gw-b, gw-c")
	d.Heard(now)
	want("packets to the active", look(1, "gw-b"), "two_actives: also active: gw-b")
	d.mustSay(t, ByVRRP, Standby)
	d.mustSay(t, ByVIP, Standby)
	want("standby beside an active", look(1, "gw-b"), "")

	d.Heard(time.Now().Add(-time.Hour))
	want("a packet from before", look(1), "")
	d.Heard(time.Now())
	want("a packet before the device is quiet", look(1), "")
	now = time.Now().Add(settle)
	d.Heard(now)
	want("a packet", look(0), "traffic: peers talk to this node")
	want("still remembered", look(trafficFor), "traffic: peers talk to this node")
	want("forgotten", look(1), "")

	const dropped = "traffic: what WireGuard sends comes to this node, and is dropped"
	d.Dropped(strangers-1, now)
	want("a stranger", look(0), "")
	d.Dropped(strangers-1, now.Add(trafficFor+1))
	want("another, later", look(0), "")
	d.Dropped(1, now.Add(trafficFor+1))
	want("peers whose packets are dropped", look(trafficFor), dropped)
	want("forgotten as well", look(trafficFor+2), "")
}
