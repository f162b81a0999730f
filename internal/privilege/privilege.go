// SPDX-License-Identifier: MIT

// Package privilege keeps capabilities that are seldom needed out of the way: the
// process may have them, but its threads use them only where it says so.
package privilege

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// seldom are the capabilities that programs are loaded with and other namespaces
// entered, and that nothing else needs.
var seldom = set(unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_PERFMON)

func set(caps ...int) (s [2]uint32) {
	for _, c := range caps {
		s[c/32] |= 1 << (c % 32)
	}
	return s
}

// Lower takes the seldom capabilities out of the effective set of all threads,
// those to come included. They stay permitted, for With.
func Lower() error {
	hdr, data, err := get()
	if err != nil {
		return err
	}
	for i := range data {
		data[i].Effective &^= seldom[i]
	}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET,
		uintptr(unsafe.Pointer(&hdr)), uintptr(unsafe.Pointer(&data[0])), 0)
	// With cgo there may be threads that Go does not know. Such a binary is one for
	// tests, and keeps what it has.
	if errno != 0 && errno != unix.ENOTSUP {
		return fmt.Errorf("lower capabilities: %w", errno)
	}
	return nil
}

// With runs f with the seldom capabilities that are permitted, on the calling
// thread, and returns its error. Goroutines that f starts do not have them.
func With(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	hdr, before, err := get()
	if err != nil {
		return err
	}
	data := before
	for i := range data {
		data[i].Effective |= data[i].Permitted & seldom[i]
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("raise capabilities: %w", err)
	}
	err = f()
	if lowerErr := unix.Capset(&hdr, &before[0]); lowerErr != nil {
		// Never refused (security/commoncap.c, cap_capset). The thread must not
		// serve others like this.
		runtime.LockOSThread()
		err = errors.Join(err, fmt.Errorf("lower capabilities: %w", lowerErr))
	}
	return err
}

// Permitted reports whether the calling thread may have a capability, one of
// unix.CAP_*, in effect or not.
func Permitted(capability int) bool {
	_, data, err := get()
	return err == nil && data[capability/32].Permitted&(1<<(capability%32)) != 0
}

// get returns the capabilities of the calling thread.
func get() (hdr unix.CapUserHeader, data [2]unix.CapUserData, err error) {
	hdr.Version = unix.LINUX_CAPABILITY_VERSION_3
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return hdr, data, fmt.Errorf("read capabilities: %w", err)
	}
	return hdr, data, nil
}
