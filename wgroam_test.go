// SPDX-License-Identifier: MIT

package wgroam

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestKeyText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := genKey.Draw(t, "key")
		if s := k.String(); len(s) != 44 {
			t.Errorf("%q has %d characters", s, len(s))
		}
		got, err := ParseKey(k.String())
		if err != nil || got != k {
			t.Errorf("ParseKey(%v) = %v, %v", k, got, err)
		}
		b, err := json.Marshal(map[Key]Key{k: k})
		if err != nil {
			t.Fatal(err)
		}
		var m map[Key]Key
		if err := json.Unmarshal(b, &m); err != nil || m[k] != k {
			t.Errorf("JSON: %s gives %v, %v", b, m, err)
		}
	})
}

func TestParseKeyRefuses(t *testing.T) {
	good := Key{31: 1}.String()
	if _, err := ParseKey(good); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]string{
		"empty":         "",
		"short":         base64.StdEncoding.EncodeToString(make([]byte, 31)),
		"long":          base64.StdEncoding.EncodeToString(make([]byte, 33)),
		"no padding":    strings.TrimRight(good, "="),
		"space":         " " + good,
		"newline":       good + "\n",
		"newline in it": good[:20] + "\n" + good[20:],
		"return in it":  good[:20] + "\r\n" + good[20:],
		"URL alphabet":  base64.URLEncoding.EncodeToString([]byte(strings.Repeat("\xff", 32))),
		"hexadecimal":   strings.Repeat("00", 32),
		// The last character carries two bits that belong to no byte.
		"trailing bits": good[:42] + "F=",
	} {
		k, err := ParseKey(s)
		if err == nil {
			t.Errorf("%s: %q is the key %v", name, s, k)
			continue
		}
		if strings.ContainsAny(err.Error(), "\r\n") {
			t.Errorf("%s: the error has several lines: %v", name, err)
		}
		k = Key{1}
		if err := k.UnmarshalText([]byte(s)); err == nil || k != (Key{1}) {
			t.Errorf("%s: UnmarshalText gives %v and leaves %v", name, err, k)
		}
	}
}

// FuzzParseKey: a key has one text form.
func FuzzParseKey(f *testing.F) {
	f.Add(Key{}.String())
	f.Add(Key{31: 1}.String() + "\n")
	f.Fuzz(func(t *testing.T, s string) {
		if k, err := ParseKey(s); err == nil && k.String() != s {
			t.Errorf("%q is the key %v", s, k)
		}
	})
}

func TestNodeID(t *testing.T) {
	// On the wire, so for ever: printf gw-a | sha256sum | cut -c-16
	if got, want := NodeIDOf("gw-a").String(), "bb286da64259a45f"; got != want {
		t.Errorf("gw-a is %s, want %s", got, want)
	}
	if got := NodeID(1).String(); got != "0000000000000001" {
		t.Errorf("got %s", got)
	}
}

func TestCause(t *testing.T) {
	for c, want := range map[Cause]struct {
		name     string
		observed bool
	}{
		0:               {"cause(0)", false},
		CauseData:       {"data", true},
		CauseResponse:   {"response", true},
		CauseInitiation: {"initiation", true},
		CauseConfig:     {"config", false},
		CauseSnapshot:   {"snapshot", true},
		6:               {"cause(6)", true}, // from a newer version
	} {
		if c.String() != want.name || c.Observed() != want.observed {
			t.Errorf("%d is %v, observed %v; want %v", uint8(c), c, c.Observed(), want)
		}
	}
}

func TestCheckEndpoint(t *testing.T) {
	for s, ok := range map[string]bool{
		"198.51.100.7:51820":          true,
		"198.51.100.7:1":              true,
		"198.51.100.7:65535":          true,
		"10.0.0.1:51820":              true, // peers may come from a private net
		"100.64.0.1:51820":            true,
		"169.254.1.1:51820":           true, // IPv4 needs no scope
		"[2001:db8::1]:51820":         true,
		"[fd00::1]:51820":             true,
		"[64:ff9b::c633:6407]:1":      true,
		"198.51.100.7:0":              false,
		"[2001:db8::1]:0":             false,
		"0.0.0.0:51820":               false,
		"[::]:51820":                  false,
		"127.0.0.1:51820":             false,
		"127.8.8.8:51820":             false,
		"[::1]:51820":                 false,
		"224.0.0.1:51820":             false,
		"239.255.255.250:1":           false,
		"255.255.255.255:51820":       false,
		"[ff02::1]:51820":             false,
		"[::ffff:198.51.100.7]:51820": false,
		"[::ffff:127.0.0.1]:51820":    false,
		"[fe80::1]:51820":             false,
		"[fe80::1%eth0]:51820":        false,
		"[2001:db8::1%eth0]:51820":    false, // a record has no room for the zone
	} {
		err := CheckEndpoint(netip.MustParseAddrPort(s))
		if (err == nil) != ok {
			t.Errorf("%s: %v", s, err)
		}
		if err != nil && !errors.Is(err, ErrEndpoint) {
			t.Errorf("%s: %v is not an ErrEndpoint", s, err)
		}
		if err != nil && !strings.Contains(err.Error(), s) {
			t.Errorf("%s: %v does not name it", s, err)
		}
	}
	if err := CheckEndpoint(netip.AddrPort{}); !errors.Is(err, ErrEndpoint) {
		t.Errorf("no endpoint: %v", err)
	}
}

// The generators. Few keys, endpoints and versions, so that they meet often.

var genKey = rapid.Custom(func(t *rapid.T) (k Key) {
	copy(k[:], rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "bytes"))
	return k
})

// genPeer draws one of eight peers, two each in four buckets.
var genPeer = rapid.Map(rapid.IntRange(0, 7), func(i int) Key { return Key{0: byte(i / 2), 2: byte(i % 2)} })

var genEndpoint = rapid.Map(rapid.IntRange(0, 5), func(i int) netip.AddrPort {
	return netip.MustParseAddrPort([]string{
		"198.51.100.7:51820", "198.51.100.7:51821", "198.51.100.8:51820",
		"[2001:db8::7]:51820", "[2001:db8::7]:51821", "[2001:db8::8]:51820",
	}[i])
})

var genCause = rapid.SampledFrom([]Cause{CauseData, CauseResponse, CauseInitiation, CauseSnapshot})

var genRecord = rapid.Custom(func(t *rapid.T) Record {
	return Record{
		Peer:     genPeer.Draw(t, "peer"),
		Endpoint: genEndpoint.Draw(t, "endpoint"),
		Cause:    genCause.Draw(t, "cause"),
		Version: Version{
			Term: rapid.Uint32Range(0, 1).Draw(t, "term"),
			HLC:  HLC(rapid.Uint64Range(1, 4).Draw(t, "hlc")),
			Node: NodeID(rapid.Uint64Range(1, 3).Draw(t, "node")),
		},
	}
})

// shuffled returns a copy of s in another order.
func shuffled[T any](t *rapid.T, s []T) []T {
	s = append([]T(nil), s...)
	rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
	rng.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
	return s
}
