// SPDX-License-Identifier: MIT

package wg

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/privilege"
	"github.com/wgroam/wgroam/internal/thread"
)

// ErrNoSpace says that there is no such network namespace, now.
var ErrNoSpace = errors.New("no such network namespace")

// namedSpaces is where ip netns keeps the namespaces that have a name.
const namedSpaces = "/run/netns"

// Space is a network namespace to do things in. A nil Space is that of the
// calling thread, which for a goroutine is the process's.
//
// While a Space is open, and while a socket is that was opened in it, the kernel
// keeps the namespace and its links, also when its name is gone: whoever has one
// looks at Current now and then, and lets go.
type Space struct {
	name string
	id   unix.Stat_t

	mu sync.Mutex
	fd int // -1 when closed
}

// OpenSpace opens a network namespace: a name as ip netns gives it, or the absolute
// path of a file such as /proc/PID/ns/net. The error wraps ErrNoSpace or
// ErrPrivilege.
func OpenSpace(name string) (*Space, error) {
	s := &Space{name: name, fd: -1}
	err := privilege.With(func() (err error) {
		// Not to wait for a writer, should it be a pipe.
		s.fd, err = unix.Open(spacePath(name), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist) && filepath.IsAbs(name):
		return nil, fmt.Errorf("%w: %s: start the process that has it, or correct the path", ErrNoSpace, name)
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s: create it with ip netns add %s, or correct the name", ErrNoSpace, name, name)
	case errors.Is(err, fs.ErrPermission):
		// Of a process of another user, or with more capabilities (fs/proc/namespaces.c,
		// proc_ns_get_link).
		return nil, fmt.Errorf("%w: cannot open the network namespace %s: give it a name with ip netns attach, or grant CAP_SYS_PTRACE: %w", ErrNoSpace, name, err)
	case err != nil:
		return nil, fmt.Errorf("open network namespace %s: %w", name, err)
	}
	// ip netns makes an ordinary file first, and mounts the namespace on it then.
	if kind, err := unix.IoctlRetInt(s.fd, unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		s.Close()
		return nil, fmt.Errorf("%w: %s is another file", ErrNoSpace, spacePath(name))
	}
	if err := unix.Fstat(s.fd, &s.id); err != nil {
		s.Close()
		return nil, fmt.Errorf("identify network namespace %s: %w", name, err)
	}
	// Is it allowed to go there?
	if err := s.Do(func() error { return nil }); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func spacePath(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(namedSpaces, name)
}

// Current reports whether the name still leads to this namespace.
func (s *Space) Current() bool {
	if s == nil {
		return true
	}
	var st unix.Stat_t
	err := privilege.With(func() error { return unix.Stat(spacePath(s.name), &st) })
	return err == nil && st.Dev == s.id.Dev && st.Ino == s.id.Ino
}

// Inode returns the inode number of the namespace: the name that the kernel hook
// knows it by.
func (s *Space) Inode() (uint32, error) {
	if s == nil {
		return Netns()
	}
	return uint32(s.id.Ino), nil
}

// Close lets go of the namespace. What runs in it goes on.
func (s *Space) Close() error {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return nil
	}
	fd := s.fd
	s.fd = -1
	return unix.Close(fd)
}

// Do runs f on a thread in the namespace, and returns its error. The thread is
// f's own and ends with it, so that nothing else ever runs there. Goroutines
// that f starts do not. In a nil Space, f simply runs. The error wraps
// ErrPrivilege if the kernel does not let us in.
func (s *Space) Do(f func() error) error {
	if s == nil {
		return f()
	}
	err := errors.New("the function ended its goroutine")
	done := make(chan struct{})
	thread.Go(func() {
		defer close(done)
		if e := s.enter(); e != nil {
			err = e
			return
		}
		err = f()
	})
	<-done
	return err
}

// enter moves the calling thread.
func (s *Space) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return fmt.Errorf("%w: %s: closed", ErrNoSpace, s.name)
	}
	err := privilege.With(func() error { return unix.Setns(s.fd, unix.CLONE_NEWNET) })
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w CAP_SYS_ADMIN to enter the network namespace %s: run as root or grant it: %w", ErrPrivilege, s.name, err)
	case err != nil:
		return fmt.Errorf("enter network namespace %s: %w", s.name, err)
	}
	return nil
}
