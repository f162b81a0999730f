// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/bpf"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/privilege"
	"github.com/wgroam/wgroam/internal/wg"
)

// checkHost is what can be said without a daemon of what this host lets wgroam do.
func checkHost() []finding {
	return append(checkPrivileges(), checkBTF(), checkHook(), checkPort())
}

// checkPrivileges says for each capability what it is for. The table in README.md
// says the same.
func checkPrivileges() []finding {
	const run = "run as root or grant it"
	var out []finding
	for _, c := range []struct {
		number     int
		name, what string
		state      string // without it
		implied    bool   // by CAP_SYS_ADMIN (linux/capability.h, bpf_capable and perfmon_capable)
	}{
		{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "reads and writes kernel WireGuard, and attaches to links", checkFail, false},
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "attaches the kernel hook, and enters other network namespaces", checkWarn, false},
		{unix.CAP_BPF, "CAP_BPF", "loads programs", checkWarn, true},
		{unix.CAP_PERFMON, "CAP_PERFMON", "loads the program at the UDP port", checkWarn, true},
	} {
		f := finding{Check: "privilege", State: checkOK, Detail: c.name + ", which " + c.what}
		if !privilege.Permitted(c.number) && (!c.implied || !privilege.Permitted(unix.CAP_SYS_ADMIN)) {
			f.State, f.Detail, f.Do = c.state, "no "+f.Detail, run
		}
		out = append(out, f)
	}
	return out
}

// checkBTF looks for the descriptions of types without which the hook cannot find
// its way. That of a module is there while it is loaded.
func checkBTF() finding {
	const dir = "/sys/kernel/btf/"
	f := finding{Check: "btf", State: checkOK, Detail: "the kernel describes its types"}
	want := []string{dir + "vmlinux"}
	if _, err := os.Stat("/sys/module/wireguard/initstate"); err == nil { // not built in
		want = append(want, dir+"wireguard")
		f.Detail = "the kernel and its WireGuard describe their types"
	}
	for _, path := range want {
		if _, err := os.Stat(path); err != nil {
			f.State, f.Detail = checkWarn, err.Error()
			f.Do = "boot a kernel with CONFIG_DEBUG_INFO_BTF_MODULES, as distributions build it, if this host uses kernel WireGuard"
			break
		}
	}
	return f
}

// checkHook attaches the kernel hook for a moment.
func checkHook() finding {
	hook, err := bpf.Attach(1)
	if err != nil {
		return finding{Check: "hook", State: checkWarn, Detail: err.Error(), Do: nextBest}
	}
	detail := "the kernel hook can be attached by fentry"
	if hook.Fallback != nil {
		detail = fmt.Sprintf("the kernel hook can be attached by kprobes (%v)", hook.Fallback)
	}
	return momentary("hook", detail, hook.Close())
}

// checkPort attaches the programs at the UDP port to the loopback for a moment.
func checkPort() finding {
	uplink, err := bpf.OpenUplink(1)
	if err == nil {
		var lo wg.Link
		if lo, err = wg.LinkByName("lo"); err == nil {
			err = uplink.Attach(lo.Ifindex)
		}
		if err != nil {
			_ = uplink.Close() // the reason for failing is the one to report
		}
	}
	if err != nil {
		return finding{Check: "port", State: checkWarn, Detail: err.Error(), Do: nextBest}
	}
	return momentary("port", "the programs at the UDP port can be attached", uplink.Close())
}

const nextBest = "wgroam will use the best source that is left, and say which in status"

// momentary is the finding of something that could be attached, given the error of
// detaching it.
func momentary(check, detail string, err error) finding {
	if err != nil {
		return finding{Check: check, State: checkWarn, Detail: err.Error(), Do: "report this"}
	}
	return finding{Check: check, State: checkOK, Detail: detail}
}

// checkConfig says whether what a configuration names is there, and free.
func checkConfig(ctx context.Context, cfg config.Config) []finding {
	var out []finding
	add := func(check string, err error, state, ok, do string) {
		f := finding{Check: check, State: checkOK, Detail: ok}
		if err != nil {
			f.State, f.Detail, f.Do = state, err.Error(), do
		}
		out = append(out, f)
	}
	for _, d := range cfg.Devices {
		f := finding{Device: d.Name, Netns: d.Netns, Check: "device", State: checkOK, Detail: "is there, and has a private key"}
		if err := readable(d); err != nil {
			f.State, f.Detail, f.Do = checkFail, err.Error(), missingDevice
		}
		out = append(out, f)
	}
	add("snapshot", writable(cfg.StateDir), checkWarn, cfg.StateDir+" can be written",
		"let wgroam write there, or set state.dir: without it the table is in memory only")
	if fifo := cfg.KeepalivedFIFO; fifo != "" {
		err, state := failover.CheckFIFO(fifo), checkFail
		if errors.Is(err, fs.ErrNotExist) {
			state = checkWarn // systemd makes /run/wgroam when it starts the daemon
		}
		add("keepalived", err, state, fifo+" is a FIFO, or can be made one", "make its directory, which wgroam does not, or correct keepalived.fifo")
	}
	if cfg.NATS.Listen != "" {
		add("feed", free(ctx, cfg.NATS.Listen), checkFail, cfg.NATS.Listen+" can be listened on", "free the address, or correct nats.listen")
	}
	if cfg.MetricsListen != "" {
		add("metrics", free(ctx, cfg.MetricsListen), checkFail, cfg.MetricsListen+" can be listened on", "free the address, or correct metrics.listen")
	}
	files := func(check, state, table string, n config.External) {
		for _, path := range []string{n.Creds, n.NKey, n.CA, n.Cert, n.Key} {
			if path == "" {
				continue
			}
			f, err := os.Open(path)
			if err == nil {
				err = f.Close()
			}
			add(check, err, state, path+" can be read", "create the file, let wgroam read it, or correct its name under "+table)
		}
	}
	n := cfg.NATS
	files("feed", checkFail, "nats", n.External)
	if cfg.Events.Enabled && cfg.Events.External != n.External {
		files("events", checkWarn, "events", cfg.Events.External)
	}
	answers := make([]error, len(n.Peers))
	var peers sync.WaitGroup
	for i, addr := range n.Peers {
		peers.Go(func() { answers[i] = reach(ctx, addr) })
	}
	peers.Wait()
	for i, addr := range n.Peers {
		add("feed", answers[i], checkWarn, addr+" answers", "start wgroam there, and let this host reach it")
	}
	return out
}

// readable tells why wgroam cannot follow a device; nil if it can.
func readable(d config.Device) error {
	space, err := openSpace(d.Netns)
	if err != nil {
		return err
	}
	defer space.Close()
	if _, err := linkByName(space, d.Name); err != nil {
		return err
	}
	client, err := space.Open()
	if err != nil {
		return err
	}
	defer client.Close()
	key, err := client.PrivateKey(d.Name)
	clear(key[:])
	return err
}

// writable tells why no file can be made in a directory that is made when it is
// needed; nil if it can.
func writable(dir string) error {
	for at := dir; ; at = filepath.Dir(at) {
		err := unix.Access(at, unix.W_OK|unix.X_OK)
		if errors.Is(err, fs.ErrNotExist) && at != filepath.Dir(at) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write to %s: %w", at, err)
		}
		return nil
	}
}

// free tells why nobody can listen on an address; nil if one can.
func free(ctx context.Context, addr string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return l.Close()
}

// reach tells why an address does not take connections; nil if it does.
func reach(ctx context.Context, addr string) error {
	d := net.Dialer{Timeout: 2 * time.Second}
	c, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	return c.Close()
}
