// SPDX-License-Identifier: MIT

package wgroam

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSetupsCompare(t *testing.T) {
	// Peers 1 and 2 share a bucket, 3 has another.
	peer := func(n byte) Key { return Key{0, n / 3, n} }
	setup := func(n byte, ips, psk uint64) Setup { return Setup{peer(n), ips, psk} }
	for name, c := range map[string]struct {
		here, there []Setup
		want        []Drifted
	}{
		"equal":         {[]Setup{setup(1, 1, 1), setup(3, 1, 1)}, []Setup{setup(3, 1, 1), setup(1, 1, 1)}, nil},
		"empty":         {nil, nil, nil},
		"missing here":  {[]Setup{setup(1, 1, 1)}, []Setup{setup(1, 1, 1), setup(2, 1, 2)}, []Drifted{{peer(2), DriftMissingHere}}},
		"missing there": {[]Setup{setup(1, 1, 1), setup(3, 1, 2)}, []Setup{setup(1, 1, 1)}, []Drifted{{peer(3), DriftMissingThere}}},
		"allowed-ips":   {[]Setup{setup(1, 7, 1), setup(2, 1, 1)}, []Setup{setup(1, 1, 1), setup(2, 1, 1)}, []Drifted{{peer(1), DriftAllowedIPs}}},
		"preshared key": {[]Setup{setup(1, 1, 7)}, []Setup{setup(1, 1, 1)}, []Drifted{{peer(1), DriftPresharedKey}}},
		"all at once": {
			[]Setup{setup(1, 1, 3), setup(3, 1, 2)}, []Setup{setup(1, 2, 1), setup(2, 1, 2)},
			[]Drifted{{peer(1), DriftAllowedIPs}, {peer(1), DriftPresharedKey}, {peer(2), DriftMissingHere}, {peer(3), DriftMissingThere}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			here, there := NewSetups(1, c.here), NewSetups(2, c.there)
			ask := here.Digests()
			diff := there.Differing(&ask, 100)
			if diff.Port != 2 || diff.Peers != len(c.there) || (diff.Differing > 0) != (c.want != nil) {
				t.Errorf("the other says %+v", diff)
			}
			if got := here.Compare(diff); !cmp.Equal(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// TestSetupsBounded: an answer has whole buckets, and no more than it may.
func TestSetupsBounded(t *testing.T) {
	var list []Setup
	for n := range 3000 {
		list = append(list, Setup{Key{byte(n >> 8), byte(n), 1}, uint64(n), 1})
	}
	here, there := NewSetups(0, nil), NewSetups(0, list)
	ask := here.Digests()
	diff := there.Differing(&ask, 100)
	if diff.Differing != Buckets || len(diff.Setups) > 100 || len(diff.Setups) < 90 {
		t.Fatalf("%d buckets differ, and %d peers are told", diff.Differing, len(diff.Setups))
	}
	if got := here.Compare(diff); len(got) != len(diff.Setups) || got[0].What != DriftMissingHere {
		t.Errorf("%d differ, of %d that were told", len(got), len(diff.Setups))
	}
}
