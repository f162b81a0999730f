// SPDX-License-Identifier: MIT

package wg

import (
	"crypto/hmac"
	"crypto/sha256"
	"net"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
)

// TestSetupOf: a hash changes with what it is of, and with nothing else.
func TestSetupOf(t *testing.T) {
	network := func(s string) net.IPNet {
		_, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		return *n
	}
	a, b := network("10.1.0.0/16"), network("fd00::/64")
	base := wgtypes.Peer{PublicKey: wgtypes.Key{1}, PresharedKey: wgtypes.Key{2}, AllowedIPs: []net.IPNet{a, b}}
	mapped := func(last byte) net.IPNet {
		return net.IPNet{IP: net.IPv4(192, 0, 2, last).To16(), Mask: net.CIDRMask(128, 128)}
	}
	mac := hmac.New(sha256.New, []byte("a group's key"))
	if m, n := (wgtypes.Peer{AllowedIPs: []net.IPNet{mapped(1)}}), (wgtypes.Peer{AllowedIPs: []net.IPNet{mapped(2)}}); setupOf(mac, &m) == setupOf(mac, &n) {
		t.Error("IPv4 addresses mapped to IPv6 are all the same")
	}
	want := setupOf(mac, &base)
	if want.AllowedIPs == want.PresharedKey {
		t.Error("two hashes are equal")
	}
	for name, c := range map[string]struct {
		change   func(*wgtypes.Peer)
		ips, psk bool // change
	}{
		"order":         {func(p *wgtypes.Peer) { p.AllowedIPs = []net.IPNet{b, a} }, false, false},
		"keepalive":     {func(p *wgtypes.Peer) { p.PersistentKeepaliveInterval = 25 }, false, false},
		"less":          {func(p *wgtypes.Peer) { p.AllowedIPs = []net.IPNet{a} }, true, false},
		"bits":          {func(p *wgtypes.Peer) { p.AllowedIPs = []net.IPNet{network("10.1.0.0/17"), b} }, true, false},
		"none":          {func(p *wgtypes.Peer) { p.AllowedIPs = nil }, true, false},
		"preshared key": {func(p *wgtypes.Peer) { p.PresharedKey[31] = 1 }, false, true},
		"no psk":        {func(p *wgtypes.Peer) { p.PresharedKey = wgtypes.Key{} }, false, true},
		// Or one could see which peers have the same.
		"peer": {func(p *wgtypes.Peer) { p.PublicKey = wgtypes.Key{3} }, true, true},
	} {
		p := base
		c.change(&p)
		if got := setupOf(mac, &p); (got.AllowedIPs != want.AllowedIPs) != c.ips || (got.PresharedKey != want.PresharedKey) != c.psk {
			t.Errorf("%s: got %+v, of %+v", name, got, want)
		}
	}
	if other := setupOf(hmac.New(sha256.New, []byte("another one's")), &base); other.AllowedIPs == want.AllowedIPs || other.PresharedKey == want.PresharedKey {
		t.Error("another group has the same hash")
	}
}

// BenchmarkSetups is what a comparison of devices costs on top of reading one.
func BenchmarkSetups(b *testing.B) {
	const n = 100_000
	peers := make([]wgtypes.Peer, n)
	for i := range peers {
		peers[i].PublicKey = wgtypes.Key{byte(i >> 16), byte(i >> 8), byte(i)}
		peers[i].AllowedIPs = []net.IPNet{
			{IP: net.IP{10, byte(i >> 16), byte(i >> 8), byte(i)}, Mask: net.CIDRMask(32, 32)},
			{IP: net.IP{0: 0xfd, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)}, Mask: net.CIDRMask(128, 128)},
		}
	}
	mac := hmac.New(sha256.New, make([]byte, 32))
	for b.Loop() {
		list := make([]wgroam.Setup, n)
		for i := range peers {
			list[i] = setupOf(mac, &peers[i])
		}
		wgroam.NewSetups(0, list)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/peer")
}
