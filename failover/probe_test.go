// SPDX-License-Identifier: MIT

package failover

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestProbeSource: it finds that this host can send from an address that it does not
// have, and that it cannot where another rule is in the way; and leaves nothing behind.
func TestProbeSource(t *testing.T) {
	inNamespace(t)
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	for _, vip := range []netip.Addr{v4, v6} {
		if err := ProbeSource(nil, "wg0", vip); !errors.Is(err, ErrNotTried) {
			t.Errorf("%v: without a loopback: %v", vip, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, vip := range []netip.Addr{v4, v6} {
		if err := ProbeSource(nil, "wg0", vip); err != nil {
			t.Errorf("%v: %v", vip, err)
		}
		for name, hook := range map[string]*nftables.ChainHook{
			"forbids": nftables.ChainHookOutput, "does not arrive": nftables.ChainHookInput,
		} {
			// Another table drops what bears the address.
			table := conn.AddTable(&nftables.Table{Name: "theirs", Family: nftables.TableFamilyINet})
			chain := conn.AddChain(&nftables.Chain{
				Name: "c", Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter,
			})
			proto, offset := byte(unix.NFPROTO_IPV4), uint32(12)
			if vip.Is6() {
				proto, offset = unix.NFPROTO_IPV6, 8
			}
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(vip.AsSlice()))},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: vip.AsSlice()},
				&expr.Verdict{Kind: expr.VerdictDrop},
			}})
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
			if err := ProbeSource(nil, "wg0", vip); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%v: another rule is in the way: %v, want that it %s", vip, err, name)
			}
			conn.DelTable(table)
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if tables, err := conn.ListTables(); err != nil || len(tables) > 0 {
		t.Errorf("%d tables are left: %v", len(tables), err)
	}
	if missing, err := Missing(t.Context(), nil, []netip.Addr{v4, netip.MustParseAddr("127.0.0.1")}); err != nil || len(missing) != 1 || missing[0] != v4 {
		t.Errorf("missing are %v: %v", missing, err)
	}
}

func TestCallTime(t *testing.T) {
	const dump, rtt = 100 * time.Millisecond, 30 * time.Millisecond
	for _, c := range []struct {
		peers        int
		kernel, told bool
		want         time.Duration
	}{
		{0, true, true, 0},
		{kernelWindow, true, true, 0},
		{kernelWindow + 1, true, true, rtt},
		{10 * kernelWindow, true, true, 9 * rtt},
		{10 * kernelWindow, true, false, 9 * 2 * dump},
		{10 * userWindow, false, false, 9 * 2 * dump},
	} {
		if got := CallTime(c.peers, c.kernel, c.told, dump, rtt); got != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}
