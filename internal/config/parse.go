// SPDX-License-Identifier: MIT

package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/BurntSushi/toml"
)

// The types named raw are the file as it is written. An empty value, like a
// missing one, stands for the default.
type raw struct {
	Node   string      `toml:"node"`
	Device []rawDevice `toml:"device"`
	NATS   rawNATS     `toml:"nats"`
	Events rawEvents   `toml:"events"`
	Feed   rawFeed     `toml:"feed"`

	Keepalived rawKeepalived `toml:"keepalived"`

	State   rawState   `toml:"state"`
	Control rawControl `toml:"control"`
	Metrics rawMetrics `toml:"metrics"`
}

type rawDevice struct {
	Name          string   `toml:"name"`
	Netns         string   `toml:"netns"`
	Role          string   `toml:"role"`
	VIP           []string `toml:"vip"`
	VRRP          string   `toml:"vrrp"`
	Standby       string   `toml:"standby"`
	SecretFile    string   `toml:"secret_file"`
	FormerSecret  string   `toml:"former_secret_file"`
	PollInterval  string   `toml:"poll_interval"`
	SweepInterval string   `toml:"sweep_interval"`
}

type rawNATS struct {
	Listen    string   `toml:"listen"`
	Peers     []string `toml:"peers"`
	Heartbeat string   `toml:"heartbeat"`
	rawExternal
}

type rawEvents struct {
	Enabled bool `toml:"enabled"`
	Redact  bool `toml:"redact"`
	rawExternal
}

type rawExternal struct {
	URL     string `toml:"url"`
	Context string `toml:"context"`
	Creds   string `toml:"creds"`
	NKey    string `toml:"nkey"`
	TLS     rawTLS `toml:"tls"`
}

type rawTLS struct {
	CA   string `toml:"ca"`
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

type rawFeed struct {
	MaxSkew string `toml:"max_skew"`
	MaxAge  string `toml:"max_age"`
}

type rawKeepalived struct {
	FIFO string `toml:"fifo"`
}

type rawState struct {
	Dir string `toml:"dir"`
}

type rawControl struct {
	Socket string `toml:"socket"`
}

type rawMetrics struct {
	Listen string `toml:"listen"`
}

// defaults holds the value of every key that has one, but the node's, which is
// the host name. The device stands for all.
func defaults() raw {
	return raw{
		Device: []rawDevice{{
			Role:          string(RoleAlways),
			Standby:       string(StandbyDown),
			PollInterval:  "1s",
			SweepInterval: "5m",
		}},
		NATS:    rawNATS{Heartbeat: "250ms"},
		Feed:    rawFeed{MaxSkew: "10s", MaxAge: "720h"},
		State:   rawState{Dir: "/var/lib/wgroam"},
		Control: rawControl{Socket: "/run/wgroam/control.sock"},
	}
}

const (
	maxFile   = 1 << 20 // bytes of configuration
	minSecret = 32
	maxSecret = 64 << 10
)

// maxVIPs bounds the virtual IPs of a device: the kernel cannot tell of a rule that has too
// many.
const maxVIPs = 16

// Load reads the configuration file at path and the secret files that it
// names. The error has a line per mistake, each with the file's name, the line
// number where there is one, the key, and what to do about it.
func Load(path string) (Config, error) {
	c, err := LoadWithoutSecrets(path)
	if err != nil {
		return Config{}, err
	}
	for i := range c.Devices {
		d := &c.Devices[i]
		if d.SecretFile != "" {
			if d.Secret, err = readSecret(d.SecretFile); err != nil {
				return Config{}, fmt.Errorf("%s: device %s: secret_file: %w", path, d.Name, err)
			}
		}
		if d.FormerSecretFile != "" && d.FormerSecretFile != os.DevNull {
			if d.FormerSecret, err = readSecret(d.FormerSecretFile); err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					err = fmt.Errorf("%w: remove the key when the secret is rolled out, or write /dev/null where there was none", err)
				}
				return Config{}, fmt.Errorf("%s: device %s: former_secret_file: %w", path, d.Name, err)
			}
		}
		if d.FormerSecretFile != "" && bytes.Equal(d.Secret, d.FormerSecret) {
			return Config{}, fmt.Errorf("%s: device %s: former_secret_file: it holds what is in force: remove the key, or put the new secret in secret_file",
				path, d.Name)
		}
	}
	return c, nil
}

// LoadWithoutSecrets is Load without the secret files, which may be readable for the daemon only.
func LoadWithoutSecrets(path string) (Config, error) {
	data, err := readFile(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return Config{}, fmt.Errorf("no configuration file: %w: create it, or use --device for one device with defaults", err)
	}
	if err != nil {
		return Config{}, fmt.Errorf("configuration file: %w", err)
	}
	return Parse(path, data)
}

// readFile is os.ReadFile with an upper bound, for the path may be anything.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return b, err
}

// ForDevice returns the configuration of a node with one device, all defaults
// and no other node.
func ForDevice(name string) (Config, error) {
	if why := badDeviceName(name); why != "" {
		return Config{}, fmt.Errorf("--device %q: %s", name, why)
	}
	var p parser
	c := p.config(raw{Device: []rawDevice{{Name: name}}})
	if len(p.mistakes) > 0 {
		return Config{}, errors.Join(p.mistakes...)
	}
	return c, nil
}

func readSecret(path string) ([]byte, error) {
	secret, err := readFile(path, maxSecret)
	if err == nil && len(secret) < minSecret {
		err = fmt.Errorf("%s has %d bytes, want at least %d: fill it with head -c 32 /dev/urandom, the same on every node",
			path, len(secret), minSecret)
	}
	return secret, err
}

// Parse reads a configuration. It reads no files: Secret stays nil. The name is
// that of the file, for the error, which is as that of Load.
func Parse(name string, data []byte) (Config, error) {
	p := parser{file: name, text: string(data)}
	var r raw
	md, err := toml.Decode(p.text, &r)
	if at, ok := errors.AsType[toml.ParseError](err); ok {
		// The message may quote what it met, line ends and all.
		message := strings.Map(func(r rune) rune {
			if !unicode.IsGraphic(r) {
				return ' '
			}
			return r
		}, at.Message)
		return Config{}, fmt.Errorf("%s:%d: %s", name, at.Position.Line, message)
	}
	if err != nil {
		return Config{}, p.wrongType(err)
	}
	p.unknown(md.Keys())
	c := p.config(r)
	if len(p.mistakes) > 0 {
		return Config{}, errors.Join(p.mistakes...)
	}
	return c, nil
}

// config checks r and fills in the defaults.
func (p *parser) config(r raw) Config {
	def := defaults()
	c := Config{
		Node:           r.Node,
		NATS:           p.nats(r.NATS, def.NATS),
		MaxSkew:        p.duration(-1, "feed.max_skew", cmp.Or(r.Feed.MaxSkew, def.Feed.MaxSkew), 10*time.Millisecond, time.Hour),
		KeepalivedFIFO: p.path(-1, "keepalived.fifo", r.Keepalived.FIFO),

		StateDir:      p.path(-1, "state.dir", cmp.Or(r.State.Dir, def.State.Dir)),
		ControlSocket: p.path(-1, "control.socket", cmp.Or(r.Control.Socket, def.Control.Socket)),
		MetricsListen: p.hostPort("metrics.listen", r.Metrics.Listen, true),
	}
	const minAge = time.Hour
	c.MaxAge = p.duration(-1, "feed.max_age", cmp.Or(r.Feed.MaxAge, def.Feed.MaxAge), minAge, 10*365*24*time.Hour)
	// What a node with a clock that is ahead says must not make the others forget.
	if c.MaxAge >= minAge && c.MaxAge < 2*c.MaxSkew {
		p.mistake(-1, "feed.max_age", "%v is less than twice feed.max_skew: set at least %v, or a smaller max_skew", c.MaxAge, 2*c.MaxSkew)
	}
	c.Events = p.events(r.Events, c.NATS.External)
	if c.Node == "" {
		// Without a host name the check below tells what to do.
		c.Node, _ = os.Hostname()
	}
	if c.Node == "" || len(c.Node) > 64 || strings.ContainsFunc(c.Node, func(r rune) bool { return !unicode.IsGraphic(r) || unicode.IsSpace(r) }) {
		p.mistake(-1, "node", "%q is not a node name: set one of 1 to 64 bytes without spaces", c.Node)
	}
	if len(r.Device) == 0 {
		p.mistake(-1, "device", `there is no device: add a [[device]] with name = "wg0"`)
	}
	for i, d := range r.Device {
		c.Devices = append(c.Devices, p.device(i, d, def.Device[0]))
		netns := c.Devices[i].Netns
		// Dumps date the records of living peers anew, each half max_age.
		if sweep := c.Devices[i].SweepInterval; c.MaxAge >= minAge && c.MaxAge < 4*sweep {
			p.mistake(i, "device.sweep_interval", "%v is more than a quarter of feed.max_age (%v), and living peers would be forgotten: set at most %v",
				sweep, c.MaxAge, c.MaxAge/4)
		}
		if slices.ContainsFunc(c.Devices[:i], func(o Device) bool { return o.Name == d.Name && o.Netns == netns }) {
			p.mistake(i, "device.name", "%q is there twice: keep one, or say in which netns the other is", d.Name)
		}
		if d.VRRP != "" && r.Keepalived.FIFO == "" {
			p.mistake(i, "device.vrrp", "there is no way to hear of it: set keepalived.fifo to the path of keepalived's vrrp_notify_fifo")
		}
	}
	if r.Keepalived.FIFO != "" && !slices.ContainsFunc(c.Devices, func(d Device) bool { return d.VRRP != "" }) {
		p.mistake(-1, "keepalived.fifo", "no device follows it: set device.vrrp to the name of a VRRP instance or group")
	}
	return c
}

func (p *parser) device(i int, r, def rawDevice) Device {
	d := Device{
		Name:             r.Name,
		Netns:            p.netns(i, r.Netns),
		Role:             Role(cmp.Or(r.Role, def.Role)),
		Standby:          Standby(cmp.Or(r.Standby, def.Standby)),
		VRRP:             r.VRRP,
		SecretFile:       p.path(i, "device.secret_file", r.SecretFile),
		FormerSecretFile: p.path(i, "device.former_secret_file", r.FormerSecret),
		PollInterval:     p.duration(i, "device.poll_interval", cmp.Or(r.PollInterval, def.PollInterval), 10*time.Millisecond, time.Hour),
		SweepInterval:    p.duration(i, "device.sweep_interval", cmp.Or(r.SweepInterval, def.SweepInterval), time.Second, 24*time.Hour),
	}
	if why := badDeviceName(d.Name); why != "" {
		p.mistake(i, "device.name", "%q: %s", d.Name, why)
	}
	switch d.Role {
	case RoleActive, RoleStandby, RoleAlways, RoleAuto:
	default:
		p.mistake(i, "device.role", "%q is not a role: want active, standby, always or auto", d.Role)
	}
	switch d.Standby {
	case StandbyDown, StandbySilent:
	default:
		p.mistake(i, "device.standby", "%q is not a way to stand by: want down or silent", d.Standby)
	}
	switch {
	case strings.ContainsFunc(d.VRRP, func(r rune) bool { return !unicode.IsGraphic(r) }):
		p.mistake(i, "device.vrrp", "%q is not the name of a VRRP instance or group", d.VRRP)
	case d.VRRP != "" && d.Role != RoleAuto:
		p.mistake(i, "device.vrrp", `the role is fixed: set role = "auto", or remove this key`)
	}
	for _, s := range r.VIP {
		a, err := netip.ParseAddr(s)
		switch {
		case err != nil:
			p.mistake(i, "device.vip", "%q is not an IP address: write it without prefix length or port, as 203.0.113.10 or 2001:db8::10", s)
		case a.Is4In6(), a.Zone() != "", a.IsUnspecified(), a.IsLoopback(), a.IsMulticast():
			p.mistake(i, "device.vip", "%s cannot be the address of a gateway: want a unicast IPv4 or IPv6 address without zone", a)
		case slices.Contains(d.VIP, a):
			p.mistake(i, "device.vip", "%s is there twice: keep one", a)
		default:
			d.VIP = append(d.VIP, a)
		}
	}
	if len(d.VIP) > maxVIPs {
		p.mistake(i, "device.vip", "%d addresses, want at most %d", len(d.VIP), maxVIPs)
	}
	return d
}

// badDeviceName says why the kernel would refuse the name (net/core/dev.c,
// dev_valid_name; IFNAMSIZ is 16 with the terminating zero).
func badDeviceName(name string) string {
	switch {
	case name == "":
		return "the device has no name: write that of a WireGuard interface, such as wg0"
	case len(name) > 15:
		return "longer than the 15 bytes of an interface name"
	case name == ".", name == "..", strings.ContainsFunc(name, func(r rune) bool {
		return r == '/' || r == ':' || r == 0 || unicode.IsSpace(r)
	}):
		return "not an interface name: no slash, colon or space"
	}
	return ""
}

// netns returns the one spelling of a network namespace.
func (p *parser) netns(dev int, s string) string {
	if filepath.IsAbs(s) {
		s = p.path(dev, "device.netns", s)
		for _, dir := range []string{"/run/netns", "/var/run/netns"} {
			if filepath.Dir(s) == dir {
				return filepath.Base(s)
			}
		}
		return s
	}
	// As ip netns accepts it (iproute2, ip/ipnetns.c, invalid_name).
	if len(s) > 255 || s == "." || s == ".." || strings.ContainsFunc(s, func(r rune) bool { return r == '/' || !unicode.IsGraphic(r) }) {
		p.mistake(dev, "device.netns", "%q is neither the name of a network namespace, as ip netns shows it, nor an absolute path", s)
		return ""
	}
	return s
}

func (p *parser) nats(r, def rawNATS) NATS {
	n := NATS{
		Listen: p.hostPort("nats.listen", r.Listen, true),

		// As much as the others make allowance for (feed.MaxInterval).
		Heartbeat: p.duration(-1, "nats.heartbeat", cmp.Or(r.Heartbeat, def.Heartbeat), 50*time.Millisecond, 10*time.Second),
	}
	for _, s := range r.Peers {
		peer := p.hostPort("nats.peers", s, false)
		switch {
		case s == "":
			p.mistake(-1, "nats.peers", "an empty address: remove it")
		case peer == "": // noted already
		case peer == n.Listen:
			p.mistake(-1, "nats.peers", "%s is this node's own nats.listen: list the other nodes only", peer)
		case slices.Contains(n.Peers, peer):
			p.mistake(-1, "nats.peers", "%s is there twice: keep one", peer)
		default:
			n.Peers = append(n.Peers, peer)
		}
	}

	// One way or the other. Both at once would be two groups of nodes that see
	// each other in part.
	if (r.URL != "" || r.Context != "") && (r.Listen != "" || len(r.Peers) > 0) {
		p.mistake(-1, "nats", "listen and peers are for the embedded server, url and context for an existing one: remove one pair or the other")
	}
	n.External = p.external("nats", r.rawExternal)
	return n
}

// events returns the NATS of the table events, or else that of the table nats.
func (p *parser) events(r rawEvents, nodes External) Events {
	e := Events{Enabled: r.Enabled, Redact: r.Redact, External: p.external("events", r.rawExternal)}
	if !e.Existing() {
		e.External = nodes
	}
	if e.Enabled && r.URL == "" && r.Context == "" && !nodes.Existing() {
		p.mistake(-1, "events.enabled", "there is no NATS that other programs can read from: add events.url or events.context (the server inside wgroam is for the nodes of a group only)")
	}
	return e
}

// external checks the keys of the table that say how to reach an existing NATS.
func (p *parser) external(table string, r rawExternal) External {
	key := func(name string) string { return table + "." + name }
	e := External{
		URL:     p.urls(key("url"), r.URL),
		Context: r.Context,
		Creds:   p.path(-1, key("creds"), r.Creds),
		NKey:    p.path(-1, key("nkey"), r.NKey),
		CA:      p.path(-1, key("tls.ca"), r.TLS.CA),
		Cert:    p.path(-1, key("tls.cert"), r.TLS.Cert),
		Key:     p.path(-1, key("tls.key"), r.TLS.Key),
	}
	auth := []struct{ key, value string }{
		{key("creds"), r.Creds}, {key("nkey"), r.NKey},
		{key("tls.ca"), r.TLS.CA}, {key("tls.cert"), r.TLS.Cert}, {key("tls.key"), r.TLS.Key},
	}
	if r.Context != "" && r.URL != "" {
		p.mistake(-1, key("context"), "a context has its own URL: remove url or context")
	}
	for _, a := range auth {
		switch {
		case a.value == "":
		case r.Context != "":
			p.mistake(-1, a.key, "a context has its own credentials: remove this key or %s", key("context"))
		case r.URL == "":
			p.mistake(-1, a.key, "this is for an existing NATS server: add %s, or remove this key (the embedded server needs no credentials)", key("url"))
		}
	}
	if r.Creds != "" && r.NKey != "" {
		p.mistake(-1, key("nkey"), "there are %s already: remove one of the two", key("creds"))
	}
	if (r.TLS.Cert == "") != (r.TLS.Key == "") {
		p.mistake(-1, key("tls"), "cert and key belong together: add the other one")
	}
	return e
}

// urls checks a list of NATS URLs. It never prints them whole: they may hold a
// password.
func (p *parser) urls(key, list string) string {
	if list == "" {
		return ""
	}
	for s := range strings.SplitSeq(list, ",") {
		u, err := url.Parse(strings.TrimSpace(s))
		switch {
		case err != nil || u.Hostname() == "":
			p.mistake(-1, key, "not a URL: write nats://host:4222, or several with commas between them")
		case u.Scheme != "nats" && u.Scheme != "tls":
			p.mistake(-1, key, "%q is not a scheme of NATS: write nats://host:4222 or tls://host:4222", u.Scheme)
		case u.Port() != "" && !goodPort(u.Port()):
			p.mistake(-1, key, "%q is not a port: want 1 to 65535", u.Port())
		}
	}
	return list
}

// hostPort returns s in its usual spelling, or "" if it is empty or wrong.
func (p *parser) hostPort(key, s string, anyHost bool) string {
	if s == "" {
		return ""
	}
	host, port, err := net.SplitHostPort(s)
	switch {
	case err != nil:
		p.mistake(-1, key, "%q is not host:port: write 10.0.0.11:4950 or [2001:db8::11]:4950", s)
	case !goodPort(port):
		p.mistake(-1, key, "%q: the port is not a number from 1 to 65535", s)
	case host == "" && !anyHost:
		p.mistake(-1, key, "%q has no host: write that of the other node", s)
	case strings.ContainsAny(host, "/@,") || strings.ContainsFunc(host, unicode.IsSpace):
		p.mistake(-1, key, "%q: the host is neither an IP address nor a name", s)
	default:
		return net.JoinHostPort(host, port)
	}
	return ""
}

func goodPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

// path returns the path s, cleaned. A daemon's working directory is no place to
// start from.
func (p *parser) path(dev int, key, s string) string {
	if s == "" {
		return ""
	}
	if !filepath.IsAbs(s) || strings.ContainsRune(s, 0) {
		p.mistake(dev, key, "%q is not an absolute path: start it with a slash", s)
		return ""
	}
	return filepath.Clean(s)
}

func (p *parser) duration(dev int, key, s string, least, most time.Duration) time.Duration {
	d, err := time.ParseDuration(s)
	switch {
	case err != nil:
		p.mistake(dev, key, `%q is not a duration: write "250ms", "10s" or "5m"`, s)
	case d < least || d > most:
		p.mistake(dev, key, "%v is out of range: want %v to %v", d, least, most)
	}
	return d
}
