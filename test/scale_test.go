// SPDX-License-Identifier: MIT

package test

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/lab"
	"github.com/wgroam/wgroam/internal/lab/crowd"
	"github.com/wgroam/wgroam/internal/natsd"
	"github.com/wgroam/wgroam/internal/wg"
)

// promotion is that of a gateway that has a crowd of peers.
type promotion struct {
	kernel  bool
	peers   int
	outages []time.Duration // of those that answered: from the virtual IP to the first packet in a session
	cookies int             // with which the gateway has said that it is under load
	*control.Promotion
}

// promote lets a standby take over a crowd of silent peers, whose endpoints it has
// from another node.
func promote(t testing.TB, size int) promotion {
	t.Helper()
	l := newLab(t, lab.Config{Gateways: []string{"a", "h", "x"}, OwnSource: true})
	h, x := l.Gateways[1], l.Gateways[2]
	peers, err := crowd.New(l, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(peers.Close)
	keys := make([]wgroam.Key, size)
	for i := range keys {
		keys[i] = peers.Key(i)
	}
	for chunk := range slices.Chunk(keys, wg.ChunkPeers) {
		var cfg wgtypes.Config
		for _, k := range chunk {
			cfg.Peers = append(cfg.Peers, wgtypes.PeerConfig{PublicKey: wgtypes.Key(k)})
		}
		if err := h.WG().ConfigureDevice(h.Device(), cfg); err != nil {
			t.Fatal(err)
		}
	}

	// The other node lives in this process, and its server in the namespace.
	d, err := x.WG().Device(x.Device())
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := feed.Derive(d.PrivateKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	var server *natsd.Server
	if err := x.Do(func() (err error) {
		server, err = natsd.Start(t.Context(), netip.AddrPortFrom(x.Addr4, 4950).String(), slog.New(slog.DiscardHandler))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Shutdown)
	server.AddGroup(sealed)
	other := startMember(t, "gw-x", sealed, server, nil, keys)
	dir := t.TempDir()
	n := startNode(t, h, dir, roleConfig(h, dir, fmt.Sprintf("role = \"auto\"\nvip = [%q, %q]", lab.VIP4, lab.VIP6), "", x))
	n.awaitNodes(1)
	for i, k := range keys {
		other.observe(k, peers.Endpoint(i))
	}
	awaitFor(t, 10*patience, "the standby has all endpoints", func() (bool, string) {
		s := n.status()
		return s.Applied >= uint64(size) && s.Failover.State == "quiet", fmt.Sprintf("%d of %d", s.Applied, size)
	})

	began := time.Now()
	if err := l.MoveVIP(h); err != nil {
		t.Fatal(err)
	}
	out := promotion{kernel: l.Kernel, peers: size}
	// Its status is not asked for meanwhile, which takes the daemon's time.
	awaitFor(t, 10*patience, "the promotion is over", func() (bool, string) {
		said := n.stderr.String()
		return strings.Contains(said, "msg=promoted"), said
	})
	out.Promotion = n.awaitState("open").Promotion
	for _, at := range peers.Sessions() {
		if !at.IsZero() {
			out.outages = append(out.outages, at.Sub(began))
		}
	}
	out.cookies = peers.Cookies()
	if s := peers.Strangers(); len(s) > 0 {
		t.Errorf("packets came from others than the virtual IP: %v", s)
	}
	return out
}

// TestPromotionAtScale: more peers than WireGuard can hear at once are called in
// such a way that it is never under load, and all have a session in the end.
func TestPromotionAtScale(t *testing.T) {
	size := 1000
	if lab.InVM() {
		size = 100 // Or the crowd takes longer to answer than WireGuard waits.
	}
	p := promote(t, size)
	t.Logf("%+v; outage of half of them %v, of 99 %% %v", p.Promotion, quantile(p.outages, 0.5), quantile(p.outages, 0.99))
	if p.Answered != size || p.Called != size || len(p.outages) != size {
		t.Errorf("%d of %d were called, %d answered, and %d have a session", p.Called, size, p.Answered, len(p.outages))
	}
	if p.cookies != 0 {
		t.Errorf("the gateway was under load: it sent %d cookies", p.cookies)
	}
}

// BenchmarkPromotion promotes a gateway with 1, 1 000 and 10 000 silent peers.
func BenchmarkPromotion(b *testing.B) {
	var all []promotion
	sizes := []int{1, 1_000, 10_000}
	for _, size := range sizes {
		b.Run(fmt.Sprintf("peers=%d", size), func(b *testing.B) {
			all = append(all, promote(b, size))
			p := all[len(all)-1]
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(quantile(p.outages, 0.5).Seconds()*1e3, "ms-p50")
			b.ReportMetric(quantile(p.outages, 0.99).Seconds()*1e3, "ms-p99")
			if len(all) == len(sizes) {
				b.Logf("%s, %s: from when the virtual IP moves to the first authenticated packet at the peer. The peers are silent, and known\n"+
					"from another node's records. They are emulated by this process, whose time is in the numbers. Cookies: answers that\n"+
					"the gateway did not take because it was under load.\n%s", kernel(), implementation(p.kernel), promotions(all))
			}
		})
	}
}

func implementation(kernel bool) string {
	if kernel {
		return "the kernel's WireGuard"
	}
	return "wireguard-go"
}

func promotions(all []promotion) string {
	return columns(func(w io.Writer) {
		fmt.Fprintln(w, "peers\tcalled\tanswered\tsilent\tcookies\toutage p50\tp99\tworst\ttook\t")
		for _, p := range all {
			q := func(q float64) time.Duration { return quantile(p.outages, q).Round(time.Millisecond) }
			fmt.Fprintf(w, "%d\t%d\t%d\t%d\t%d\t%v\t%v\t%v\t%v\t\n", p.peers, p.Called, p.Answered, p.Silent, p.cookies,
				q(0.5), q(0.99), q(1), p.Ended.Sub(p.Began).Round(time.Millisecond))
		}
	})
}
