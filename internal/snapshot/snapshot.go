// SPDX-License-Identifier: MIT

// Package snapshot keeps a table in a sealed file, so that a group whose nodes
// all lose power at once still knows where its peers are.
package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

// A file is a header, all integers big endian, and the sealed records
// (feed.Keys.Seal), which authenticate it:
//
//	 0  magic        8 bytes, "wgroam" 0 1; the last is the version
//	 8  record size  u32
//	12  count        u32
const headerSize = 16

var magic = []byte("wgroam\x00\x01")

// ErrForeign is what Decode and File.Read wrap: the file is another group's, or
// damaged. The two cannot be told apart.
var ErrForeign = errors.New("not a snapshot of this group, or damaged")

// Encode returns the contents of a file.
func Encode(keys feed.Keys, records []wgroam.Record) []byte {
	header := append(make([]byte, 0, headerSize), magic...)
	header = binary.BigEndian.AppendUint32(header, wgroam.RecordSize)
	header = binary.BigEndian.AppendUint32(header, uint32(len(records)))
	body := make([]byte, 0, len(records)*wgroam.RecordSize)
	for _, r := range records {
		body, _ = r.AppendBinary(body) // never fails
	}
	return append(header, keys.Seal(header, body)...)
}

// Decode is the reverse of Encode. It overwrites file. Records may be from the
// future, if the clock was ahead: whoever merges them refuses those, one by one,
// and keeps the others. The error wraps ErrForeign.
func Decode(keys feed.Keys, file []byte) ([]wgroam.Record, error) {
	if len(file) < headerSize || !bytes.Equal(file[:len(magic)], magic) {
		return nil, ErrForeign
	}
	header := file[:headerSize]
	body, err := keys.Open(header, file[headerSize:])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	size, count := int(binary.BigEndian.Uint32(header[8:])), int(binary.BigEndian.Uint32(header[12:]))
	if size < wgroam.RecordSize || len(body) != size*count {
		return nil, fmt.Errorf("%w: %d bytes for %d records of %d", ErrForeign, len(body), count, size)
	}
	records := make([]wgroam.Record, 0, count)
	for ; len(body) > 0; body = body[size:] {
		var r wgroam.Record
		// A record that a newer version knows how to read does not spoil the others.
		if r.UnmarshalBinary(body) == nil {
			records = append(records, r)
		}
	}
	return records, nil
}

// ErrInUse is what File.Lock wraps when another process keeps the file.
var ErrInUse = errors.New("another daemon keeps the table of this group there")

// Config describes a File.
type Config struct {
	// Dir is made if it does not exist, with mode 0700.
	Dir   string
	Keys  feed.Keys
	Table *wgroam.Table // nil for a File that is only read
	Log   *slog.Logger
}

// File keeps a table's snapshot up to date.
type File struct {
	cfg     Config
	path    string
	changes *wgroam.Changes

	mu     sync.Mutex
	status Status
}

// Status is what a File can tell of itself.
type Status struct {
	Path string
	// Written is when the file was last written by this process; zero if never.
	Written time.Time
	// Records is how many it had then, or when it was read.
	Records int
	// Err is why it could not be read or written the last time.
	Err error
	// Writes and Errors count the attempts to write it that succeeded, and that
	// failed.
	Writes, Errors uint64
}

// every is how often a file is written, at most, while the table changes.
const every = 10 * time.Second

// New returns the File of a group. Nothing is read or written yet.
func New(cfg Config) *File {
	f := &File{cfg: cfg, path: filepath.Join(cfg.Dir, cfg.Keys.Group()+".snapshot"), changes: wgroam.NewChanges()}
	f.status.Path = f.path
	if cfg.Table != nil {
		cfg.Table.Notify(f.changes, nil)
	}
	return f
}

// Lock makes the file this process's until unlock: two daemons with the same device would
// spoil it for each other. Where no file can be there is nothing to lock. The error wraps
// ErrInUse.
func (f *File) Lock() (unlock func(), err error) {
	_ = os.MkdirAll(f.cfg.Dir, 0o700) // or the first write says why not
	lock, err := os.OpenFile(f.path+".lock", os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return func() {}, nil
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		_ = lock.Close()
		return nil, fmt.Errorf("%s: %w: give each a state.dir of its own", f.cfg.Dir, ErrInUse)
	}
	return func() { _ = lock.Close() }, nil
}

// Status returns a copy of the current status.
func (f *File) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// Read returns the records of the file, none if there is no file. A file that
// cannot be used is left for an operator to look at, renamed, so that the next
// write does not take it away. The error wraps ErrForeign, or is the file
// system's.
func (f *File) Read() ([]wgroam.Record, error) {
	data, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var records []wgroam.Record
	if err == nil {
		records, err = Decode(f.cfg.Keys, data)
	}
	if err != nil {
		err = fmt.Errorf("read snapshot %s: %w", f.path, errors.Join(err, os.Rename(f.path, f.path+".refused")))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status.Records, f.status.Err = len(records), err
	return records, err
}

// Run writes the file when the table has changed, until ctx ends.
func (f *File) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.changes.Ready():
			f.write()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(every):
		}
	}
}

// Close writes what has changed since the last time. To be called after Run has
// returned, when nothing changes the table any more.
func (f *File) Close() { f.write() }

// keepBefore keeps the file as it is under another name as well, when the next one
// has less than half of its records. That may be right, or the doing of a clock that was
// far ahead when a node started: all that is older than max_age is forgotten then.
func (f *File) keepBefore(records int) {
	f.mu.Lock()
	was := f.status.Records
	f.mu.Unlock()
	if 2*records >= was {
		return
	}
	before := f.path + ".before"
	err := os.Remove(before)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = os.Link(f.path, before)
	}
	f.cfg.Log.Warn("most records of the snapshot are gone; keeping it as it was: if a clock was wrong, put it back while wgroam is stopped",
		"file", before, "records", was, "now", records, "err", err)
}

// write writes what the table has, if that has changed. After a failure the peers
// stay marked.
func (f *File) write() {
	if f.changes.Len() == 0 {
		return
	}
	keys := f.changes.Take(f.changes.Len())
	records := f.cfg.Table.Records()
	f.keepBefore(len(records))
	err := Replace(f.path, Encode(f.cfg.Keys, records))

	f.mu.Lock()
	defer f.mu.Unlock()
	if err != nil {
		f.status.Errors++
		for _, k := range keys {
			f.changes.Mark(k)
		}
		err = fmt.Errorf("write snapshot: %w", err)
		if f.status.Err == nil || f.status.Err.Error() != err.Error() {
			f.cfg.Log.Error("the table is in memory only: make room, or make state.dir writable", "err", err)
		}
		f.status.Err = err
		return
	}
	if f.status.Err != nil {
		f.cfg.Log.Info("the snapshot is written again", "path", f.path)
	}
	f.status.Writes++
	f.status.Written, f.status.Records, f.status.Err = time.Now(), len(records), nil
}

// Replace puts data in the place of a file, whatever happens meanwhile: after a
// crash, of the host even, there is the old file or the new one.
func Replace(path string, data []byte) error {
	if err := put(path, data, (*os.File).Sync); err != nil {
		return err
	}
	return syncDir(path)
}

// Put is Replace without waiting for the disk: after a crash of the process there is the
// old file or the new one, and after one of the host also neither, until Sync.
func Put(path string, data []byte) error {
	return put(path, data, func(*os.File) error { return nil })
}

// Sync makes what has been Put last.
func Sync(path string) error {
	w, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(w.Sync(), w.Close(), syncDir(path))
}

func put(path string, data []byte, finish func(*os.File) error) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	// One name, so that a crash leaves one file at most. A file has one writer.
	temp := path + ".new"
	w, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(data)
	if err == nil {
		err = finish(w)
	}
	if err = errors.Join(err, w.Close()); err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
