// SPDX-License-Identifier: MIT

package tracker

import (
	"crypto/rand"
	"encoding/hex"
	"testing"

	"golang.zx2c4.com/wireguard/device"

	"github.com/wgroam/wgroam"
)

// The sizes of handshake messages up to and including mac1 (messages.h).
const (
	initiationSize = 132
	responseSize   = 76
	mac2Size       = 16
)

// handshake returns a message to a peer as wireguard-go ends it, without mac2.
func handshake(t testing.TB, peer wgroam.Key, size int) []byte {
	t.Helper()
	message := make([]byte, size+mac2Size)
	rand.Read(message)
	var g device.CookieGenerator
	g.Init(device.NoisePublicKey(peer))
	g.AddMacs(message)
	return message[:size]
}

func TestMAC1(t *testing.T) {
	for _, size := range []int{initiationSize, responseSize} {
		message := handshake(t, alice, size)
		a, b := newMAC1(alice), newMAC1(bob)
		for range 2 { // the hash is used again
			if !a.made(message) {
				t.Errorf("%d bytes: not known as made for their peer", size)
			}
			if b.made(message) {
				t.Errorf("%d bytes: taken for another peer's", size)
			}
		}
		for i := range message {
			message[i] ^= 1
			if a.made(message) {
				t.Errorf("%d bytes: a change of byte %d is not noticed", size, i)
			}
			message[i] ^= 1
		}
	}
}

// TestMAC1Vector: computed with Python's hashlib, not with the library that
// wireguard-go uses as well.
//
//	key = blake2s(b"mac1----" + bytes([1] + [0] * 31)).digest()
//	blake2s(bytes(range(60)), key=key, digest_size=16).hexdigest()
func TestMAC1Vector(t *testing.T) {
	message := make([]byte, 60)
	for i := range message {
		message[i] = byte(i)
	}
	mac, err := hex.DecodeString("6db17b4225c3ea8e6291e6feecb7aecf")
	if err != nil {
		t.Fatal(err)
	}
	if !newMAC1(alice).made(append(message, mac...)) {
		t.Error("not known")
	}
}

func FuzzMAC1(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, mac1Size))
	f.Add(handshake(f, alice, responseSize))
	a, b := newMAC1(alice), newMAC1(bob)
	f.Fuzz(func(t *testing.T, message []byte) {
		if b.made(message) {
			t.Errorf("%x was made for nobody", message)
		}
		if len(message) < mac1Size {
			if a.made(message) {
				t.Errorf("%x has no mac1", message)
			}
			return
		}
		// With the right MAC it is.
		var g device.CookieGenerator
		g.Init(device.NoisePublicKey(alice))
		whole := append(append([]byte(nil), message...), make([]byte, mac2Size)...)
		g.AddMacs(whole)
		if got := a.made(whole[:len(message)]); got != (len(message) > mac1Size) {
			t.Errorf("%x: made for its peer: %v", whole, got)
		}
	})
}

func BenchmarkName(b *testing.B) {
	f := newFed(b, RungPort)
	for i := range 10_000 {
		f.places.move(f.add(wgroam.Key{1: byte(i), 2: byte(i >> 8)}), at(i))
	}
	message := handshake(b, bob, responseSize)
	f.nameOf(message, none, true) // makes the keys
	for b.Loop() {
		f.nameOf(message, none, true)
	}
}
