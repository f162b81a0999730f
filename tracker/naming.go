// SPDX-License-Identifier: MIT

package tracker

import (
	"crypto/subtle"
	"hash"

	"golang.org/x/crypto/blake2s"

	"github.com/wgroam/wgroam"
)

// mac1 tells whether a handshake message is for a peer, without any secret: the
// message ends with a MAC over all before it, and the key of that is made of the
// public key of the one that it is for (messages.h, cookie.c wg_cookie_add_mac_to_packet).
type mac1 struct{ h hash.Hash }

// mac1Size is what a MAC has, in bytes, at the end of a message without its mac2.
const mac1Size = blake2s.Size128

func newMAC1(peer wgroam.Key) mac1 {
	key := blake2s.Sum256(append([]byte("mac1----"), peer[:]...))
	h, err := blake2s.New128(key[:])
	if err != nil {
		panic(err) // of a key longer than 32 bytes only
	}
	return mac1{h}
}

// made reports whether message was made for the peer. A message is a handshake
// initiation or response up to and including its mac1.
func (m mac1) made(message []byte) bool {
	n := len(message) - mac1Size
	if n <= 0 {
		return false
	}
	m.h.Reset()
	m.h.Write(message[:n])
	var sum [mac1Size]byte
	return subtle.ConstantTimeCompare(m.h.Sum(sum[:0]), message[n:]) == 1
}
