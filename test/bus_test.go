// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"context"
	"encoding/base32"
	"encoding/base64"
	be "encoding/binary"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/natsd"
	"github.com/wgroam/wgroam/internal/wg"
)

// startBus starts an existing NATS on a gateway's LAN address and returns its
// URL and an uninvited client.
func startBus(t testing.TB, gw *lab.Gateway) (string, *nats.Conn) {
	t.Helper()
	url, nc, stop := runBus(t, gw)
	t.Cleanup(stop)
	return url, nc
}

// runBus is startBus for whoever ends it himself.
func runBus(t testing.TB, gw *lab.Gateway, more ...func(*server.Options)) (url string, nc *nats.Conn, stop func()) {
	t.Helper()
	ns, nc := runServer(t, gw, more...)
	return "nats://" + ns.Addr().String(), nc, func() {
		nc.Close()
		ns.Shutdown()
		ns.WaitForShutdown()
	}
}

func runServer(t testing.TB, gw *lab.Gateway, more ...func(*server.Options)) (ns *server.Server, nc *nats.Conn) {
	t.Helper()
	addr := netip.AddrPortFrom(gw.Addr4, 4222)
	opts := &server.Options{Host: addr.Addr().String(), Port: int(addr.Port()), NoLog: true, NoSigs: true}
	for _, f := range more {
		f(opts)
	}
	ns, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	err = gw.Do(func() error {
		// The listener must be opened on this thread: AcceptLoop does it before
		// it hands over to goroutines of its own.
		ns.Start()
		if !ns.ReadyForConnections(patience) {
			return fmt.Errorf("no NATS on %v", addr)
		}
		var err error
		nc, err = nats.Connect("", nats.InProcessServer(ns))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns, nc
}

func onBus(gw *lab.Gateway, dir, url string) string {
	cfg := config(gw, dir)
	head, tail, _ := strings.Cut(cfg, "listen =")
	_, tail, _ = strings.Cut(tail, "[state]")
	return head + fmt.Sprintf("url = %q\n[state]", url) + tail
}

// recorder keeps messages of the bus.
type recorder struct {
	mu   sync.Mutex
	msgs []*nats.Msg
}

func (r *recorder) add(m *nats.Msg) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.msgs = append(r.msgs, m)
}

func (r *recorder) all() []*nats.Msg {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]*nats.Msg(nil), r.msgs...)
}

// TestBus: on an existing NATS that anybody can write to, nothing but a member's
// frames changes anything, and all the rest is counted.
func TestBus(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}, Clients: 2})
	a, h, x := l.Gateways[0], l.Gateways[1], l.Gateways[2]
	url, nc := startBus(t, a)

	// Everything that is said, with the reply subjects.
	var rec recorder
	sub, err := nc.Subscribe(">", rec.add)
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}

	// x has another key, and so is another group.
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := x.WG().ConfigureDevice(x.Device(), wgtypes.Config{PrivateKey: &key}); err != nil {
		t.Fatal(err)
	}
	var nodes []*node
	for _, gw := range l.Gateways {
		dir := t.TempDir()
		nodes = append(nodes, startNode(t, gw, dir, onBus(gw, dir, url)))
	}
	nodes[0].awaitNodes(1)
	nodes[1].awaitNodes(1)
	nodes[2].awaitNodes(0)
	var secrets [][]byte
	for i, c := range l.Clients {
		ping(t, c)
		ep := roam(t, c, i)
		awaitEndpoint(t, h, c, ep)
		secrets = append(secrets, spellings(c.Key(), ep)...)
		plain := observed(t, c, ep, 1)
		for _, s := range []string{c.Key().String(), ep.String(), string(plain)} {
			if !slices.ContainsFunc(secrets, func(secret []byte) bool { return strings.Contains(s, string(secret)) }) {
				t.Fatalf("a secret in clear is not found in %q", s)
			}
		}
	}
	dev, err := h.WG().Device(h.Device())
	if err != nil {
		t.Fatal(err)
	}
	secrets = append(secrets, written(dev.PrivateKey[:])...)
	hidden := compareSetups(t, l, nodes[:2])
	secrets = append(secrets, hidden...)

	group := nodes[0].status().Group
	if other := nodes[2].status().Group; other == group {
		t.Fatalf("two keys, one group: %s", group)
	}
	var members, strangers []*nats.Msg
	await(t, "frames of both groups", func() (bool, string) {
		members, strangers = nil, nil
		kinds := make(map[string]bool)
		for _, m := range rec.all() {
			token := strings.Split(m.Subject, ".")
			if token[2] == group {
				members = append(members, m)
				kinds[token[3]] = true
			} else {
				strangers = append(strangers, m)
			}
		}
		return kinds["u"] && kinds["b"] && kinds["q"] && kinds["s"] && kinds["r"] && len(strangers) > 0, fmt.Sprint(kinds, len(strangers))
	})
	if err := sub.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	for _, m := range members {
		for _, s := range secrets {
			if bytes.Contains(m.Data, s) || strings.Contains(m.Subject, string(s)) || strings.Contains(m.Reply, string(s)) {
				t.Errorf("%q, of a key or an address, is to be read in a message on %s", s, m.Subject)
			}
		}
	}

	for _, n := range nodes {
		for _, s := range hidden {
			if strings.Contains(n.stderr.String(), string(s)) {
				t.Errorf("%q, of a secret, is in the log of %s", s, n.gw.Name)
			}
		}
	}

	before := nodes[1].status()
	held, err := h.Endpoints()
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	sent := 0
	publish := func(subject string, data []byte) {
		sent++
		if err := nc.Publish(subject, data); err != nil {
			t.Fatal(err)
		}
	}
	prefix := "wgroam.v1." + group + "."
	update, beat := pick(members, prefix+"u."), pick(members, prefix+"b.")
	for _, m := range []*nats.Msg{update, beat} {
		for n := range len(m.Data) {
			publish(m.Subject, m.Data[:n])
		}
		for range 2000 {
			flipped := bytes.Clone(m.Data)
			flipped[rng.IntN(len(flipped))] ^= 1 << rng.IntN(8)
			publish(m.Subject, flipped)
		}
	}
	for range 2000 {
		noise := make([]byte, rng.IntN(400))
		for i := range noise {
			noise[i] = byte(rng.Uint32())
		}
		publish(update.Subject, noise)
	}
	// Sealed for another place: the other kind, another node, another group.
	publish(beat.Subject, update.Data)
	publish(update.Subject, beat.Data)
	publish(prefix+"u.0123456789abcdef", update.Data)
	for _, m := range strangers {
		publish(prefix+strings.SplitN(m.Subject, ".", 4)[3], m.Data)
	}
	// Said before, by a member: true once, and old.
	for _, m := range members {
		publish(m.Subject, m.Data)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}

	// What is said last has arrived last: a genuine roam still comes through.
	last := l.Clients[0]
	ep := roam(t, last, 1)
	awaitEndpoint(t, h, last, ep)
	held[last.Key()] = ep
	after := nodes[1].status()
	if got, err := h.Endpoints(); err != nil || !maps.Equal(got, held) {
		t.Errorf("noise on the bus changed endpoints: %v, want %v (%v)", got, held, err)
	}
	if after.Records != before.Records || after.Applied != before.Applied+1 {
		t.Errorf("noise on the bus changed the table: %+v, was %+v", after, before)
	}
	var refused uint64
	for _, n := range after.Feed.Refused {
		refused += n
	}
	t.Logf("%d messages of noise; the standby refused %v", sent, after.Feed.Refused)
	// Replays of genuine frames are not refused but change nothing.
	if want := uint64(sent - len(members)); refused < want {
		t.Errorf("%d messages refused, want at least %d", refused, want)
	}
	for _, why := range []string{"short", "auth", "version", "type", "key_id"} {
		if after.Feed.Refused[why] == 0 {
			t.Errorf("nothing was refused for reason %s: %v", why, after.Feed.Refused)
		}
	}
}

// compareSetups has two nodes compare how their devices are configured, of which one
// has another preshared key, and returns what of that must not be read anywhere: all
// preshared keys, the private key, and the hashes.
func compareSetups(t *testing.T, l *lab.Lab, nodes []*node) (hidden [][]byte) {
	t.Helper()
	peers := ghosts(t, l, 3)
	psk := wgtypes.Key{1, 2, 3, 4, 5, 6, 7, 8}
	configure(t, nodes[1].gw, wgtypes.PeerConfig{PublicKey: peers[0].PublicKey, UpdateOnly: true, PresharedKey: &psk})
	for _, n := range nodes {
		f := n.awaitFinding("peers", "1 preshared-key")
		if len(f.Peers) != 1 || wgtypes.Key(f.Peers[0].Peer) != peers[0].PublicKey {
			t.Errorf("%+v", f)
		}
		dev, err := n.gw.WG().Device(n.gw.Device())
		if err != nil {
			t.Fatal(err)
		}
		keys, err := feed.Derive(dev.PrivateKey, nil)
		if err != nil {
			t.Fatal(err)
		}
		hidden = append(hidden, written(dev.PrivateKey[:])...)
		for _, p := range dev.Peers {
			if p.PresharedKey != (wgtypes.Key{}) {
				hidden = append(hidden, written(p.PresharedKey[:])...)
			}
		}
		var setups wgroam.Setups
		if err := n.gw.Do(func() error {
			client, err := wg.Open()
			if err != nil {
				return err
			}
			defer client.Close()
			_, setups, err = client.Setups(n.gw.Device(), keys.SetupKey())
			return err
		}); err != nil {
			t.Fatal(err)
		}
		none := wgroam.Digests{}
		all := setups.Differing(&none, 1000).Setups
		if len(all) != len(dev.Peers) {
			t.Fatalf("%d setups of %d peers", len(all), len(dev.Peers))
		}
		for _, s := range all {
			for _, hash := range []uint64{s.AllowedIPs, s.PresharedKey} {
				hidden = append(hidden, fmt.Append(nil, hash))
				hidden = append(hidden, written(be.BigEndian.AppendUint64(nil, hash))...)
			}
		}
	}
	for _, n := range nodes {
		for _, args := range [][]string{{"check"}, {"check", "--json"}, {"status", "--json"}, {"peers", "--json"}} {
			out, _ := exec.CommandContext(t.Context(), binary(t), append(args, "--socket", n.socket)...).CombinedOutput() // not ready
			for _, s := range hidden {
				if bytes.Contains(out, s) {
					t.Errorf("%q, of a secret, is in the output of %v: %s", s, args, out)
				}
			}
		}
	}
	return hidden
}

func pick(msgs []*nats.Msg, prefix string) *nats.Msg {
	for _, m := range msgs {
		if strings.HasPrefix(m.Subject, prefix) {
			return m
		}
	}
	return nil
}

// TestEmbeddedServer: the server inside a node lets nobody in who does not have
// the key.
func TestEmbeddedServer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := natsd.Start(ctx, "127.0.0.1:0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	mine, err := feed.Derive([32]byte{8}, nil)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := feed.Derive([32]byte{16}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.AddGroup(mine)
	url := "nats://" + s.Addr().String()
	wrong := theirs.TLS()
	wrong.ServerName = mine.Group()
	for name, opts := range map[string][]nats.Option{
		"plain":           nil,
		"TLS without key": {nats.Secure(nil), nats.TLSHandshakeFirst()},
		"another key":     {nats.Secure(wrong), nats.TLSHandshakeFirst()},
		"another group":   {nats.Secure(theirs.TLS()), nats.TLSHandshakeFirst()},
	} {
		if nc, err := nats.Connect(url, append(opts, nats.Timeout(5*time.Second))...); err == nil {
			nc.Close()
			t.Errorf("%s: let in", name)
		}
	}
	nc, err := nats.Connect(url, nats.Secure(mine.TLS()), nats.TLSHandshakeFirst(), nats.Timeout(5*time.Second))
	if err != nil {
		t.Fatalf("the right key: %v", err)
	}
	nc.Close()
}

// spellings returns a peer's key and endpoint in all ways to write them. Four bytes
// of an address alone would turn up in noise, sooner or later.
func spellings(k wgroam.Key, ep netip.AddrPort) [][]byte {
	addr, mapped := ep.Addr().AsSlice(), ep.Addr().As16()
	port := be.BigEndian.AppendUint16(nil, ep.Port())
	out := append(written(k[:]), []byte(ep.Addr().String()))
	out = append(out, written(mapped[:])...)
	for _, port := range [][]byte{port, {port[1], port[0]}} {
		out = append(out, written(slices.Concat(addr, port))...)
		out = append(out, written(slices.Concat(port, addr))...)
	}
	return out
}

// written returns bytes as they are, and as text, in both orders.
func written(b []byte) [][]byte {
	back := bytes.Clone(b)
	slices.Reverse(back)
	var out [][]byte
	for _, b := range [][]byte{b, back} {
		out = append(out, b)
		for _, s := range []string{
			hex.EncodeToString(b), strings.ToUpper(hex.EncodeToString(b)),
			base64.RawStdEncoding.EncodeToString(b), base64.RawURLEncoding.EncodeToString(b),
			base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b),
		} {
			out = append(out, []byte(s))
		}
	}
	return out
}
