// SPDX-License-Identifier: MIT

package wg

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// space opens the namespace of a gateway.
func space(t *testing.T, gw *lab.Gateway) *Space {
	t.Helper()
	s, err := OpenSpace(gw.NetNS())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// named gives a gateway's namespace a name, as ip netns attach does.
func named(t *testing.T, gw *lab.Gateway) string {
	t.Helper()
	name := fmt.Sprintf("wgroam-test-%d", os.Getpid())
	path := filepath.Join(namedSpaces, name)
	if err := os.MkdirAll(namedSpaces, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unname(t, name) })
	if err := unix.Mount(gw.NetNS(), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	return name
}

// unname is ip netns del.
func unname(t *testing.T, name string) {
	t.Helper()
	path := filepath.Join(namedSpaces, name)
	_ = unix.Unmount(path, unix.MNT_DETACH) // there may be none
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestSpace(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	s := space(t, gw)
	home, err := Netns()
	if err != nil {
		t.Fatal(err)
	}
	want, err := s.Inode()
	if err != nil || want == home {
		t.Fatalf("a gateway is in namespace %d, this process in %d (error %v)", want, home, err)
	}
	var inside uint32
	if err := s.Do(func() (err error) { inside, err = Netns(); return err }); err != nil || inside != want {
		t.Errorf("Do runs in namespace %d, want %d (error %v)", inside, want, err)
	}
	// Nested, into another one and back home.
	var nested, back uint32
	err = s.Do(func() error {
		return errors.Join(
			space(t, l.Gateways[1]).Do(func() (err error) { nested, err = Netns(); return err }),
			(*Space)(nil).Do(func() (err error) { back, err = Netns(); return err }),
		)
	})
	if other, _ := space(t, l.Gateways[1]).Inode(); err != nil || nested != other || back != want {
		t.Errorf("nested calls run in %d and %d, want %d and %d (error %v)", nested, back, other, want, err)
	}
	none := (*Space)(nil)
	if ino, err := none.Inode(); err != nil || ino != home || !none.Current() || none.Close() != nil {
		t.Errorf("no space: namespace %d, want %d (error %v)", ino, home, err)
	}
	oops := errors.New("oops")
	if err := s.Do(func() error { return oops }); err != oops { //nolint:errorlint // not wrapped is the point
		t.Errorf("Do returns %v, want %v", err, oops)
	}
	if err := s.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("no error for a function that ends its goroutine")
	}

	// What is opened in a space is usable on any thread.
	c, err := s.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if d, err := c.Device(gw.Device()); err != nil || d.PublicKey != l.PublicKey() {
		t.Errorf("device %+v, error %v", d, err)
	}
	if _, err := c.Device("nothing"); !errors.Is(err, ErrNoDevice) { // looks again
		t.Errorf("a device that is not there: error %v", err)
	}
	if d, err := c.Device(gw.Device()); err != nil || d.PublicKey != l.PublicKey() {
		t.Errorf("after another look: device %+v, error %v", d, err)
	}

	if err := s.Close(); err != nil || s.Close() != nil {
		t.Errorf("Close: %v", err)
	}
	if err := s.Do(func() error { return nil }); !errors.Is(err, ErrNoSpace) {
		t.Errorf("closed: error %v", err)
	}
}

// TestSpaceThreads: a thread that has been elsewhere serves nobody else.
func TestSpaceThreads(t *testing.T) {
	l := newLab(t, lab.Config{})
	s := space(t, l.Gateways[0])
	home, err := Netns()
	if err != nil {
		t.Fatal(err)
	}
	var strays atomic.Int64
	done := make(chan struct{})
	for range 8 {
		go func() {
			defer func() { done <- struct{}{} }()
			for range 50 {
				if err := s.Do(func() error { runtime.Gosched(); return nil }); err != nil {
					t.Error(err)
				}
				if ino, err := Netns(); err != nil || ino != home {
					strays.Add(1)
				}
			}
		}()
	}
	for range 8 {
		<-done
	}
	if n := strays.Load(); n > 0 {
		t.Errorf("%d goroutines found themselves elsewhere", n)
	}
	// What others take for the process's is that of its first thread.
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil || uint32(st.Ino) != home {
		t.Errorf("the process is in namespace %d, want %d (error %v)", st.Ino, home, err)
	}
}

func TestSpaceWatchLinks(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	s := space(t, gw)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wakes atomic.Int64
	ended := make(chan error, 1)
	go func() {
		ended <- s.Do(func() error { return WatchLinks(ctx, func() { wakes.Add(1) }) })
	}()
	await(t, "the first wake-up", func() bool { return wakes.Load() > 0 })
	before := wakes.Load()
	churn(t, l.Gateways[1], 10) // not here
	if err := gw.Do(func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "new0"}})
	}); err != nil {
		t.Fatal(err)
	}
	await(t, "wake-up by a new link", func() bool { return wakes.Load() > before })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSpaceNames(t *testing.T) {
	l := newLab(t, lab.Config{})
	name := named(t, l.Gateways[0])
	a, err := OpenSpace(name)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if ino, _ := a.Inode(); !a.Current() {
		t.Errorf("%s is not %d", name, ino)
	}
	unname(t, name)
	if a.Current() {
		t.Error("current without a name")
	}
	if _, err := OpenSpace(name); !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "ip netns add "+name) {
		t.Errorf("no such name: error %v", err)
	}
	// Another one under the same name.
	if again := named(t, l.Gateways[1]); again != name {
		t.Fatal(again)
	}
	if a.Current() {
		t.Error("current, and the name is another's")
	}
	h, err := OpenSpace(name)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if !h.Current() {
		t.Error("not current")
	}
}

func TestSpaceMistakes(t *testing.T) {
	dir := t.TempDir()
	plain, fifo := filepath.Join(dir, "plain"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(plain, nil, 0o600), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(dir, "nothing"), plain, fifo, "/proc/self/ns/mnt", "wgroam-no-such"} {
		if s, err := OpenSpace(path); !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, error %v", path, s, err)
		}
	}
}

// TestSpacePrivilege: what is missing is named. For what it takes to enter, see
// TestPrivileges in test: threads of one process are all alike.
func TestSpacePrivilege(t *testing.T) {
	if os.Getpid() == 1 {
		t.Skip("this process is the kernel's first")
	}
	needRoot(t)
	unprivileged(t, func() {
		if _, err := OpenSpace("/proc/1/ns/net"); !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "CAP_SYS_PTRACE") {
			t.Errorf("the namespace of another process: error %v", err)
		}
	})
}
