// SPDX-License-Identifier: MIT

package tracker

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/wgroam/wgroam/internal/wg"
)

// errNoSocket: there is nothing to watch, now. It may come.
var errNoSocket = errors.New("no UDP socket is bound to the device's port: set the link up, or start its implementation")

// names is where ip netns keeps the namespaces that have a name.
const names = "/run/netns"

// locate finds the network namespace that has a device's UDP socket: that of the
// link (home) first, then the process's, then those with a name. A link can be
// moved to another namespace than its socket, which stays. The caller closes
// ns, which is nil for the process's; named is the same if it was found by a name.
// The error wraps errNoSocket.
func locate(home *wg.Space, port uint16) (ns, named *wg.Space, err error) {
	if port == 0 {
		return nil, nil, errNoSocket
	}
	var errs []error
	look := func(ns *wg.Space) bool {
		ok, err := bound(ns, port)
		errs = append(errs, err)
		return ok
	}
	if home != nil && look(home) {
		// One of our own, which outlives the caller's.
		err := home.Do(func() (err error) {
			ns, err = wg.OpenSpace("/proc/thread-self/ns/net")
			return err
		})
		return ns, nil, err
	}
	if look(nil) {
		return nil, nil, nil
	}
	entries, err := os.ReadDir(names)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		ns, err := wg.OpenSpace(filepath.Join(names, e.Name()))
		if errors.Is(err, wg.ErrNoSpace) {
			continue // another kind of file, or gone
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if look(ns) {
			return ns, ns, nil
		}
		ns.Close()
	}
	if err := errors.Join(errs...); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errNoSocket, err)
	}
	return nil, nil, fmt.Errorf("%w (port %d)", errNoSocket, port)
}

// bound reports whether a UDP socket in a namespace is bound to a port and
// connected to nowhere. WireGuard's in the kernel is as visible as any.
func bound(ns *wg.Space, port uint16) (ok bool, err error) {
	// The kernel goes through its sockets page by page, and counts those that it has
	// shown. When one of these is closed meanwhile, it skips another.
	return either(func() (bool, error) { return listedIn(ns, port) })
}

// either reports whether one of two looks finds something.
func either(look func() (bool, error)) (bool, error) {
	if ok, err := look(); ok || err != nil {
		return ok, err
	}
	return look()
}

func listedIn(ns *wg.Space, port uint16) (ok bool, err error) {
	err = ns.Do(func() error {
		for _, file := range []string{"udp", "udp6"} {
			table, err := os.ReadFile("/proc/thread-self/net/" + file)
			if errors.Is(err, fs.ErrNotExist) {
				continue // a kernel without IPv6
			}
			if err != nil {
				return err
			}
			if ok = listed(table, port); ok {
				return nil
			}
		}
		return nil
	})
	return ok, err
}

// listed looks for an unconnected socket with a local port in a table of the
// kernel's:
//
//	sl  local_address rem_address   st ...
//	37: 00000000:CA6C 00000000:0000 07 ...
//
// (udp.c udp4_format_sock, datagram.c __ip6_dgram_sock_seq_show).
func listed(table []byte, port uint16) bool {
	for line := range bytes.Lines(table) {
		f := bytes.Fields(line)
		if len(f) < 4 {
			continue
		}
		local, okL := portOf(f[1])
		remote, okR := portOf(f[2])
		if okL && okR && local == port && remote == 0 {
			return true
		}
	}
	return false
}

func portOf(address []byte) (uint16, bool) {
	_, hex, ok := bytes.Cut(address, []byte(":"))
	n, err := strconv.ParseUint(string(hex), 16, 16)
	return uint16(n), ok && err == nil
}
