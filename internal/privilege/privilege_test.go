// SPDX-License-Identifier: MIT

package privilege

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// effective returns the effective set of the calling thread.
func effective(t *testing.T) [2]uint32 {
	t.Helper()
	_, data, err := get()
	if err != nil {
		t.Fatal(err)
	}
	return [2]uint32{data[0].Effective, data[1].Effective}
}

func needRoot(t *testing.T) {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("CI") == "true":
		t.Fatal("capabilities need root")
	default:
		t.Skip("capabilities need root")
	}
}

func TestWith(t *testing.T) {
	needRoot(t)
	runtime.LockOSThread() // and ends with the test, whatever it has
	hdr, data, err := get()
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		data[i].Effective &^= seldom[i]
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	before := effective(t)
	oops := errors.New("oops")
	err = With(func() error {
		during := effective(t)
		for i := range during {
			if during[i] != before[i]|seldom[i] {
				t.Errorf("with: %x, without: %x", during, before)
			}
		}
		return With(func() error { return oops })
	})
	if !errors.Is(err, oops) {
		t.Errorf("error %v, want %v", err, oops)
	}
	if after := effective(t); after != before {
		t.Errorf("before: %x, after: %x", before, after)
	}

	// What is not permitted is not had.
	for i := range data {
		data[i].Permitted &^= seldom[i]
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	if err := With(func() error {
		if got := effective(t); got != before {
			t.Errorf("with: %x, permitted: %x", got, before)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

const child = "WGROAM_TEST_LOWER"

func TestMain(m *testing.M) {
	if os.Getenv(child) != "" {
		os.Exit(lowered())
	}
	os.Exit(m.Run())
}

// lowered prints what all threads of this process have after Lower, threads that
// came later included.
func lowered() int {
	if err := Lower(); err != nil {
		println(err.Error())
		return 1
	}
	for range 4 {
		c := make(chan bool)
		go func() { runtime.LockOSThread(); c <- true; select {} }()
		<-c
	}
	all, _ := filepath.Glob("/proc/self/task/*/status")
	for _, path := range all {
		f, err := os.Open(path)
		if err != nil {
			continue // it has ended
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), "Cap") {
				os.Stdout.WriteString(lines.Text() + "\n")
			}
		}
		f.Close()
	}
	return 0
}

func TestLower(t *testing.T) {
	needRoot(t)
	// With cgo, and so with race detection, nothing may change. TestPrivileges in test
	// looks at a binary without.
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0)
	cgo := errno == unix.ENOTSUP
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), child+"=1")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	threads := 0
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		set, err := strconv.ParseUint(value, 16, 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		bits := uint64(seldom[0]) | uint64(seldom[1])<<32
		switch {
		case name == "CapEff":
			threads++
			if (set&bits != 0) != cgo {
				t.Errorf("a thread has %x (cgo: %v)", set, cgo)
			}
		case name == "CapPrm" && set&bits != bits:
			t.Errorf("a thread is permitted %x only", set)
		}
	}
	if threads < 5 {
		t.Errorf("%d threads, want 5 or more:\n%s", threads, out)
	}
}
