// SPDX-License-Identifier: MIT

package feed

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/wgroam/wgroam"
)

const (
	// MaxSetups is how many peers are told at most in answer to a request for setups.
	MaxSetups = 4096
	// setupWait is how long the first chunk of such an answer may take: the other node
	// reads its device for it.
	setupWait = 5 * time.Second
)

const (
	setupSize      = 32 + 8 + 8
	setupDiffLeast = 4 + 2 + wgroam.Buckets/8
	setupDiffSize  = setupDiffLeast + 2
)

// appendSetupDiff appends the body of the first chunk of a setup reply, which is one
// record:
//
//	0  peers    u32, in the device
//	4  buckets  u16, that differ
//	6  told     128 bytes, bit n%8 of byte n/8: bucket n is told whole in the
//	            chunks that follow
//	134  port   u16, that the device listens on; absent in former versions
func appendSetupDiff(dst []byte, d wgroam.SetupDiff) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(d.Peers))
	dst = binary.BigEndian.AppendUint16(dst, uint16(d.Differing))
	dst = append(dst, d.Told[:]...)
	return binary.BigEndian.AppendUint16(dst, uint16(d.Port))
}

func decodeSetupDiff(h header, body []byte) (wgroam.SetupDiff, error) {
	if h.count != 1 || len(body) < setupDiffLeast {
		return wgroam.SetupDiff{}, errMalformed
	}
	d := wgroam.SetupDiff{
		Peers:     int(binary.BigEndian.Uint32(body)),
		Differing: int(binary.BigEndian.Uint16(body[4:])),
		Told:      wgroam.BucketSet(body[6:]),
	}
	if len(body) >= setupDiffSize {
		d.Port = int(binary.BigEndian.Uint16(body[setupDiffLeast:]))
	}
	return d, nil
}

// appendSetups appends the body of a later chunk. A record of it is:
//
//	 0  peer           32 bytes
//	32  allowed IPs    u64, keyed hash
//	40  preshared key  u64, keyed hash
func appendSetups(dst []byte, setups []wgroam.Setup) []byte {
	for _, s := range setups {
		dst = append(dst, s.Peer[:]...)
		dst = binary.BigEndian.AppendUint64(dst, s.AllowedIPs)
		dst = binary.BigEndian.AppendUint64(dst, s.PresharedKey)
	}
	return dst
}

func decodeSetups(h header, body []byte) ([]wgroam.Setup, error) {
	if h.count == 0 || h.recSize < setupSize {
		return nil, errMalformed
	}
	out := make([]wgroam.Setup, 0, h.count)
	for b := body; len(b) > 0; b = b[h.recSize:] {
		out = append(out, wgroam.Setup{
			Peer:         wgroam.Key(b),
			AllowedIPs:   binary.BigEndian.Uint64(b[32:]),
			PresharedKey: binary.BigEndian.Uint64(b[40:]),
		})
	}
	return out, nil
}

// OnSetupRequest registers a callback for requests for this node's setups; see
// OnUpdate. They are to be answered with AnswerSetups.
func (l *Link) OnSetupRequest(f func(*Request)) { l.onSetupRequest = append(l.onSetupRequest, f) }

// AskSetups asks a node in what its device is set up differently from one with the
// given digests (wgroam.Setups.Digests). The error is ctx's, or wraps ErrNoAnswer,
// which is also what a node of a former version gives, or ErrNoLink.
func (l *Link) AskSetups(ctx context.Context, node wgroam.NodeID, have *wgroam.Digests) (wgroam.SetupDiff, error) {
	var d wgroam.SetupDiff
	list := l.targets(node)
	if len(list) != 1 {
		return d, fmt.Errorf("%w: %v has not been heard lately", ErrNoAnswer, node)
	}
	q := question{kindSetupRequest, kindSetupReply, "s", setupWait}
	err := l.ask(ctx, list[0], q, have, func(h header, body []byte) (err error) {
		if h.Seq == 1 {
			d, err = decodeSetupDiff(h, body)
			return err
		}
		some, err := decodeSetups(h, body)
		if len(d.Setups)+len(some) > MaxSetups {
			return errMalformed
		}
		d.Setups = append(d.Setups, some...)
		return err
	})
	switch {
	case err == nil:
		return d, nil
	case ctx.Err() != nil:
		return wgroam.SetupDiff{}, ctx.Err()
	}
	return wgroam.SetupDiff{}, fmt.Errorf("%w: %w", ErrNoAnswer, err)
}

// AnswerSetups sends what wgroam.Setups.Differing returns for the digests of the node
// that asked, and MaxSetups. It stops early when ctx ends, and returns how many it sent.
func (l *Link) AnswerSetups(ctx context.Context, r *Request, d wgroam.SetupDiff) (sent int, err error) {
	h := l.header(kindSetupReply, 0, setupDiffSize, 1)
	body := appendSetupDiff(nil, d)
	rest, out := d.Setups, []byte(nil)
	for {
		if len(rest) == 0 {
			h.flags |= flagLast
		}
		h.Seq++
		if out, err = l.reply(ctx, r, h, body, out); err != nil {
			return sent, err
		}
		if h.flags&flagLast != 0 {
			return sent, nil
		}
		chunk := rest[:min(len(rest), MaxRecords)]
		rest, sent = rest[len(chunk):], sent+len(chunk)
		h.recSize, h.count = setupSize, uint16(len(chunk))
		body = appendSetups(body[:0], chunk)
	}
}
