// SPDX-License-Identifier: MIT

package test

import (
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	be "encoding/binary"
	"encoding/hex"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// later is a gateway with a later version of wgroam: it appends fields to all that
// it says. It is written from the description of the wire format, and shares no
// code with it.
type later struct {
	t      *testing.T
	nc     *nats.Conn
	prefix string
	kid    []byte
	aead   cipher.AEAD
	number uint64
	ahead  time.Duration          // its clock, of ours
	answer atomic.Pointer[[]byte] // a record
}

const (
	laterName  = "gw-later"
	laterMore  = 40 // bytes appended
	headerSize = 36
	bindSize   = 16
)

func startLater(t *testing.T, nc *nats.Conn, private [32]byte) *later {
	t.Helper()
	prk, err := hkdf.Extract(sha256.New, private[:], []byte("wgroam-v1"))
	if err != nil {
		t.Fatal(err)
	}
	expand := func(label string, n int) []byte {
		b, err := hkdf.Expand(sha256.New, prk, label, n)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	n := &later{t: t, nc: nc, kid: expand("kid", 4)}
	n.prefix = "wgroam.v1." + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(expand("group", 16))) + "."
	if n.aead, err = chacha20poly1305.NewX(expand("seal", chacha20poly1305.KeySize)); err != nil {
		t.Fatal(err)
	}
	sub, err := nc.Subscribe(n.prefix+"q", n.asked)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return n
}

func (n *later) id() wgroam.NodeID { return wgroam.NodeIDOf(laterName) }

// say publishes records, each with laterMore bytes appended, in a frame of a
// version.
func (n *later) say(version, kind byte, flags uint16, seq uint64, subject string, bind []byte, records ...[]byte) {
	size := 0
	var body []byte
	for _, r := range records {
		body = append(append(body, r...), bytes.Repeat([]byte{0xee}, laterMore)...)
		size = len(r) + laterMore
	}
	h := be.BigEndian.AppendUint16([]byte{version, kind}, flags)
	h = append(h, n.kid...)
	h = be.BigEndian.AppendUint16(h, uint16(size))
	h = be.BigEndian.AppendUint16(h, uint16(len(records)))
	h = be.BigEndian.AppendUint64(h, uint64(n.id()))
	h = be.BigEndian.AppendUint64(h, 12345) // boot
	h = be.BigEndian.AppendUint64(h, seq)
	nonce := make([]byte, chacha20poly1305.NonceSizeX)
	_, _ = rand.Read(nonce)
	sealed := n.aead.Seal(nil, nonce, body, slices.Concat(h, []byte(subject), bind))
	if err := n.nc.Publish(subject, slices.Concat(h, nonce, sealed)); err != nil {
		n.t.Error(err)
	}
}

func (n *later) beat() {
	n.number++
	b := be.BigEndian.AppendUint64(nil, uint64(time.Now().Add(n.ahead).UnixNano()))
	b = be.BigEndian.AppendUint64(b, n.number)
	b = be.BigEndian.AppendUint64(b, 42)              // digest
	b = be.BigEndian.AppendUint32(b, 1)               // records
	b = be.BigEndian.AppendUint32(b, 2000)            // interval
	b = append(b, 3, 1, 9, byte(len(laterName)))      // role, versions
	b = append(b, laterName...)                       //
	b = append(b, make([]byte, 64-len(laterName))...) // padding
	n.say(1, 2, 0, 0, n.prefix+"b."+n.id().String(), nil, b)
}

// asked answers a sync request.
func (n *later) asked(m *nats.Msg) {
	h := m.Data[:headerSize]
	nonce := m.Data[headerSize : headerSize+chacha20poly1305.NonceSizeX]
	body, err := n.aead.Open(nil, nonce, m.Data[headerSize+len(nonce):], append(bytes.Clone(h), m.Subject...))
	if err != nil || h[1] != 3 {
		n.t.Errorf("request of kind %d: %v", h[1], err)
		return
	}
	bind := body[:bindSize]
	if be.BigEndian.Uint64(body[bindSize:]) != uint64(n.id()) {
		return
	}
	inbox := n.prefix + "r." + wgroam.NodeID(be.BigEndian.Uint64(h[12:])).String() + "." + hex.EncodeToString(bind)
	n.say(1, 4, 1, 1, inbox, bind, *n.answer.Load())
}

func observed(t *testing.T, c *lab.Client, at netip.AddrPort, by wgroam.NodeID) []byte {
	t.Helper()
	b, err := wgroam.Record{
		Peer: c.Key(), Endpoint: at, Cause: wgroam.CauseData,
		Version: wgroam.Version{HLC: wgroam.HLCAt(time.Now()), Node: by},
	}.AppendBinary(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestLaterVersion: a gateway that has been upgraded works with one that has not,
// and where it does not, that one says so.
func TestLaterVersion(t *testing.T) {
	l := newLab(t, lab.Config{Clients: 2})
	a, h := l.Gateways[0], l.Gateways[1]
	url, nc := startBus(t, a)
	dir := t.TempDir()
	old := startNode(t, h, dir, onBus(h, dir, url))
	dev, err := h.WG().Device(h.Device())
	if err != nil {
		t.Fatal(err)
	}
	n := startLater(t, nc, dev.PrivateKey)
	first, second := netip.MustParseAddrPort("198.51.100.7:7001"), netip.MustParseAddrPort("198.51.100.8:7002")
	answer := observed(t, l.Clients[0], first, n.id())
	n.answer.Store(&answer)

	await(t, "the later node to be known", func() (bool, string) {
		n.beat()
		nodes := old.status().Feed.Nodes
		return len(nodes) == 1 && nodes[0].Name == laterName && nodes[0].Role == "always", "nodes"
	})
	awaitEndpoint(t, h, l.Clients[0], first)
	n.say(1, 1, 0, 1, n.prefix+"u."+n.id().String(), nil, observed(t, l.Clients[1], second, n.id()))
	awaitEndpoint(t, h, l.Clients[1], second)
	if s := old.status(); s.Feed.Refused["version"]+s.Feed.Refused["malformed"]+s.Feed.Refused["type"] != 0 {
		t.Errorf("refused %v", s.Feed.Refused)
	}

	const unreadable = 5
	for range unreadable {
		n.say(2, 1, 0, 2, n.prefix+"u."+n.id().String(), nil, observed(t, l.Clients[1], first, n.id()))
	}
	await(t, "refusals", func() (bool, string) {
		return old.status().Feed.Refused["version"] == unreadable, "counted"
	})
	if got := strings.Count(old.stderr.String(), "a later version of wgroam"); got != 1 {
		t.Errorf("said %d times", got)
	}
	awaitEndpoint(t, h, l.Clients[1], second)
	out, err := exec.Command(binary(t), "status", "--socket", old.socket).Output()
	if err != nil || !strings.Contains(string(out), "upgrade this one") {
		t.Errorf("status says %v: %s", err, out)
	}
	// It does not know, or does not answer, a question of ours.
	n.beat()
	if !slices.ContainsFunc(old.check().Checks, func(f control.Finding) bool {
		return f.Check == "peers" && f.State == control.CheckWarn && strings.Contains(f.Detail, "not known whether they are set up as on "+laterName)
	}) {
		t.Error("check does not say that it does not know")
	}
}
