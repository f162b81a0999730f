// SPDX-License-Identifier: MIT

package failover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Notice is what keepalived says of a VRRP instance or group.
type Notice struct {
	Name string
	Role Role // Active or Standby
}

// parseNotice reads a line of keepalived's vrrp_notify_fifo, such as
//
//	INSTANCE "VI_1" MASTER 100
//
// ok is false for a line that changes no role: a state that keepalived has and we
// do not need, or may have one day; or no such line at all.
func parseNotice(line string) (n Notice, ok bool) {
	kind, rest, _ := strings.Cut(line, ` "`)
	if kind != "INSTANCE" && kind != "GROUP" {
		return Notice{}, false
	}
	end := strings.LastIndex(rest, `" `)
	if end < 0 {
		return Notice{}, false
	}
	state, _, _ := strings.Cut(rest[end+2:], " ")
	n.Name = rest[:end]
	switch state {
	case "MASTER":
		n.Role = Active
	case "BACKUP", "FAULT", "STOP", "DELETED":
		n.Role = Standby
	default:
		// MASTER_RX_LOWER_PRI, MASTER_PRIORITY and BACKUP_PRIORITY: still what it was.
		return Notice{}, false
	}
	return n, true
}

const (
	// fifoLook is how often the FIFO is looked for: keepalived removes it when it
	// ends, and makes another.
	fifoLook = time.Second
	// maxNotice is the longest line, in bytes; keepalived's are much shorter.
	maxNotice = 1024
)

// FIFO is keepalived's vrrp_notify_fifo.
type FIFO struct {
	// Path is where it is. It is made if there is none.
	Path string
	// Each is called for every notice.
	Each func(Notice)
	Log  *slog.Logger

	mu    sync.Mutex
	err   error           // why it cannot be read
	names map[string]bool // that keepalived has used
}

// maxNames is how many names of instances and groups are remembered.
const maxNames = 4096

// Run reads the FIFO until ctx ends. Whatever becomes of the file and of its writers, it
// goes on with the next; trouble is logged once.
//
// It must be the only reader.
func (f *FIFO) Run(ctx context.Context) {
	for {
		err := readFIFO(ctx, f.Path, func() { f.fails(nil) }, f.hear)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			f.fails(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(fifoLook):
		}
	}
}

func (f *FIFO) fails(err error) {
	f.mu.Lock()
	before := f.err
	f.err = err
	f.mu.Unlock()
	if err != nil && (before == nil || err.Error() != before.Error()) {
		f.Log.Error("cannot hear keepalived; trying again", "fifo", f.Path, "err", err)
	}
}

func (f *FIFO) hear(n Notice) {
	f.mu.Lock()
	if f.names == nil {
		f.names = make(map[string]bool)
	}
	if len(f.names) < maxNames {
		f.names[n.Name] = true
	}
	f.mu.Unlock()
	f.Each(n)
}

// Heard returns the names of instances and groups that keepalived has used, in order,
// and why it cannot be heard at present; nil if it can.
func (f *FIFO) Heard() (names []string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.names)), f.err
}

// CheckFIFO tells why a FIFO could not be made, or read, at path; nil if it could.
func CheckFIFO(path string) error {
	f, _, err := openFIFO(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := unix.Access(filepath.Dir(path), unix.W_OK|unix.X_OK); err != nil {
			return fmt.Errorf("no FIFO can be made in %s: %w", filepath.Dir(path), err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// openFIFO opens the FIFO at path, if it is one and may be trusted.
func openFIFO(path string) (*os.File, fs.FileInfo, error) {
	// For writing, too: so there is always a writer, and no end of file when
	// keepalived restarts. The runtime polls what does not block.
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrPermission) {
		return nil, nil, fmt.Errorf("%w: let this user read and write it, or start wgroam before keepalived", err)
	}
	if err != nil {
		return nil, nil, err
	}
	here, err := f.Stat()
	switch {
	case err != nil:
	case here.Mode().Type() != fs.ModeNamedPipe:
		err = errors.New("there is a file that is not a FIFO: remove it, or correct keepalived.fifo")
	case here.Mode().Perm()&0o002 != 0:
		err = fmt.Errorf("everybody may write to it (%v), and make this node active: remove it, or chmod o-w", here.Mode().Perm())
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, here, nil
}

// readFIFO reads one FIFO until it is not at path any more, which is no error.
func readFIFO(ctx context.Context, path string, opened func(), each func(Notice)) error {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make it: %w", err)
	}
	f, here, err := openFIFO(path)
	if err != nil {
		return err
	}
	defer f.Close()
	opened()
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	var lines splitter
	buf := make([]byte, 4096)
	for {
		// Before the deadline is set, so that it does not undo that of a ctx that ends.
		if err := f.SetReadDeadline(time.Now().Add(fifoLook)); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		n, err := f.Read(buf)
		for line := range lines.split(buf[:n]) {
			if notice, ok := parseNotice(line); ok {
				each(notice)
			}
		}
		switch {
		case err == nil:
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		default:
			if now, err := os.Lstat(path); err != nil || !os.SameFile(here, now) {
				return nil
			}
		}
	}
}

// splitter makes lines of what comes in pieces. A line that is too long is left
// out.
type splitter struct {
	line []byte
	long bool
}

func (s *splitter) split(data []byte) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for len(data) > 0 {
			piece, rest, ended := bytes.Cut(data, []byte{'\n'})
			data = rest
			if s.long = s.long || len(s.line)+len(piece) > maxNotice; s.long {
				s.line = s.line[:0]
			} else {
				s.line = append(s.line, piece...)
			}
			if !ended {
				return
			}
			line, long := string(s.line), s.long
			s.line, s.long = s.line[:0], false
			if !long && !yield(line) {
				return
			}
		}
	}
}
