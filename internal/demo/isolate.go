// SPDX-License-Identifier: MIT

package demo

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// isolated holds the mount namespace that Isolate has made.
const isolated = "WGROAM_DEMO_MOUNTS"

// Isolate starts this process again, under the same process id, where it has
// mounts of its own and an empty /run. It returns nil in the process that was
// started again, and otherwise only with an error, which wraps os.ErrPermission
// when the process lacks privileges.
//
// Names of network namespaces, sockets and files then exist for this process
// and its children alone. The kernel removes them with the last of these, and
// what they name, however the process ends.
func Isolate() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("the demo makes network namespaces: run it as root: %w", os.ErrPermission)
	}
	if here, err := os.Readlink("/proc/self/ns/mnt"); err == nil && os.Getenv(isolated) == here {
		return os.Unsetenv(isolated)
	}
	// The namespace is this thread's until it executes the program again, which
	// makes it the process's. The thread is not given back.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace (needs CAP_SYS_ADMIN): %w", err)
	}
	// What is mounted here stays here; what others unmount goes here, too.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("separate the mounts (needs CAP_SYS_ADMIN): %w", err)
	}
	// /var/run is /run almost everywhere; then this covers it twice.
	for _, dir := range []string{"/run", "/var/run"} {
		if err := unix.Mount("wgroam-demo", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return fmt.Errorf("mount a tmpfs on %s (needs CAP_SYS_ADMIN): %w", dir, err)
		}
	}
	here, err := os.Readlink("/proc/thread-self/ns/mnt")
	if err != nil {
		return fmt.Errorf("identify mount namespace: %w", err)
	}
	if err := os.Setenv(isolated, here); err != nil {
		return err
	}
	err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
	return errors.Join(fmt.Errorf("start the demo again: %w", err), os.Unsetenv(isolated))
}
