// SPDX-License-Identifier: MIT

package feed

import (
	"bytes"
	"testing"

	"github.com/wgroam/wgroam"
)

func FuzzSetupDiff(f *testing.F) {
	body := appendSetupDiff(nil, wgroam.SetupDiff{Port: 51820, Peers: 70000, Differing: 3, Told: wgroam.BucketSet{1, 127: 128}})
	f.Add(body, uint16(1))
	f.Add(body[:setupDiffLeast], uint16(1)) // of a former version
	f.Fuzz(func(t *testing.T, body []byte, count uint16) {
		d, err := decodeSetupDiff(testHeader(kindSetupReply, 1, len(body), int(count)), body)
		if err != nil {
			return
		}
		want := body[:setupDiffLeast]
		if len(body) >= setupDiffSize {
			want = body[:setupDiffSize]
		} else if d.Port != 0 {
			t.Errorf("port %d", d.Port)
		}
		if !bytes.Equal(appendSetupDiff(nil, d)[:len(want)], want) {
			t.Error("does not encode to what it was")
		}
	})
}

func FuzzSetups(f *testing.F) {
	f.Add(appendSetups(nil, []wgroam.Setup{{Peer: wgroam.Key{1}, AllowedIPs: 2, PresharedKey: 3}, {}}), uint16(setupSize))
	f.Add(make([]byte, 128), uint16(64))
	f.Fuzz(func(t *testing.T, body []byte, size uint16) {
		if size == 0 || len(body)%int(size) != 0 || len(body)/int(size) > 0xffff {
			return // open does not let it pass
		}
		n := len(body) / int(size)
		got, err := decodeSetups(testHeader(kindSetupReply, 2, int(size), n), body)
		if err != nil {
			return
		}
		if len(got) != n {
			t.Fatalf("%d of %d", len(got), n)
		}
		for i, s := range got {
			if !bytes.Equal(appendSetups(nil, []wgroam.Setup{s}), body[i*int(size):i*int(size)+setupSize]) {
				t.Error("does not encode to what it was")
			}
		}
	})
}
