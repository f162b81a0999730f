// SPDX-License-Identifier: MIT

package snapshot

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestFormer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	inForce, other := keysOf(t, 8), keysOf(t, 16)
	if got, err := ReadFormer(dir, inForce); err != nil || got != nil {
		t.Errorf("without a file: %v, %v", got, err)
	}
	want := []Former{{keysOf(t, 24), time.Unix(1700000000, 0)}, {other, time.Unix(1800000000, 0)}}
	if err := WriteFormer(dir, inForce, want); err != nil {
		t.Fatal(err)
	}
	got, err := ReadFormer(dir, inForce)
	if err != nil || !slices.EqualFunc(want, got, func(a, b Former) bool {
		return a.Secret() == b.Secret() && a.Group() == b.Group() && a.DigestKey() == b.DigestKey() && a.Until.Equal(b.Until)
	}) {
		t.Errorf("kept %v, got %v (%v)", want, got, err)
	}
	// What the former group has sealed opens with what was kept.
	if _, err := got[1].Open(nil, other.Seal(nil, []byte("plain"))); err != nil {
		t.Error(err)
	}

	path := formerPath(dir, inForce)
	if s, err := os.Stat(path); err != nil || s.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", s.Mode(), err)
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(file) {
		if err := os.WriteFile(path, file[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadFormer(dir, inForce); !errors.Is(err, ErrForeign) {
			t.Fatalf("%d of %d bytes: %v, %v", n, len(file), got, err)
		}
	}
	if err := os.WriteFile(formerPath(dir, other), file, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadFormer(dir, other); !errors.Is(err, ErrForeign) {
		t.Errorf("of another group: %v, %v", got, err)
	}
	for range 2 {
		if err := WriteFormer(dir, other, nil); err != nil {
			t.Error(err)
		}
	}
	if got, err := ReadFormer(dir, other); err != nil || got != nil {
		t.Errorf("after the last: %v, %v", got, err)
	}
}
