// SPDX-License-Identifier: MIT

package config

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const reference = "../../reference.toml"

func hostname(t *testing.T) string {
	t.Helper()
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	return host
}

func TestForDevice(t *testing.T) {
	got, err := ForDevice("wg0")
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Node: hostname(t),
		Devices: []Device{{
			Name:          "wg0",
			Role:          RoleAlways,
			Standby:       StandbyDown,
			PollInterval:  time.Second,
			SweepInterval: 5 * time.Minute,
		}},
		NATS:          NATS{Heartbeat: 250 * time.Millisecond},
		MaxSkew:       10 * time.Second,
		MaxAge:        720 * time.Hour,
		StateDir:      "/var/lib/wgroam",
		ControlSocket: "/run/wgroam/control.sock",
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := ForDevice("wg0/../wg1"); err == nil || !strings.Contains(err.Error(), `--device "wg0/../wg1"`) {
		t.Errorf("a bad name gives %v", err)
	}
}

// TestReference keeps reference.toml true: what it sets are the defaults, all of
// them, and what it has commented out are the keys without a default.
func TestReference(t *testing.T) {
	file, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}

	var got raw
	if _, err := toml.Decode(string(file), &got); err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.Device[0].Name = "wg0"
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(rawNATS{}, rawEvents{})); diff != "" {
		t.Errorf("defaults and %s differ (-want +got):\n%s", reference, diff)
	}

	plain, err := Load(reference)
	if err != nil {
		t.Fatal(err)
	}
	none, err := ForDevice("wg0")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(none, plain); diff != "" {
		t.Errorf("no file and %s differ (-want +got):\n%s", reference, diff)
	}

	// Prose has a space after the #, settings have none.
	all := regexp.MustCompile(`(?m)^#(\w)`).ReplaceAllString(string(file), "$1")
	var sample raw
	md, err := toml.Decode(all, &sample)
	if err != nil {
		t.Fatal(err)
	}
	known := knownKeys()
	for _, k := range md.Keys() {
		if _, ok := known[k.String()]; !ok {
			t.Errorf("%s has the key %v, which does not exist", reference, k)
		}
		delete(known, k.String())
	}
	for k := range known {
		t.Errorf("%s lacks the key %s", reference, k)
	}
	samples(t, "", reflect.ValueOf(want), reflect.ValueOf(sample))
	p := parser{text: all}
	p.config(sample)
	for _, err := range p.mistakes {
		// All ways to NATS at once, and a role that is fixed: this the samples cannot help.
		if !strings.Contains(err.Error(), ": nats") && !strings.Contains(err.Error(), ": events") &&
			!strings.Contains(err.Error(), ": device.vrrp: the role is fixed") {
			t.Errorf("the samples of %s: %v", reference, err)
		}
	}
}

// samples checks that every key has either a default or a sample.
func samples(t *testing.T, key string, def, sample reflect.Value) {
	t.Helper()
	switch def.Kind() {
	case reflect.Struct:
		for i := range def.NumField() {
			of := key
			if f := def.Type().Field(i); !f.Anonymous {
				of += "." + f.Tag.Get("toml")
			}
			samples(t, of, def.Field(i), sample.Field(i))
		}
	case reflect.Slice:
		if def.Len() > 0 {
			samples(t, key, def.Index(0), sample.Index(0))
		} else if sample.Len() == 0 {
			t.Errorf("%s has no sample of %s", reference, key[1:])
		}
	default:
		// The defaults of these are the empty string and false.
		if sample.IsZero() && key != ".metrics.listen" && sample.Kind() != reflect.Bool {
			t.Errorf("%s has neither default nor sample of %s", reference, key[1:])
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	secret := write("secret", strings.Repeat("s", 40))

	embedded := write("embedded.toml", `
node = "gw-a"
[[device]]
name = "wg0"
role = "auto"
vip = ["203.0.113.10", "2001:db8::10"]
standby = "silent"
secret_file = "`+secret+`"
former_secret_file = "/dev/null"
poll_interval = "250ms"
sweep_interval = "1m"
[[device]]
name = "wg1"
[[device]]
name = "wg1"
netns = "blue"
[[device]]
name = "wg1"
netns = "/run/netns/red"
[[device]]
name = "wg1"
netns = "/proc/1/./ns/net"
[nats]
listen = ":4950"
peers = [
  "10.0.0.12:4950",
  "gw-c.example.net:4950",
  "[2001:db8::13]:4950",
]
heartbeat = "1s"
[feed]
max_skew = "3s"
max_age = "48h"
[state]
dir = "/srv/wgroam/"
[control]
socket = "/srv/wgroam.sock"
[metrics]
listen = "127.0.0.1:9586"
`)
	got, err := Load(embedded)
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Node: "gw-a",
		Devices: []Device{
			{
				Name: "wg0", Role: RoleAuto, Standby: StandbySilent,
				VIP:        []netip.Addr{netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8::10")},
				SecretFile: secret, Secret: []byte(strings.Repeat("s", 40)), FormerSecretFile: "/dev/null",
				PollInterval: 250 * time.Millisecond, SweepInterval: time.Minute,
			},
			{Name: "wg1", Role: RoleAlways, Standby: StandbyDown, PollInterval: time.Second, SweepInterval: 5 * time.Minute},
			{Name: "wg1", Netns: "blue", Role: RoleAlways, Standby: StandbyDown, PollInterval: time.Second, SweepInterval: 5 * time.Minute},
			{Name: "wg1", Netns: "red", Role: RoleAlways, Standby: StandbyDown, PollInterval: time.Second, SweepInterval: 5 * time.Minute},
			{Name: "wg1", Netns: "/proc/1/ns/net", Role: RoleAlways, Standby: StandbyDown, PollInterval: time.Second, SweepInterval: 5 * time.Minute},
		},
		NATS: NATS{
			Listen:    ":4950",
			Peers:     []string{"10.0.0.12:4950", "gw-c.example.net:4950", "[2001:db8::13]:4950"},
			Heartbeat: time.Second,
		},
		MaxSkew:       3 * time.Second,
		MaxAge:        48 * time.Hour,
		StateDir:      "/srv/wgroam",
		ControlSocket: "/srv/wgroam.sock",
		MetricsListen: "127.0.0.1:9586",
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got.NATS.Existing() {
		t.Error("the embedded server passes for an existing one")
	}

	existing := write("existing.toml", `
device = [{name = "wg0"}]
[nats]
url = "tls://a.example.net:4222, tls://b.example.net"
creds = "/etc/wgroam/nats.creds"
tls = {ca = "/etc/ca.pem", cert = "/etc/c.pem", key = "/etc/k.pem"}
[events]
enabled = true
redact = true
`)
	got, err = Load(existing)
	if err != nil {
		t.Fatal(err)
	}
	wantNATS := External{
		URL:   "tls://a.example.net:4222, tls://b.example.net",
		Creds: "/etc/wgroam/nats.creds",
		CA:    "/etc/ca.pem", Cert: "/etc/c.pem", Key: "/etc/k.pem",
	}
	if diff := cmp.Diff(NATS{Heartbeat: 250 * time.Millisecond, External: wantNATS}, got.NATS); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(Events{Enabled: true, Redact: true, External: wantNATS}, got.Events); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !got.NATS.Existing() {
		t.Error("an existing server does not pass for one")
	}

	// What the nodes use is no part of another NATS for the events.
	got, err = Load(write("events.toml", `
device = [{name = "wg0"}]
[nats]
url = "nats://a.example.net"
creds = "/etc/wgroam/nats.creds"
[events]
url = "nats://b.example.net"
nkey = "/etc/wgroam/events.nk"
`))
	if err != nil {
		t.Fatal(err)
	}
	wantEvents := Events{External: External{URL: "nats://b.example.net", NKey: "/etc/wgroam/events.nk"}}
	if diff := cmp.Diff(wantEvents, got.Events); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	short := write("short", strings.Repeat("s", 31))
	for _, tt := range []struct{ name, path, want string }{
		{"no file", filepath.Join(dir, "none.toml"), "none.toml: no such file or directory: create it, or use --device"},
		{"directory", dir, "is a directory"},
		{"endless", "/dev/zero", "/dev/zero is larger than 1048576 bytes"},
		{
			"no secret", write("a.toml", "device=[{name='wg0', secret_file='/nonexistent'}]"),
			"a.toml: device wg0: secret_file: open /nonexistent: no such file or directory",
		},
		{
			"short secret", write("b.toml", "device=[{name='wg0', secret_file='"+short+"'}]"),
			"has 31 bytes, want at least 32: fill it with",
		},
		{
			"same secret", write("d.toml", "device=[{name='wg0', secret_file='"+secret+"', former_secret_file='"+secret+"'}]"),
			"former_secret_file: it holds what is in force: remove the key",
		},
		{
			"no former secret", write("e.toml", "device=[{name='wg0', former_secret_file='/nonexistent'}]"),
			"former_secret_file: open /nonexistent",
		},
		{
			"former secret that is gone", write("former.toml", "device=[{name='wg0', former_secret_file='/nowhere/secret.old'}]"),
			"former_secret_file: open /nowhere/secret.old: no such file or directory: remove the key when the secret is rolled out",
		},
		{
			"endless secret", write("c.toml", "device=[{name='wg0', secret_file='/dev/zero'}]"),
			"secret_file: /dev/zero is larger than 65536 bytes",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if strings.Contains(tt.name, "secret") {
				if c, err := LoadWithoutSecrets(tt.path); err != nil || len(c.Devices) != 1 {
					t.Errorf("without secrets: %+v, %v", c, err)
				}
			}
			c, err := Load(tt.path)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Load gives the error %v, want %q", err, tt.want)
			}
			if !reflect.DeepEqual(c, Config{}) {
				t.Errorf("and the configuration %+v", c)
			}
		})
	}
}

func TestMistakes(t *testing.T) {
	manyVIPs := "203.0.113.0"
	for i := range 16 {
		manyVIPs += "','203.0.113." + strconv.Itoa(i+1)
	}
	const wg0 = "[[device]]\nname='wg0'\n"
	for _, tt := range []struct {
		name, text string
		want       []string // all lines of the error
	}{
		// The language.
		{"not TOML", "node = gw-a\n", []string{`f:1: expected value but found "gw" instead`}},
		{"no end", "\n\nnode = \"gw", []string{`f:3: unexpected EOF; expected '"'`}},
		{"key twice", wg0 + "name='wg1'\n", []string{`f:3: Key 'device.name' has already been defined.`}},

		// Unknown keys.
		{"unknown key", wg0 + "[metrics]\nlitsen=':1'\n", []string{`f:4: metrics.litsen: unknown key: did you mean metrics.listen?`}},
		{"top key in a table", wg0 + "node='a'\n", []string{`f:3: device.node: unknown key: did you mean node?`}},
		{"key of two tables", "listen=':1'\n" + wg0, []string{`f:1: listen: unknown key: did you mean metrics.listen or nats.listen?`}},
		{"upper case", "[[device]]\nName='wg0'\n", []string{
			`f:2: device.Name: unknown key: did you mean device.name?`,
		}},
		{"unknown table", wg0 + "[nat]\nlisten=':1'\nfoo=1\n", []string{`f:3: nat: unknown key: did you mean nats?`}},
		{"nothing near", wg0 + "[completely]\ndifferent=1\n", []string{`f:3: completely: unknown key: remove it; reference.toml has all keys`}},
		{"unknown in the second device", wg0 + "[[device]]\nname='wg1'\n\n# note\nvips=[]\n", []string{`f:7: device.vips: unknown key: did you mean device.vip?`}},
		{"unknown after a long value", wg0 + "vip=[\n '203.0.113.1',\n]\nrule='auto'\n", []string{`f:6: device.rule: unknown key: did you mean device.role?`}},
		{"unknown with a long value", wg0 + "vips=[\n '203.0.113.1',\n]\n", []string{`f:3: device.vips: unknown key: did you mean device.vip?`}},

		// Types.
		{"number for a string", wg0 + "poll_interval=1\n", []string{`f:3: device.poll_interval: want a string, in quotes`}},
		{"type in the first device", "[[device]]\nname='wg0'\nrole=1\n[[device]]\nname='wg1'\nrole='auto'\n", []string{`f:3: device.role: want a string, in quotes`}},
		{"string for an array", wg0 + "vip='203.0.113.1'\n", []string{`f:3: device.vip: want an array of strings: ["...", "..."]`}},
		{"array of numbers", wg0 + "vip=[1]\n", []string{`f:3: device.vip: want an array of strings: ["...", "..."]`}},
		{"string for a table", "nats='x'\n", []string{`f:1: nats: want a table: [nats]`}},
		{"array for a table", wg0 + "[[nats]]\n", []string{`f:3: nats: want a table: [nats]`}},
		{"table for an array", "[device]\nname='wg0'\n", []string{`f:1: device: want an array of tables: [[device]]`}},
		{"dotted device", "device.name='wg0'\n", []string{`f:1: device: want an array of tables: [[device]]`}},
		{"device in a table", "[device.wg0]\nrole='auto'\n", []string{`f:1: device: want an array of tables: [[device]]`}},

		// Values.
		{"no device", "node='a'\n", []string{`f: device: there is no device: add a [[device]] with name = "wg0"`}},
		{"empty", "", []string{`f: device: there is no device: add a [[device]] with name = "wg0"`}},
		{"node", "node='gw a'\n" + wg0, []string{`f:1: node: "gw a" is not a node name: set one of 1 to 64 bytes without spaces`}},
		{"no name", "[[device]]\nrole='auto'\n", []string{`f:1: device.name: "": the device has no name: write that of a WireGuard interface, such as wg0`}},
		{"long name", "[[device]]\nname='wireguard0000000'\n", []string{`f:2: device.name: "wireguard0000000": longer than the 15 bytes of an interface name`}},
		{"slash in name", "[[device]]\nname='wg/0'\n", []string{`f:2: device.name: "wg/0": not an interface name: no slash, colon or space`}},
		{"space in name", "[[device]]\nname='wg 0'\n", []string{`f:2: device.name: "wg 0": not an interface name: no slash, colon or space`}},
		{"device twice", wg0 + "[[device]]\nname='wg0'\n", []string{`f:4: device.name: "wg0" is there twice: keep one, or say in which netns the other is`}},
		{"device twice in a namespace", wg0 + "netns='blue'\n[[device]]\nname='wg0'\nnetns='/var/run/netns/blue'\n", []string{`f:5: device.name: "wg0" is there twice: keep one, or say in which netns the other is`}},
		{"netns, relative", wg0 + "netns='run/blue'\n", []string{`f:3: device.netns: "run/blue" is neither the name of a network namespace, as ip netns shows it, nor an absolute path`}},
		{"netns, parent", wg0 + "netns='..'\n", []string{`f:3: device.netns: ".." is neither the name of a network namespace, as ip netns shows it, nor an absolute path`}},
		{"netns, line end", wg0 + "netns=\"a\\nb\"\n", []string{`f:3: device.netns: "a\nb" is neither the name of a network namespace, as ip netns shows it, nor an absolute path`}},
		{"netns with a zero", wg0 + "netns=\"/a\\u0000b\"\n", []string{`f:3: device.netns: "/a\x00b" is not an absolute path: start it with a slash`}},
		{"role", wg0 + "role='master'\n", []string{`f:3: device.role: "master" is not a role: want active, standby, always or auto`}},
		{"standby", wg0 + "standby='up'\n", []string{`f:3: device.standby: "up" is not a way to stand by: want down or silent`}},
		{"vip prefix", wg0 + "vip=['203.0.113.10/24']\n", []string{`f:3: device.vip: "203.0.113.10/24" is not an IP address: write it without prefix length or port, as 203.0.113.10 or 2001:db8::10`}},
		{"vip loopback", wg0 + "vip=['127.0.0.1']\n", []string{`f:3: device.vip: 127.0.0.1 cannot be the address of a gateway: want a unicast IPv4 or IPv6 address without zone`}},
		{"vip mapped", wg0 + "vip=['::ffff:203.0.113.1']\n", []string{`f:3: device.vip: ::ffff:203.0.113.1 cannot be the address of a gateway: want a unicast IPv4 or IPv6 address without zone`}},
		{"many vips", wg0 + "vip=['" + manyVIPs + "']\n", []string{`f:3: device.vip: 17 addresses, want at most 16`}},
		{"vip twice", wg0 + "vip=['203.0.113.1','203.0.113.1']\n", []string{`f:3: device.vip: 203.0.113.1 is there twice: keep one`}},
		{"vrrp without FIFO", wg0 + "role='auto'\nvrrp='VI_1'\n", []string{`f:4: device.vrrp: there is no way to hear of it: set keepalived.fifo to the path of keepalived's vrrp_notify_fifo`}},
		{"vrrp and a fixed role", wg0 + "vrrp='VI_1'\n[keepalived]\nfifo='/f'\n", []string{`f:3: device.vrrp: the role is fixed: set role = "auto", or remove this key`}},
		{"vrrp, line end", wg0 + "role='auto'\nvrrp=\"a\\nb\"\n[keepalived]\nfifo='/f'\n", []string{`f:4: device.vrrp: "a\nb" is not the name of a VRRP instance or group`}},
		{"FIFO for nobody", wg0 + "[keepalived]\nfifo='/f'\n", []string{`f:4: keepalived.fifo: no device follows it: set device.vrrp to the name of a VRRP instance or group`}},
		{"relative FIFO", wg0 + "role='auto'\nvrrp='a'\n[keepalived]\nfifo='f'\n", []string{`f:6: keepalived.fifo: "f" is not an absolute path: start it with a slash`}},
		{"duration", wg0 + "poll_interval='1'\n", []string{`f:3: device.poll_interval: "1" is not a duration: write "250ms", "10s" or "5m"`}},
		{"short duration", wg0 + "sweep_interval='1ms'\n", []string{`f:3: device.sweep_interval: 1ms is out of range: want 1s to 24h0m0s`}},
		{"rare heartbeat", wg0 + "[nats]\nheartbeat='11s'\n", []string{`f:4: nats.heartbeat: 11s is out of range: want 50ms to 10s`}},
		{"negative duration", wg0 + "[feed]\nmax_skew='-1s'\n", []string{`f:4: feed.max_skew: -1s is out of range: want 10ms to 1h0m0s`}},
		{"age and skew", wg0 + "[feed]\nmax_skew='45m'\nmax_age='1h'\n", []string{`f:5: feed.max_age: 1h0m0s is less than twice feed.max_skew: set at least 1h30m0s, or a smaller max_skew`}},
		{"age and sweeps", wg0 + "sweep_interval='16m'\n[feed]\nmax_age='1h'\n", []string{`f:3: device.sweep_interval: 16m0s is more than a quarter of feed.max_age (1h0m0s), and living peers would be forgotten: set at most 15m0s`}},
		{"short age", wg0 + "[feed]\nmax_age='1m'\n", []string{`f:4: feed.max_age: 1m0s is out of range: want 1h0m0s to 87600h0m0s`}},
		{"relative path", wg0 + "secret_file='secret'\n", []string{`f:3: device.secret_file: "secret" is not an absolute path: start it with a slash`}},
		{"relative socket", wg0 + "[control]\nsocket='./s'\n", []string{`f:4: control.socket: "./s" is not an absolute path: start it with a slash`}},

		// NATS.
		{"listen", wg0 + "[nats]\nlisten='4950'\n", []string{`f:4: nats.listen: "4950" is not host:port: write 10.0.0.11:4950 or [2001:db8::11]:4950`}},
		{"listen port", wg0 + "[nats]\nlisten='10.0.0.1:0'\n", []string{`f:4: nats.listen: "10.0.0.1:0": the port is not a number from 1 to 65535`}},
		{"bare IPv6", wg0 + "[metrics]\nlisten='::1:9586'\n", []string{`f:4: metrics.listen: "::1:9586" is not host:port: write 10.0.0.11:4950 or [2001:db8::11]:4950`}},
		{"peer is a URL", wg0 + "[nats]\npeers=['nats://10.0.0.2:4950']\n", []string{`f:4: nats.peers: "nats://10.0.0.2:4950" is not host:port: write 10.0.0.11:4950 or [2001:db8::11]:4950`}},
		{"peer without host", wg0 + "[nats]\npeers=[':4950']\n", []string{`f:4: nats.peers: ":4950" has no host: write that of the other node`}},
		{"peer empty", wg0 + "[nats]\npeers=['']\n", []string{`f:4: nats.peers: an empty address: remove it`}},
		{"peer twice", wg0 + "[nats]\npeers=['b:1','b:1']\n", []string{`f:4: nats.peers: b:1 is there twice: keep one`}},
		{"own peer", wg0 + "[nats]\nlisten='a:1'\npeers=['a:1','b:1']\n", []string{`f:5: nats.peers: a:1 is this node's own nats.listen: list the other nodes only`}},
		{"url and peers", wg0 + "[nats]\nurl='nats://x'\npeers=['b:1']\n", []string{`f:3: nats: listen and peers are for the embedded server, url and context for an existing one: remove one pair or the other`}},
		{"context and listen", wg0 + "[nats]\ncontext='x'\nlisten='b:1'\n", []string{`f:3: nats: listen and peers are for the embedded server, url and context for an existing one: remove one pair or the other`}},
		{"context and url", wg0 + "[nats]\ncontext='x'\nurl='nats://x'\n", []string{`f:4: nats.context: a context has its own URL: remove url or context`}},
		{"context and creds", wg0 + "[nats]\ncontext='x'\ncreds='/x'\n", []string{`f:5: nats.creds: a context has its own credentials: remove this key or nats.context`}},
		{"creds alone", wg0 + "[nats]\ncreds='/x'\n", []string{`f:4: nats.creds: this is for an existing NATS server: add nats.url, or remove this key (the embedded server needs no credentials)`}},
		{"creds and nkey", wg0 + "[nats]\nurl='nats://x'\ncreds='/x'\nnkey='/y'\n", []string{`f:6: nats.nkey: there are nats.creds already: remove one of the two`}},
		{"cert without key", wg0 + "[nats]\nurl='nats://x'\n[nats.tls]\ncert='/x'\n", []string{`f:5: nats.tls: cert and key belong together: add the other one`}},
		{"url", wg0 + "[nats]\nurl='10.0.0.1:4222'\n", []string{`f:4: nats.url: not a URL: write nats://host:4222, or several with commas between them`}},
		{"url scheme", wg0 + "[nats]\nurl='nats://x,http://y'\n", []string{`f:4: nats.url: "http" is not a scheme of NATS: write nats://host:4222 or tls://host:4222`}},
		{"url port", wg0 + "[nats]\nurl='nats://x:70000'\n", []string{`f:4: nats.url: "70000" is not a port: want 1 to 65535`}},

		{"events of a node alone", wg0 + "[events]\nenabled=true\n", []string{`f:4: events.enabled: there is no NATS that other programs can read from: add events.url or events.context (the server inside wgroam is for the nodes of a group only)`}},
		{"events of an embedded server", wg0 + "[nats]\nlisten=':1'\n[events]\nenabled=true\n", []string{`f:6: events.enabled: there is no NATS that other programs can read from: add events.url or events.context (the server inside wgroam is for the nodes of a group only)`}},
		{"events of another kind", wg0 + "[events]\nenabled='yes'\n", []string{`f:4: events.enabled: want true or false`}},
		{"events context and url", wg0 + "[events]\ncontext='x'\nurl='nats://x'\n", []string{`f:4: events.context: a context has its own URL: remove url or context`}},
		{"events creds alone", wg0 + "[nats]\nurl='nats://x'\n[events]\ncreds='/x'\n", []string{`f:6: events.creds: this is for an existing NATS server: add events.url, or remove this key (the embedded server needs no credentials)`}},

		{"all at once", "[[device]]\nname='wg0'\nrole='x'\nstandby='y'\n[[device]]\nrole='z'\n", []string{
			`f:3: device.role: "x" is not a role: want active, standby, always or auto`,
			`f:4: device.standby: "y" is not a way to stand by: want down or silent`,
			`f:5: device.name: "": the device has no name: write that of a WireGuard interface, such as wg0`,
			`f:6: device.role: "z" is not a role: want active, standby, always or auto`,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Parse("f", []byte(tt.text))
			if err == nil {
				t.Fatalf("no error for\n%s", tt.text)
			}
			if diff := cmp.Diff(tt.want, strings.Split(err.Error(), "\n")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if !reflect.DeepEqual(c, Config{}) {
				t.Errorf("and the configuration %+v", c)
			}
		})
	}
}

// TestMistakesKeepSecrets proves that a password in a URL stays out of errors,
// which end in logs.
func TestMistakesKeepSecrets(t *testing.T) {
	for _, url := range []string{
		"http://user:hunter2@host", "nats://user:hunter2@host:99999", "nats://user:hunter2@", "nats://user:hunter2@ho st", "user:hunter2@host",
	} {
		_, err := Parse("f", []byte("device=[{name='wg0'}]\nnats.url='"+url+"'\n"))
		if err == nil {
			t.Errorf("%s is accepted", url)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error has the password: %v", err)
		}
	}
}

// TestLongFile: a file too long to be searched for lines has errors without.
func TestLongFile(t *testing.T) {
	_, err := Parse("f", []byte("[[device]]\nname='wg0'\nroll='auto'\n"+strings.Repeat("#\n", 2000)))
	if want := "f: device.roll: unknown key: did you mean device.role?"; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	_, err = Parse("f", []byte("node=1\n"+strings.Repeat("#\n", 2000)))
	if err == nil || !strings.Contains(err.Error(), "node") {
		t.Errorf("the error does not name the key: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	file, err := os.ReadFile(reference)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add([]byte("[[device]]\nname='wg0'\n[[device]]\nname='wg1'\nx=[\n1]\n"))
	f.Add([]byte("device=[{name='wg0',vip=['::1%eth0']}]\nnats.tls={ca='/x'}\n"))
	f.Add([]byte("device.name=1\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4096 {
			return // locate is quadratic.
		}
		c, err := Parse("f", data)
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if !strings.HasPrefix(line, "f:") {
					t.Errorf("the error does not begin with the file: %q", line)
				}
			}
			return
		}
		again, err := Parse("f", data)
		if err != nil || !reflect.DeepEqual(c, again) {
			t.Fatalf("%+v, then %+v, %v", c, again, err)
		}
		names := map[[2]string]bool{}
		for _, d := range c.Devices {
			if names[[2]string{d.Name, d.Netns}] || badDeviceName(d.Name) != "" {
				t.Errorf("device %q in %q", d.Name, d.Netns)
			}
			names[[2]string{d.Name, d.Netns}] = true
			if d.PollInterval <= 0 || d.SweepInterval <= 0 {
				t.Errorf("intervals %v, %v", d.PollInterval, d.SweepInterval)
			}
			if slices.ContainsFunc(d.VIP, func(a netip.Addr) bool { return !a.IsValid() || a.Zone() != "" }) {
				t.Errorf("vip %v", d.VIP)
			}
		}
		if len(c.Devices) == 0 || c.Node == "" || c.MaxSkew <= 0 {
			t.Errorf("%+v", c)
		}
		if c.NATS.Existing() && (c.NATS.Listen != "" || len(c.NATS.Peers) > 0) {
			t.Errorf("two ways to NATS: %+v", c.NATS)
		}
	})
}
