// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"

	"github.com/vishvananda/netlink"
)

// TestHasOne: an address that is missing in an interrupted dump is not absent, and
// one that is in it is there.
func TestHasOne(t *testing.T) {
	addr := func(s string) netlink.Addr { return netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(s)}} }
	other, vip := addr("192.0.2.9"), addr("192.0.2.1")
	broken := errors.New("broken")
	type dump struct {
		addrs []netlink.Addr
		err   error
	}
	for _, tt := range []struct {
		name  string
		dumps []dump // the last one again and again
		has   bool
		err   error
	}{
		{"there", []dump{{[]netlink.Addr{other, vip}, nil}}, true, nil},
		{"absent", []dump{{[]netlink.Addr{other}, nil}}, false, nil},
		{"there, interrupted", []dump{{[]netlink.Addr{vip}, netlink.ErrDumpInterrupted}}, true, nil},
		{"there after two that were interrupted", []dump{{nil, netlink.ErrDumpInterrupted}, {[]netlink.Addr{other}, netlink.ErrDumpInterrupted}, {[]netlink.Addr{other, vip}, nil}}, true, nil},
		{"absent after one that was interrupted", []dump{{nil, netlink.ErrDumpInterrupted}, {[]netlink.Addr{other}, nil}}, false, nil},
		{"broken", []dump{{nil, broken}}, false, broken},
		{"interrupted for ever", []dump{{nil, netlink.ErrDumpInterrupted}}, false, context.DeadlineExceeded},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 100*dumpAgain)
				defer cancel()
				left := tt.dumps
				has, err := hasOne(ctx, []netip.Addr{netip.MustParseAddr("192.0.2.1")}, func() ([]netlink.Addr, error) {
					d := left[0]
					if len(left) > 1 {
						left = left[1:]
					}
					return d.addrs, d.err
				})
				if has != tt.has || !errors.Is(err, tt.err) {
					t.Errorf("%v, error %v; want %v, %v", has, err, tt.has, tt.err)
				}
			})
		})
	}
}
