// SPDX-License-Identifier: MIT

package snapshot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/wgroam/wgroam/internal/feed"
)

// Former are keys that a device had, and that are in force on other nodes, perhaps.
type Former struct {
	feed.Keys
	// Until is when they have had their time, in whole seconds; zero for those that the
	// configuration names.
	Until time.Time
}

// A file of former keys is a header, and sealed (feed.Keys.Seal) under the keys in force, for
// each of the former ones: when they have had their time, in seconds since 1970, u64 big
// endian, and their secret (feed.Keys.Secret).
var formerMagic = []byte("wgroam\x01\x01")

const formerSize = 8 + feed.SecretSize

func formerPath(dir string, inForce feed.Keys) string {
	return filepath.Join(dir, inForce.Group()+".former")
}

// WriteFormer keeps former keys for ReadFormer. Without any it removes the file.
func WriteFormer(dir string, inForce feed.Keys, former []Former) error {
	if len(former) == 0 {
		if err := os.Remove(formerPath(dir, inForce)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	plain := make([]byte, 0, len(former)*formerSize)
	defer func() { clear(plain) }()
	for _, f := range former {
		secret := f.Secret()
		plain = binary.BigEndian.AppendUint64(plain, uint64(f.Until.Unix()))
		plain = append(plain, secret[:]...)
		clear(secret[:])
	}
	return Replace(formerPath(dir, inForce), slices.Concat(formerMagic, inForce.Seal(formerMagic, plain)))
}

// ReadFormer returns the keys that were kept with the keys in force, none if there is no
// file. The error wraps ErrForeign, or is the file system's.
func ReadFormer(dir string, inForce feed.Keys) ([]Former, error) {
	path := formerPath(dir, inForce)
	file, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	sealed, ok := bytes.CutPrefix(file, formerMagic)
	if !ok {
		return nil, fmt.Errorf("read former keys %s: %w", path, ErrForeign)
	}
	plain, err := inForce.Open(formerMagic, sealed)
	if err != nil || len(plain)%formerSize != 0 {
		return nil, fmt.Errorf("read former keys %s: %w", path, ErrForeign)
	}
	defer clear(plain)
	var former []Former
	for b := plain; len(b) > 0; b = b[formerSize:] {
		keys, err := feed.KeysOf([feed.SecretSize]byte(b[8:]))
		if err != nil {
			return nil, err
		}
		former = append(former, Former{keys, time.Unix(int64(binary.BigEndian.Uint64(b)), 0)})
	}
	return former, nil
}
