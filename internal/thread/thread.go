// SPDX-License-Identifier: MIT

// Package thread runs functions on threads that nothing else runs on, because they
// change what belongs to a thread, such as its network namespace.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Go runs f in a goroutine on a thread of its own, which ends with f. The first
// thread of a process cannot end before the process does, and is what others take
// for the process: f never runs there. Goroutines that f starts run elsewhere.
func Go(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		locked := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(locked)
			f()
		}()
		<-locked
		runtime.UnlockOSThread()
	}()
}
