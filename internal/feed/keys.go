// SPDX-License-Identifier: MIT

package feed

import (
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

// Keys is all that a group shares. Every gateway derives the same Keys from the
// private key of its WireGuard device; whoever has it is a member.
//
// Keys never prints its secrets. The zero value is not usable; see Derive.
type Keys struct {
	// Behind a function: in a field that is not exported fmt calls no methods,
	// and a pointer it follows when the verb does not fit.
	s func() *secrets
}

type secrets struct {
	group  string
	kid    uint32
	digest [32]byte
	alias  [32]byte // of addresses
	setup  [32]byte // of peers' setups
	prk    [SecretSize]byte
	aead   cipher.AEAD // of frames
	file   cipher.AEAD // of snapshots
	tls    *tls.Config
	pin    ed25519.PublicKey
}

// ErrNoKey is returned by Derive for a device without a private key.
var ErrNoKey = errors.New("the device has no private key")

const salt = "wgroam-v1"

// Derive makes the Keys of the group whose devices have the given private key.
// It clamps the key first, as the kernel does when one is set (noise.c
// wg_noise_set_static_identity_private_key), so that a key from a file and the
// same key read back from a device give the same group. A secret, which may be
// nil, is mixed in: a group then shares the two of them.
//
// The caller zeroes its own copy of the private key. The error is ErrNoKey for
// an all-zero key.
func Derive(private [32]byte, secret []byte) (Keys, error) {
	defer clear(private[:])
	if private == [32]byte{} {
		return Keys{}, ErrNoKey
	}
	private[0] &= 248
	private[31] = private[31]&127 | 64
	ikm := append(private[:len(private):len(private)], secret...)
	defer clear(ikm)
	prk, err := hkdf.Extract(sha256.New, ikm, []byte(salt))
	if err != nil {
		return Keys{}, fmt.Errorf("derive keys: %w", err)
	}
	defer clear(prk)
	return KeysOf([SecretSize]byte(prk))
}

// SecretSize is the size in bytes of what Keys.Secret returns.
const SecretSize = sha256.Size

// Secret returns that from which KeysOf makes the same Keys. There is no way from it to the
// device's private key, but to all that the group says. The caller zeroes it after use.
func (k Keys) Secret() [SecretSize]byte { return k.s().prk }

// KeysOf is the reverse of Keys.Secret.
func KeysOf(secret [SecretSize]byte) (Keys, error) {
	defer clear(secret[:])
	var err error
	expand := func(label string, n int) []byte {
		b, e := hkdf.Expand(sha256.New, secret[:], label, n)
		err = errors.Join(err, e)
		return b
	}
	seal, digest := expand("seal", chacha20poly1305.KeySize), expand("digest", 32)
	alias, setup := expand("alias", 32), expand("setup", 32)
	file := expand("snapshot", chacha20poly1305.KeySize)
	group, kid := expand("group", 16), expand("kid", 4)
	seed := expand("tls", ed25519.SeedSize)
	if err != nil {
		return Keys{}, fmt.Errorf("derive keys: %w", err)
	}
	defer clear(seal)
	defer clear(file)
	defer clear(digest)
	defer clear(alias)
	defer clear(setup)
	defer clear(seed)

	s := &secrets{
		group:  strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(group)),
		kid:    binary.BigEndian.Uint32(kid),
		digest: [32]byte(digest),
		alias:  [32]byte(alias),
		setup:  [32]byte(setup),
		prk:    secret,
	}
	if s.aead, err = chacha20poly1305.NewX(seal); err != nil {
		return Keys{}, fmt.Errorf("derive keys: %w", err)
	}
	if s.file, err = chacha20poly1305.NewX(file); err != nil {
		return Keys{}, fmt.Errorf("derive keys: %w", err)
	}
	if err := s.makeTLS(ed25519.NewKeyFromSeed(seed)); err != nil {
		return Keys{}, fmt.Errorf("derive keys: %w", err)
	}
	return Keys{func() *secrets { return s }}, nil
}

// makeTLS prepares the configuration that both ends of a connection between two
// members use. There is no authority: each end makes its own certificate from
// the same key, and accepts that key and no other.
func (s *secrets) makeTLS(key ed25519.PrivateKey) error {
	s.pin = key.Public().(ed25519.PublicKey)
	// Nothing but the key in it is ever looked at.
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: s.group},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, s.pin, key)
	if err != nil {
		return err
	}
	s.tls = &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		// The name tells the server which group's certificate to present.
		ServerName: s.group,
		ClientAuth: tls.RequireAnyClientCert,
		// Chains and names prove nothing here. verify does; it runs on
		// every handshake, and TLS itself has the other end prove that it has
		// the private key.
		InsecureSkipVerify:     true, //nolint:gosec // the key is pinned by VerifyConnection
		VerifyConnection:       s.verify,
		SessionTicketsDisabled: true,
	}
	return nil
}

var errOtherKey = errors.New("the other end has another WireGuard private key (or another secret): not a member of this group")

func (s *secrets) verify(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("the other end has no certificate: not a member of this group")
	}
	if !s.pin.Equal(cs.PeerCertificates[0].PublicKey) {
		return errOtherKey
	}
	return nil
}

// TLS returns the configuration for either end of a connection between two
// members: TLS 1.3, each end presents the group's key and accepts no other.
func (k Keys) TLS() *tls.Config { return k.s().tls.Clone() }

// Group returns the name of the group on the bus: 26 characters, a-z and 2-7.
// It says nothing about the key.
func (k Keys) Group() string { return k.s().group }

// Subjects returns the pattern of all subjects of the group. To publish and to
// subscribe on it is all the permission that a member needs.
func (k Keys) Subjects() string { return "wgroam.v1." + k.Group() + ".>" }

// DigestKey returns the key of the group's table digests, for
// wgroam.NewTable.
func (k Keys) DigestKey() [32]byte { return k.s().digest }

// SetupKey returns the key of the hashes in the setups of peers, for wg.Client.Setups:
// who does not have it cannot try what an allowed IP or a preshared key may be.
func (k Keys) SetupKey() [32]byte { return k.s().setup }

// Alias returns 16 hexadecimal digits that stand for an address where it is not to
// be read. All nodes of the group have the same for an address; without the key
// there is no way back, nor to try addresses.
func (k Keys) Alias(a netip.Addr) string {
	mac := hmac.New(sha256.New, k.s().alias[:])
	_, _ = mac.Write(a.AsSlice()) // never fails
	return hex.EncodeToString(mac.Sum(nil)[:8])
}

// Seal returns plain sealed for a file of this node, with XChaCha20-Poly1305 under
// a key that frames do not use: 24 bytes of random nonce, the ciphertext, a tag
// of 16 bytes. The clear header is authenticated with it.
func (k Keys) Seal(header, plain []byte) []byte {
	aead := k.s().file
	nonce := make([]byte, nonceSize, nonceSize+len(plain)+aead.Overhead())
	_, _ = rand.Read(nonce) // never fails
	return aead.Seal(nonce, nonce, plain, header)
}

// ErrSeal is returned by Open for what was sealed with another key, or changed
// since.
var ErrSeal = errors.New("sealed with another key, or damaged")

// Open is the reverse of Seal. It overwrites sealed. The error is ErrSeal.
func (k Keys) Open(header, sealed []byte) ([]byte, error) {
	if len(sealed) < nonceSize {
		return nil, ErrSeal
	}
	plain, err := k.s().file.Open(sealed[nonceSize:nonceSize], sealed[:nonceSize], sealed[nonceSize:], header)
	if err != nil {
		return nil, ErrSeal
	}
	return plain, nil
}

// Format implements fmt.Formatter: whatever the verb, the name of the group is
// all that shows.
func (k Keys) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(k.String())) }

// String returns the name of the group.
func (k Keys) String() string {
	if k.s == nil {
		return "keys(none)"
	}
	return "keys(" + k.s().group + ")"
}

// GoString implements fmt.GoStringer.
func (k Keys) GoString() string { return k.String() }

// LogValue implements slog.LogValuer.
func (k Keys) LogValue() slog.Value { return slog.StringValue(k.String()) }
