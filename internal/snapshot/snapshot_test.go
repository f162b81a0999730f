// SPDX-License-Identifier: MIT

package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

func keysOf(t testing.TB, seed byte) feed.Keys {
	t.Helper()
	keys, err := feed.Derive([32]byte{0: seed, 1: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

func record(n byte) wgroam.Record {
	return wgroam.Record{
		Peer:     wgroam.Key{n},
		Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, n}), 51820),
		Cause:    wgroam.CauseData,
		Version:  wgroam.Version{HLC: wgroam.HLC(n), Node: 7},
	}
}

func byPeer(a, b wgroam.Record) int { return bytes.Compare(a.Peer[:], b.Peer[:]) }

func TestDecode(t *testing.T) {
	keys := keysOf(t, 8)
	records := []wgroam.Record{record(1), record(2)}
	file := Encode(keys, records)
	for name, c := range map[string]struct {
		file []byte
		keys feed.Keys
		err  error
	}{
		"whole":       {file, keys, nil},
		"foreign":     {file, keysOf(t, 16), ErrForeign},
		"no snapshot": {[]byte("# SPDX-License-Identifier: MIT and more"), keys, ErrForeign},
		"longer":      {append(slices.Clone(file), 0), keys, ErrForeign},
	} {
		got, err := Decode(c.keys, slices.Clone(c.file))
		if !errors.Is(err, c.err) || err == nil && !slices.Equal(got, records) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for n := range file {
		if got, err := Decode(keys, slices.Clone(file[:n])); !errors.Is(err, ErrForeign) {
			t.Fatalf("the first %d bytes: %v, %v", n, got, err)
		}
		for bit := range 8 {
			bad := slices.Clone(file)
			bad[n] ^= 1 << bit
			if got, err := Decode(keys, bad); !errors.Is(err, ErrForeign) {
				t.Fatalf("bit %d of byte %d is wrong: %v, %v", bit, n, got, err)
			}
		}
	}
	if got, err := Decode(keys, Encode(keys, nil)); err != nil || len(got) != 0 {
		t.Errorf("an empty table: %v, %v", got, err)
	}
	peer := record(1).Peer
	for _, secret := range [][]byte{peer[:], []byte("\xc6\x33\x64")} {
		if bytes.Contains(file, secret) {
			t.Errorf("the file shows %x", secret)
		}
	}
}

func FuzzDecode(f *testing.F) {
	keys := keysOf(f, 8)
	genuine := Encode(keys, []wgroam.Record{record(1)})
	plain, err := record(1).AppendBinary(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(genuine[:headerSize], genuine[headerSize:], false)
	f.Add(genuine[:headerSize], plain, true)
	f.Add([]byte{}, []byte{}, false)
	f.Fuzz(func(t *testing.T, header, body []byte, seal bool) {
		if seal { // a member's, so that what is behind the seal is read as well
			body = keys.Seal(header, body)
		}
		file := slices.Concat(header, body)
		whole := slices.Clone(file)
		records, err := Decode(keys, file)
		if err == nil && len(whole) < headerSize+len(records)*wgroam.RecordSize {
			t.Errorf("%d records from %d bytes", len(records), len(whole))
		}
	})
}

// keep runs a File of a table.
func keep(t *testing.T, dir string, log *slog.Logger, f func(*File, *wgroam.Table)) {
	t.Helper()
	table := wgroam.NewTable([32]byte{})
	file := New(Config{Dir: dir, Keys: keysOf(t, 8), Table: table, Log: log})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); file.Run(ctx) }()
	f(file, table)
	cancel()
	<-done
	file.Close()
}

func read(t *testing.T, dir string) []wgroam.Record {
	t.Helper()
	file := New(Config{Dir: dir, Keys: keysOf(t, 8), Table: wgroam.NewTable([32]byte{}), Log: slog.New(slog.DiscardHandler)})
	records, err := file.Read()
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(records, byPeer)
	return records
}

// TestKeep: the file follows the table, not faster than it may, and has all of
// it at the end.
func TestKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "state")
		if got := read(t, dir); got != nil {
			t.Errorf("read %v from nowhere", got)
		}
		keep(t, dir, slog.New(slog.DiscardHandler), func(file *File, table *wgroam.Table) {
			table.Merge(record(1))
			synctest.Wait()
			if got := read(t, dir); !slices.Equal(got, []wgroam.Record{record(1)}) {
				t.Errorf("read %v", got)
			}
			table.Merge(record(2))
			synctest.Wait()
			if s := file.Status(); s.Records != 1 || s.Err != nil {
				t.Errorf("written again at once: %+v", s)
			}
			time.Sleep(every)
			synctest.Wait()
			if s := file.Status(); s.Records != 2 || !s.Written.Equal(time.Now()) {
				t.Errorf("status %+v", s)
			}
			table.Merge(record(3))
		})
		if got := read(t, dir); !slices.Equal(got, []wgroam.Record{record(1), record(2), record(3)}) {
			t.Errorf("read %v", got)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	})
}

// TestBefore: a file that most records are about to vanish from, as with a clock that
// was far ahead, is kept under another name.
func TestBefore(t *testing.T) {
	dir := t.TempDir()
	table := wgroam.NewTable([32]byte{})
	file := New(Config{Dir: dir, Keys: keysOf(t, 8), Table: table, Log: slog.New(slog.DiscardHandler)})
	before := file.Status().Path + ".before"
	write := func(gone func(wgroam.Record) bool, added byte) {
		table.Revise(func(r wgroam.Record) (wgroam.Record, bool) { return wgroam.Record{Peer: r.Peer}, gone(r) })
		table.Merge(record(added))
		file.write()
	}
	for n := range byte(4) {
		write(func(wgroam.Record) bool { return false }, n+1)
	}
	write(func(r wgroam.Record) bool { return r.Peer[0] <= 2 }, 5)
	if _, err := os.Stat(before); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("kept for two records of four: %v", err)
	}
	for range 2 { // in the place of an older one
		write(func(wgroam.Record) bool { return true }, 6)
		if got := read(t, dir); !slices.Equal(got, []wgroam.Record{record(6)}) {
			t.Errorf("read %v", got)
		}
		data, err := os.ReadFile(before)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Decode(keysOf(t, 8), data)
		if slices.SortFunc(got, byPeer); err != nil || !slices.Equal(got, []wgroam.Record{record(3), record(4), record(5)}) {
			t.Errorf("kept %v, %v", got, err)
		}
		write(func(wgroam.Record) bool { return true }, 3)
		write(func(wgroam.Record) bool { return false }, 4)
		write(func(wgroam.Record) bool { return false }, 5)
	}
}

// TestRefused: a file that cannot be used is kept under another name.
func TestRefused(t *testing.T) {
	dir := t.TempDir()
	file := New(Config{Dir: dir, Keys: keysOf(t, 8), Table: wgroam.NewTable([32]byte{}), Log: slog.New(slog.DiscardHandler)})
	if err := os.WriteFile(file.Status().Path, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := file.Read(); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), dir) {
		t.Errorf("read nonsense: %v", err)
	}
	if _, err := os.Stat(file.Status().Path + ".refused"); err != nil {
		t.Error(err)
	}
	if records, err := file.Read(); records != nil || err != nil {
		t.Errorf("once more: %v, %v", records, err)
	}
}

// TestDiskFull: a full disk is reported once, the old file stays, and the next
// write that succeeds has everything.
func TestDiskFull(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("mounting a file system needs root")
		}
		t.Skip("mounting a file system needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		keep(t, dir, slog.New(slog.NewTextHandler(&log, nil)), func(file *File, table *wgroam.Table) {
			table.Merge(record(1))
			synctest.Wait()
			ballast := filepath.Join(dir, "ballast")
			_ = os.WriteFile(ballast, make([]byte, 64<<10), 0o600) // as much as there is room for
			for n := range byte(100) {
				table.Merge(record(2 + n))
			}
			time.Sleep(3 * every)
			synctest.Wait()
			if s := file.Status(); !errors.Is(s.Err, unix.ENOSPC) || s.Records != 1 {
				t.Errorf("with a full disk: %+v", s)
			}
			if got := read(t, dir); len(got) != 1 {
				t.Errorf("the old file has %d records", len(got))
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			time.Sleep(every)
			synctest.Wait()
			if s := file.Status(); s.Err != nil || s.Records != 101 {
				t.Errorf("with room again: %+v", s)
			}
		})
		if got := read(t, dir); len(got) != 101 {
			t.Errorf("read %d records", len(got))
		}
		if n := strings.Count(log.String(), "in memory only"); n != 1 {
			t.Errorf("said %d times that the disk is full:\n%s", n, &log)
		}
	})
}

// TestLock: a file has one writer, also where nothing can be written.
func TestLock(t *testing.T) {
	lock := func(dir string) (func(), error) { return New(Config{Dir: dir, Keys: keysOf(t, 8)}).Lock() }
	dir := filepath.Join(t.TempDir(), "state")
	unlock, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); !errors.Is(err, ErrInUse) {
		t.Errorf("twice: %v", err)
	}
	if unlock, err := New(Config{Dir: dir, Keys: keysOf(t, 16)}).Lock(); err != nil {
		t.Errorf("another group's: %v", err)
	} else {
		unlock()
	}
	unlock()
	for range 2 {
		if unlock, err = lock(dir); err != nil {
			t.Errorf("after the first: %v", err)
		} else {
			unlock()
		}
	}
	for range 2 {
		if _, err := lock("/dev/null/state"); err != nil {
			t.Errorf("where nothing can be: %v", err)
		}
	}
}
