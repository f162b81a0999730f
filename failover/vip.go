// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

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
		has, err := hasOne(vips)
		if err != nil {
			failed = err
			cancel()
			return
		}
		here(has)
	})
	return errors.Join(failed, err)
}

// unusable are the addresses that the kernel does not use (yet), or not any more.
const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED

// hasOne reports whether one of the addresses is on a link.
func hasOne(vips []netip.Addr) (bool, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	// An interrupted dump is followed by the change that interrupted it.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return false, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		addr, ok := netip.AddrFromSlice(a.IP)
		optimistic := a.Flags&unix.IFA_F_OPTIMISTIC != 0
		if ok && slices.Contains(vips, addr.Unmap()) && (a.Flags&unusable == 0 || optimistic && a.Flags&unix.IFA_F_DADFAILED == 0) {
			return true, nil
		}
	}
	return false, nil
}
