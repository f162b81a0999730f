// SPDX-License-Identifier: MIT

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam/internal/thread"
)

// wgMTU leaves room for IPv6 outside on a link of 1500 bytes.
const wgMTU = 1420

// KernelWireGuard reports whether this kernel can make a WireGuard link. A lab
// then uses it; otherwise it runs wireguard-go in this process.
func KernelWireGuard() bool {
	ok := make(chan bool)
	thread.Go(func() {
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: "wg0"}})
		}
		ok <- err == nil
	})
	return <-ok
}

// wgDevice is a WireGuard device in a namespace.
type wgDevice struct {
	name string
	ns   *namespace
	user *userDevice    // nil unless it is in this process
	prog *programDevice // nil unless it is in a process of its own
	in6  netip.Prefix
}

// newWGDevice makes the device, gives it the inner addresses and cfg, and sets
// it up. program may be the path of a wireguard-go.
func newWGDevice(l *Lab, ns *namespace, name, program string, log *slog.Logger, in4, in6 netip.Prefix, cfg wgtypes.Config) (*wgDevice, error) {
	d := &wgDevice{name: name, ns: ns, in6: in6}
	var err error
	switch {
	case program != "":
		d.prog, err = newProgramDevice(ns, name, program)
	case l.Kernel:
		err = ns.nl.LinkAdd(&netlink.Wireguard{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: wgMTU}})
	default:
		var b conn.Bind = &bind{ns: ns}
		if l.batches {
			b = &batchBind{conn.NewStdNetBind(), ns}
		}
		d.user, err = newUserDevice(ns, name, b, log)
	}
	if err != nil {
		return nil, fmt.Errorf("make WireGuard device %s in %s: %w", name, ns.name, err)
	}
	if err = ns.wg.ConfigureDevice(name, cfg); err == nil {
		err = ns.addAddr(name, in4)
	}
	if err == nil {
		err = d.up()
	}
	if err != nil {
		d.close()
		return nil, fmt.Errorf("set up WireGuard device %s in %s: %w", name, ns.name, err)
	}
	return d, nil
}

func (d *wgDevice) up() error {
	if err := d.ns.linkUp(d.name); err != nil {
		return err
	}
	if d.user != nil {
		if err := d.user.tun.wait(true); err != nil {
			return err
		}
		// It is up already, unless that failed: then this tells why.
		if err := d.user.dev.Up(); err != nil {
			return err
		}
	}
	// The kernel forgets IPv6 addresses when a link goes down.
	return d.ns.addAddr(d.name, d.in6)
}

func (d *wgDevice) down() error {
	if err := d.ns.linkDown(d.name); err != nil {
		return err
	}
	if d.user != nil {
		return d.user.tun.wait(false)
	}
	return nil
}

// remove deletes the device.
func (d *wgDevice) remove() error {
	if d.user != nil || d.prog != nil {
		d.close()
		return nil
	}
	link, err := d.ns.link(d.name)
	if err == nil {
		err = d.ns.nl.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("delete WireGuard device %s in %s: %w", d.name, d.ns.name, err)
	}
	return nil
}

// close stops wireguard-go. A kernel device goes with its namespace.
func (d *wgDevice) close() {
	if d.user != nil {
		d.user.close()
	}
	if d.prog != nil {
		d.prog.close()
	}
}

// uapiDir is where wg(8) and wgctrl look for the sockets of wireguard-go.
const uapiDir = "/var/run/wireguard"

// userNames matches the sockets of a lab, see namePrefix.
var userNames = regexp.MustCompile(`^wgl([0-9a-z]+)[0-9a-z]{2}-[0-9a-z]+\.sock$`)

var labs atomic.Int64 // begun in this process

// namePrefix returns what the names of a new lab's userspace devices begin
// with: wgl, the process id in base 36, two digits, and a dash. Their UAPI sockets
// of all namespaces live in one directory. With a process id of 22 bits it leaves
// four characters of a link's name.
func namePrefix() (string, error) {
	for {
		prefix := fmt.Sprintf("wgl%s%s-", base36(int64(os.Getpid())), base36(36+labs.Add(1)%(35*36)))
		taken, err := filepath.Glob(filepath.Join(uapiDir, prefix+"*"))
		if err != nil || len(taken) == 0 {
			return prefix, err
		}
	}
}

func base36(n int64) string { return strconv.FormatInt(n, 36) }

// sweep removes the sockets of labs whose process is dead: nobody answers
// there, which is an error to those who list all devices.
func sweep() error {
	entries, err := os.ReadDir(uapiDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		m := userNames.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		pid, err := strconv.ParseInt(m[1], 36, 32)
		if err != nil || !errors.Is(unix.Kill(int(pid), 0), unix.ESRCH) {
			continue
		}
		if err := os.Remove(filepath.Join(uapiDir, e.Name())); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// programDevice is wireguard-go in a process of its own.
type programDevice struct {
	cmd    *exec.Cmd
	socket string
	said   bytes.Buffer
}

// newProgramDevice starts the program and waits until it can be configured.
func newProgramDevice(ns *namespace, name, program string) (*programDevice, error) {
	p := &programDevice{
		cmd:    exec.Command(program, "--foreground", name),
		socket: filepath.Join(uapiDir, name+".sock"),
	}
	p.cmd.Stdout, p.cmd.Stderr = &p.said, &p.said
	// It warns of a kernel that has WireGuard, and is started for all that.
	p.cmd.Env = append(os.Environ(), "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD=1")
	if err := ns.start(p.cmd); err != nil {
		return nil, err
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(10 * time.Second)
	for {
		if _, err := ns.wg.Device(name); err == nil {
			return p, nil
		}
		select {
		case <-tick.C:
		case <-timeout:
			p.close()
			return nil, fmt.Errorf("%s cannot be configured after 10 s: %s", program, &p.said)
		}
	}
}

func (p *programDevice) close() {
	_ = p.cmd.Process.Kill() // it is dead already, or will be
	_ = p.cmd.Wait()         // killed
	_ = os.Remove(p.socket)  // the program may have done so
}

// userDevice is wireguard-go on a TUN device, with a UAPI socket.
type userDevice struct {
	dev    *device.Device
	tun    *tunDevice
	uapi   net.Listener
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newUserDevice(ns *namespace, name string, b conn.Bind, log *slog.Logger) (*userDevice, error) {
	if err := os.MkdirAll(uapiDir, 0o700); err != nil {
		return nil, err
	}
	path := filepath.Join(uapiDir, name+".sock")
	uapi, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	var t *tunDevice
	if err = os.Chmod(path, 0o600); err == nil {
		t, err = newTUNDevice(ns, name)
	}
	if err != nil {
		uapi.Close()
		return nil, err
	}

	ctx, cancel := context.WithCancel(context.Background())
	u := &userDevice{tun: t, uapi: uapi, cancel: cancel}
	u.wg.Go(t.watch)
	u.dev = device.NewDevice(t, b, deviceLogger(log, name))
	u.wg.Go(func() {
		for {
			c, err := uapi.Accept()
			if err != nil {
				return
			}
			u.wg.Go(func() {
				stop := context.AfterFunc(ctx, func() { c.Close() })
				defer stop()
				u.dev.IpcHandle(c)
			})
		}
	})
	return u, nil
}

func (u *userDevice) close() {
	u.uapi.Close()
	u.cancel()
	u.dev.Close()
	u.wg.Wait()
}

// tunDevice makes wireguard-go follow its link as the kernel's WireGuard does:
// down closes the port and drops the sessions, up opens it. On its own it learns
// of a link going down from the error of an empty write to the TUN device. A
// current kernel (6.18) complains of the length before it looks at the link, so
// that it never learns.
type tunDevice struct {
	tun.Device
	name    string
	events  chan tun.Event
	updates chan netlink.LinkUpdate
	done    chan struct{} // ends updates

	mu      sync.Mutex
	up      bool          // what wireguard-go has made of the link
	changed chan struct{} // closed and replaced when up changes
}

func newTUNDevice(ns *namespace, name string) (*tunDevice, error) {
	t := &tunDevice{
		name:    name,
		events:  make(chan tun.Event),
		updates: make(chan netlink.LinkUpdate),
		done:    make(chan struct{}),
		changed: make(chan struct{}),
	}
	err := ns.do(func() (err error) {
		t.Device, err = tun.CreateTUN(name, wgMTU)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("neither WireGuard nor TUN in this kernel (modprobe wireguard): %w", err)
	}
	if err := netlink.LinkSubscribeAt(ns.handle, t.updates, t.done); err != nil {
		return nil, errors.Join(fmt.Errorf("watch links: %w", err), t.Close())
	}
	return t, nil
}

// Events returns the events that watch makes.
func (t *tunDevice) Events() <-chan tun.Event { return t.events }

// MTU is constant: the real one asks the namespace of the calling thread.
func (t *tunDevice) MTU() (int, error) { return wgMTU, nil }

// watch turns what happens to the link into events, until the device is closed.
func (t *tunDevice) watch() {
	defer close(t.events)
	updates := t.updates
	for {
		select {
		case u, ok := <-updates:
			if !ok {
				updates = nil // the link follows nobody any more
				continue
			}
			if u.Attrs().Name == t.name {
				t.set(u.Attrs().Flags&net.FlagUp != 0)
			}
		case _, ok := <-t.Device.Events():
			if !ok {
				close(t.done)
				for range t.updates {
				}
				return
			}
		}
	}
}

func (t *tunDevice) set(up bool) {
	if up {
		t.events <- tun.EventUp
	} else {
		t.events <- tun.EventDown
	}
	// wireguard-go takes the next event when it has dealt with the one before.
	t.events <- 0
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.up != up {
		t.up = up
		close(t.changed)
		t.changed = make(chan struct{})
	}
}

// wait waits until wireguard-go has followed the link.
func (t *tunDevice) wait(up bool) error {
	timeout := time.After(10 * time.Second)
	for {
		t.mu.Lock()
		now, changed := t.up, t.changed
		t.mu.Unlock()
		if now == up {
			return nil
		}
		select {
		case <-changed:
		case <-timeout:
			return fmt.Errorf("wireguard-go has not followed link %s", t.name)
		}
	}
}

func deviceLogger(log *slog.Logger, name string) *device.Logger {
	if log == nil {
		return &device.Logger{Verbosef: device.DiscardLogf, Errorf: device.DiscardLogf}
	}
	log = log.With("device", name)
	return &device.Logger{
		Verbosef: func(format string, args ...any) { log.Debug("wireguard-go", "says", fmt.Sprintf(format, args...)) },
		Errorf:   func(format string, args ...any) { log.Warn("wireguard-go", "says", fmt.Sprintf(format, args...)) },
	}
}
