// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/wg"
)

// WatchVIP tells whether one of the addresses is on a link of the calling thread's
// network namespace: at the start, and after each change of addresses. It returns
// when ctx ends, or with an error if the kernel refuses.
func WatchVIP(ctx context.Context, vips []netip.Addr, here func(bool)) error {
	var failed error
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err := wg.WatchAddrs(ctx, func() {
		has, err := hasOne(ctx, vips, addresses)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			failed = err
			cancel()
		default:
			here(has)
		}
	})
	return errors.Join(failed, err)
}

// unusable are the addresses that the kernel does not use (yet), or not any more.
const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED

// addresses lists the addresses of all links.
func addresses() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) }

// dumpAgain is how long after an interrupted dump the next one begins.
const dumpAgain = 10 * time.Millisecond

// hasOne reports whether one of the addresses is on a link, until ctx ends. In a
// dump that was interrupted something may be missing, which would demote a node that
// peers rely on.
func hasOne(ctx context.Context, vips []netip.Addr, list func() ([]netlink.Addr, error)) (bool, error) {
	for {
		addrs, err := list()
		interrupted := errors.Is(err, netlink.ErrDumpInterrupted)
		if err != nil && !interrupted {
			return false, fmt.Errorf("list addresses: %w", err)
		}
		if slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return isUsable(a) && isOneOf(vips, a) }) {
			return true, nil
		}
		if !interrupted {
			return false, nil
		}
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(dumpAgain):
		}
	}
}

func isOneOf(vips []netip.Addr, a netlink.Addr) bool {
	addr, ok := netip.AddrFromSlice(a.IP)
	return ok && slices.Contains(vips, addr.Unmap())
}

func isUsable(a netlink.Addr) bool {
	optimistic := a.Flags&unix.IFA_F_OPTIMISTIC != 0
	return a.Flags&unusable == 0 || optimistic && a.Flags&unix.IFA_F_DADFAILED == 0
}
