// SPDX-License-Identifier: MIT

package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// confinement is what a service manager does to a daemon.
type confinement struct {
	UID  int
	Caps []int // all that there is to have: ambient and bounding set
	// Sealed: as the unit says with ProtectSystem=strict, RestrictAddressFamilies=,
	// RestrictNamespaces= and SystemCallFilter=.
	Sealed   bool
	Writable []string // directories, all the same
	Program  string
}

// confinedBy makes the test binary confine itself and become wgroam.
const confinedBy = "WGROAM_TEST_CONFINED_BY"

func TestMain(m *testing.M) {
	if text, ok := os.LookupEnv(confinedBy); ok {
		var c confinement
		err := json.Unmarshal([]byte(text), &c)
		if err == nil {
			err = c.become()
		}
		fmt.Fprintln(os.Stderr, "confine:", err)
		os.Exit(126)
	}
	os.Exit(runAll(m))
}

// confined starts wgroam on gw under a confinement.
func confined(t testing.TB, gw *lab.Gateway, c confinement, args ...string) *process {
	t.Helper()
	c.Program = binary(t)
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command("/proc/self/exe"), exited: make(chan struct{})}
	p.cmd.Args = append([]string{"wgroam"}, args...)
	p.cmd.Env = append(os.Environ(), confinedBy+"="+string(text))
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := gw.Start(p.cmd); err != nil {
		t.Fatal(err)
	}
	go func() { p.err = p.cmd.Wait(); close(p.exited) }()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("%v under %+v:\n%s", args, c, &p.stderr)
		}
	})
	return p
}

// become replaces this process. It returns with an error only.
func (c confinement) become() error {
	// What follows is the thread's, and the whole process is that thread's after
	// execve.
	runtime.LockOSThread()
	if c.Sealed {
		if err := c.seal(); err != nil {
			return err
		}
	}
	var set [2]uint32
	for _, n := range c.Caps {
		set[n/32] |= 1 << (n % 32)
	}
	for n := 0; n <= unix.CAP_LAST_CAP; n++ {
		if set[n/32]&(1<<(n%32)) != 0 {
			continue
		}
		// A kernel may know fewer.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("drop capability %d: %w", n, err)
		}
	}
	_, _, e1 := syscall.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0)
	_, _, e2 := syscall.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
	_, _, e3 := syscall.RawSyscall(unix.SYS_SETRESGID, uintptr(c.UID), uintptr(c.UID), uintptr(c.UID))
	_, _, e4 := syscall.RawSyscall(unix.SYS_SETRESUID, uintptr(c.UID), uintptr(c.UID), uintptr(c.UID))
	if e1 != 0 || e2 != 0 || e3 != 0 || e4 != 0 {
		return fmt.Errorf("become user %d: %w, %w, %w, %w", c.UID, e1, e2, e3, e4)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	for i, s := range set {
		data[i] = unix.CapUserData{Effective: s, Permitted: s, Inheritable: s}
	}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	for _, n := range c.Caps {
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0); err != nil {
			return fmt.Errorf("make capability %d ambient: %w", n, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if c.Sealed {
		if err := filter(); err != nil {
			return fmt.Errorf("filter system calls: %w", err)
		}
	}
	os.Unsetenv(confinedBy)
	return syscall.Exec(c.Program, os.Args, os.Environ())
}

// seal makes all file systems read-only, in a mount namespace of our own that hears
// of the host's mounts.
func (c confinement) seal() error {
	// Not by SysProcAttr, which would cut it off from the host's mounts.
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("leave the host's mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("leave the host's mounts alone: %w", err)
	}
	for _, dir := range c.Writable {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("keep %s: %w", dir, err)
		}
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make all read-only: %w", err)
	}
	for _, dir := range c.Writable {
		if err := unix.MountSetattr(unix.AT_FDCWD, dir, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("keep %s writable: %w", dir, err)
		}
	}
	return nil
}

// filter allows the families of sockets and the namespaces that the unit does, and
// none of the system calls that it forbids and that this file knows by name.
func filter() error {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	const nr, arg0, arg1 = 0, 16, 24 // in struct seccomp_data; the low half, on the machines that we run on
	allow := unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW}
	deny := func(errno unix.Errno) unix.SockFilter {
		return unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(errno)}
	}
	prog := []unix.SockFilter{{Code: load, K: nr}}
	for _, call := range []uint32{
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_FSOPEN, unix.SYS_FSMOUNT,
		unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE,
		unix.SYS_DELETE_MODULE, unix.SYS_REBOOT, unix.SYS_KEXEC_LOAD, unix.SYS_SWAPON, unix.SYS_SWAPOFF,
		unix.SYS_CLOCK_SETTIME, unix.SYS_SETTIMEOFDAY, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME, unix.SYS_UNSHARE,
	} {
		prog = append(prog, unix.SockFilter{Code: equal, K: call, Jf: 1}, deny(unix.EPERM))
	}
	prog = append(prog,
		unix.SockFilter{Code: equal, K: unix.SYS_SETNS, Jf: 4},
		unix.SockFilter{Code: load, K: arg1},
		unix.SockFilter{Code: equal, K: unix.CLONE_NEWNET, Jf: 1},
		allow, deny(unix.EPERM),
		unix.SockFilter{Code: equal, K: unix.SYS_SOCKET, Jt: 1}, allow,
		unix.SockFilter{Code: load, K: arg0},
	)
	for _, family := range []uint32{unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK} {
		prog = append(prog, unix.SockFilter{Code: equal, K: family, Jf: 1}, allow)
	}
	prog = append(prog, deny(unix.EAFNOSUPPORT))
	fprog := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&fprog)), 0, 0)
}

// capSet returns a set as /proc writes it.
func capSet(caps ...int) (set uint64) {
	for _, n := range caps {
		set |= 1 << n
	}
	return set
}

// capNames returns the names of the capabilities in a set.
func capNames(set uint64) []string {
	all := map[int]string{
		unix.CAP_NET_ADMIN: "CAP_NET_ADMIN", unix.CAP_BPF: "CAP_BPF", unix.CAP_PERFMON: "CAP_PERFMON",
		unix.CAP_SYS_ADMIN: "CAP_SYS_ADMIN", unix.CAP_SYS_PTRACE: "CAP_SYS_PTRACE", unix.CAP_DAC_OVERRIDE: "CAP_DAC_OVERRIDE",
	}
	var names []string
	for ; set != 0; set &= set - 1 {
		names = append(names, all[bits.TrailingZeros64(set)])
	}
	return names
}
