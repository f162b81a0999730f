// SPDX-License-Identifier: MIT

package failover

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestParseNotice(t *testing.T) {
	for _, tt := range []struct {
		line string
		want Notice
		ok   bool
	}{
		{`INSTANCE "VI_1" MASTER 100`, Notice{"VI_1", Active}, true},
		{`INSTANCE "VI_1" BACKUP 100`, Notice{"VI_1", Standby}, true},
		{`INSTANCE "VI_1" FAULT 0`, Notice{"VI_1", Standby}, true},
		{`INSTANCE "VI_1" STOP 100`, Notice{"VI_1", Standby}, true},
		{`INSTANCE "VI_1" DELETED 100`, Notice{"VI_1", Standby}, true},
		{`GROUP "VG 1" MASTER 0`, Notice{"VG 1", Active}, true},
		{`GROUP "VG_1" BACKUP`, Notice{"VG_1", Standby}, true},
		{`INSTANCE "a" b" MASTER 100`, Notice{`a" b`, Active}, true},
		{`INSTANCE "VI_1" MASTER_RX_LOWER_PRI 100`, Notice{}, false},
		{`INSTANCE "VI_1" BACKUP_PRIORITY 90`, Notice{}, false},
		{`INSTANCE "VI_1" QUORUM 100`, Notice{}, false},
		{`VS [10.0.0.1]:tcp:80 UP`, Notice{}, false},
		{`INSTANCE VI_1 MASTER 100`, Notice{}, false},
		{`INSTANCE "VI_1"`, Notice{}, false},
		{`INSTANCE "VI_1`, Notice{}, false},
		{`instance "VI_1" MASTER 100`, Notice{}, false},
		{``, Notice{}, false},
	} {
		if got, ok := parseNotice(tt.line); got != tt.want || ok != tt.ok {
			t.Errorf("%s: %+v %v, want %+v %v", tt.line, got, ok, tt.want, tt.ok)
		}
	}
}

// FuzzNotices: however the bytes come in, they are the same lines, none too long,
// and only a whole line with a known state is a notice.
func FuzzNotices(f *testing.F) {
	f.Add([]byte("INSTANCE \"VI_1\" MASTER 100\nGROUP \"G\" STOP 0\n"), uint8(3))
	f.Add([]byte(strings.Repeat("x", maxNotice+1)+"\nINSTANCE \"a\" FAULT 1\n"), uint8(200))
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		var whole, pieces splitter
		var want, got []string
		for line := range whole.split(data) {
			want = append(want, line)
		}
		for rest := data; len(rest) > 0; {
			n := min(int(size)+1, len(rest))
			for line := range pieces.split(rest[:n]) {
				got = append(got, line)
			}
			rest = rest[n:]
		}
		if strings.Join(want, "\n") != strings.Join(got, "\n") || len(want) != len(got) {
			t.Fatalf("%q in one piece, %q in pieces of %d", want, got, int(size)+1)
		}
		for _, line := range got {
			n, ok := parseNotice(line)
			if len(line) > maxNotice || strings.Contains(line, "\n") {
				t.Errorf("a line of %d bytes", len(line))
			}
			if ok != (n.Role == Active || n.Role == Standby) || ok && !strings.Contains(line, `"`+n.Name+`" `) {
				t.Errorf("%q is %+v, %v", line, n, ok)
			}
		}
	})
}

// heard collects notices.
type heard struct {
	mu      sync.Mutex
	notices []Notice
	news    chan struct{}
}

func (h *heard) add(n Notice) {
	h.mu.Lock()
	h.notices = append(h.notices, n)
	h.mu.Unlock()
	h.news <- struct{}{}
}

func (h *heard) await(t *testing.T, want Notice) {
	t.Helper()
	select {
	case <-h.news:
	case <-time.After(10 * time.Second):
		t.Fatalf("no %+v", want)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if got := h.notices[len(h.notices)-1]; got != want {
		t.Fatalf("heard %+v, want %+v", got, want)
	}
}

// say writes into the FIFO as keepalived does: it opens, writes, and may close.
func say(t *testing.T, path string, lines ...string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, line := range lines {
		if _, err := f.WriteString(line); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFIFO: no writer, many, pieces of lines, and a FIFO that is replaced.
func TestFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var out safeBuffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	h := &heard{news: make(chan struct{}, 100)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	f := &FIFO{Path: path, Each: h.add, Log: log}
	go func() { defer close(done); f.Run(ctx) }()
	defer func() { cancel(); <-done }()

	// What is there is somebody else's, until it is removed.
	eventually(t, "the file is complained of", func() bool { return strings.Contains(out.String(), "not a FIFO") })
	if names, err := f.Heard(); err == nil || len(names) > 0 {
		t.Errorf("heard of %v, error %v", names, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	fifo := func() bool {
		fi, err := os.Stat(path)
		return err == nil && fi.Mode().Type() == fs.ModeNamedPipe
	}
	eventually(t, "a FIFO is made", fifo)
	say(t, path, "INSTANCE \"VI_1\" BACK", "UP 100\n")
	h.await(t, Notice{"VI_1", Standby})
	say(t, path, strings.Repeat("x", 2*maxNotice), "\n", "nonsense\n", "INSTANCE \"VI_1\" MASTER 100\n")
	h.await(t, Notice{"VI_1", Active})

	// keepalived removes the FIFO when it ends; one is made, and read, again.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a FIFO is made again", fifo)
	// One that anybody can write to is not listened to, until it is mended.
	if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600), os.Chmod(path, 0o602)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the mode is complained of", func() bool { _, err := f.Heard(); return err != nil && strings.Contains(err.Error(), "chmod") })
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the FIFO is read", func() bool { _, err := f.Heard(); return err == nil })
	say(t, path, "GROUP \"G\" FAULT 100\n")
	h.await(t, Notice{"G", Standby})
	if names, err := f.Heard(); err != nil || !slices.Equal(names, []string{"G", "VI_1"}) {
		t.Errorf("heard of %v, error %v", names, err)
	}
	if n := strings.Count(out.String(), "level=ERROR"); n != 2 {
		t.Errorf("two troubles were logged %d times:\n%s", n, out.String())
	}
}

// eventually waits for what happens by itself.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("not so: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
