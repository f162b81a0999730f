// SPDX-License-Identifier: MIT

package feed

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/crypto/chacha20poly1305"
)

// testPrivate is 01 02 .. 20.
func testPrivate() (k [32]byte) {
	for i := range k {
		k[i] = byte(i + 1)
	}
	return k
}

func testKeys(t testing.TB) Keys {
	t.Helper()
	return derive(t, testPrivate(), nil)
}

func derive(t testing.TB, private [32]byte, secret []byte) Keys {
	t.Helper()
	k, err := Derive(private, secret)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestDerive compares with values computed by another implementation of HKDF.
func TestDerive(t *testing.T) {
	for _, tc := range []struct {
		name                           string
		secret                         []byte
		group, kid, seal, digest, seed string
	}{
		{
			name:   "key alone",
			group:  "srq5vhmy5ehmaucdsfqyv3drxa",
			kid:    "78c087ac",
			seal:   "0c0e17db22e2da9d29e887ab050acf2c0870151cd74af7e120633983d1d5bb08",
			digest: "aa87cd945ba9be3c7885a761994fb5badc57a165809831aadff9620015f54ba0",
			seed:   "769d505705c114b7cb0baf7546907807b11d49e2f0ee13f9aa1e1d2ecfc349ce",
		},
		{
			name:   "with a secret",
			secret: []byte("pepper"),
			group:  "kdneqmnpuepmgrg73gpyoss62u",
			kid:    "82566e6d",
			seal:   "488d9ef0b7d546cfc5b8426589c6b37bf57af7814f8afa5b7490c51573f11345",
			digest: "d3c1b1a4c9477ea9555b6df13625eb2a7fd94486366f67d02b18ab5bedb051b8",
			seed:   "4baf3d18d63665bbf45f261f24571a750f49982c7c332b4dcc90a17c265e54db",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := derive(t, testPrivate(), tc.secret)
			if k.Group() != tc.group {
				t.Errorf("group %s, want %s", k.Group(), tc.group)
			}
			if got := fmt.Sprintf("%08x", k.s().kid); got != tc.kid {
				t.Errorf("key id %s, want %s", got, tc.kid)
			}
			if got := k.DigestKey(); hex.EncodeToString(got[:]) != tc.digest {
				t.Errorf("digest key %x, want %s", got, tc.digest)
			}
			seal, _ := hex.DecodeString(tc.seal)
			want, _ := chacha20poly1305.NewX(seal)
			nonce := make([]byte, nonceSize)
			if !bytes.Equal(k.s().aead.Seal(nil, nonce, nil, nil), want.Seal(nil, nonce, nil, nil)) {
				t.Error("seals with another key")
			}
			seed, _ := hex.DecodeString(tc.seed)
			if !k.s().pin.Equal(ed25519.NewKeyFromSeed(seed).Public()) {
				t.Error("pins another key")
			}
		})
	}
}

func TestDeriveClamps(t *testing.T) {
	clamped := testPrivate()
	clamped[0] &= 248
	clamped[31] = clamped[31]&127 | 64
	if derive(t, testPrivate(), nil).Group() != derive(t, clamped, nil).Group() {
		t.Error("the key as written and the key as the kernel returns it are two groups")
	}
}

func TestDeriveNoKey(t *testing.T) {
	if _, err := Derive([32]byte{}, []byte("secret")); !errors.Is(err, ErrNoKey) {
		t.Errorf("got %v, want ErrNoKey", err)
	}
}

func TestKeysHideThemselves(t *testing.T) {
	k := testKeys(t)
	type holder struct {
		Exported Keys
		hidden   Keys
		pointer  *Keys
	}
	h := holder{k, k, &k}
	js, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "keys", k, "holder", h)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "keys", k, "holder", h)
	out := []string{string(js), log.String(), k.String(), k.GoString()}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		out = append(out, fmt.Sprintf(verb, k), fmt.Sprintf(verb, &k), fmt.Sprintf(verb, h), fmt.Sprintf(verb, &h))
	}
	digest := k.DigestKey()
	for _, secret := range [][]byte{digest[:8], k.s().tls.Certificates[0].PrivateKey.(ed25519.PrivateKey)[:8]} {
		for _, form := range []string{
			string(secret), fmt.Sprintf("%x", secret), fmt.Sprintf("%X", secret),
			strings.Trim(fmt.Sprintf("%d", secret), "[]"), strings.Trim(fmt.Sprintf("%#v", secret), "[]byte{}"),
		} {
			for _, o := range out {
				if strings.Contains(o, form) {
					t.Errorf("a secret shows in %q", o)
				}
			}
		}
	}
	if got := fmt.Sprintf("%+v", k); got != "keys(srq5vhmy5ehmaucdsfqyv3drxa)" {
		t.Errorf("prints as %q", got)
	}
	if got := fmt.Sprint(Keys{}); got != "keys(none)" {
		t.Errorf("zero prints as %q", got)
	}
}
