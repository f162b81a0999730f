// SPDX-License-Identifier: MIT

package wg

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/wgroam/wgroam/internal/lab"
)

func TestLinkByName(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	look := func(name string) (link Link, err error) {
		_ = gw.Do(func() error {
			link, err = LinkByName(name)
			return nil
		})
		return link, err
	}
	if _, err := look("nothing"); !errors.Is(err, ErrNoDevice) {
		t.Errorf("a link that is not there: error %v", err)
	}
	link, err := look(gw.Device())
	if err != nil || link.Name != gw.Device() || link.Ifindex <= 0 || !link.Up {
		t.Errorf("link %+v, error %v", link, err)
	}
	if err := gw.LinkDown(); err != nil {
		t.Fatal(err)
	}
	if down, err := look(gw.Device()); err != nil || down.Up || down.Ifindex != link.Ifindex {
		t.Errorf("link %+v after it was set down, error %v", down, err)
	}
}

func TestNetns(t *testing.T) {
	l := newLab(t, lab.Config{})
	seen := map[uint32]bool{}
	for _, gw := range l.Gateways {
		err := gw.Do(func() error {
			ino, err := Netns()
			seen[ino] = true
			if st, e := os.Stat(gw.NetNS()); e != nil || uint32(st.Sys().(*syscall.Stat_t).Ino) != ino {
				t.Errorf("gateway %s is in namespace %d, want %d (error %v)", gw.Name, ino, st.Sys().(*syscall.Stat_t).Ino, e)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	if ino, err := Netns(); err != nil || seen[ino] || len(seen) != 2 {
		t.Errorf("three namespaces are %v and %d, error %v", seen, ino, err)
	}
}

// links watches the links of a gateway.
type links struct {
	wakes  atomic.Int64
	block  atomic.Pointer[chan struct{}] // what the callee waits for
	cancel context.CancelFunc
	done   chan error
}

func watchLinks(t *testing.T, gw *lab.Gateway) *links {
	t.Helper()
	w := &links{done: make(chan error, 1)}
	var ctx context.Context
	ctx, w.cancel = context.WithCancel(t.Context())
	go func() {
		w.done <- gw.Do(func() error {
			return WatchLinks(ctx, func() {
				w.wakes.Add(1)
				if c := w.block.Load(); c != nil {
					<-*c
				}
			})
		})
	}()
	await(t, "the first wake-up", func() bool { return w.wakes.Load() > 0 })
	return w
}

// woken fails unless f wakes the callee.
func (w *links) woken(t *testing.T, what string, f func() error) {
	t.Helper()
	before := w.wakes.Load()
	if err := f(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	await(t, "wake-up by "+what, func() bool { return w.wakes.Load() > before })
}

func (w *links) stop(t *testing.T) {
	t.Helper()
	w.cancel()
	if err := <-w.done; err != nil {
		t.Error(err)
	}
}

func TestWatchLinks(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	w := watchLinks(t, gw)
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "new0"}, PeerName: "new1"}
	in := func(f func() error) func() error { return func() error { return gw.Do(f) } }
	w.woken(t, "a link that is added", in(func() error { return netlink.LinkAdd(link) }))
	w.woken(t, "a link that goes up", in(func() error { return netlink.LinkSetUp(link) }))
	w.woken(t, "a link that is renamed", in(func() error {
		if err := netlink.LinkSetDown(link); err != nil {
			return err
		}
		return netlink.LinkSetName(link, "new2")
	}))
	w.woken(t, "a link that is deleted", in(func() error { return netlink.LinkDel(link) }))
	w.stop(t)
}

// TestWatchLinksEnds: at once, also while the callee has much to catch up on.
func TestWatchLinksEnds(t *testing.T) {
	l := newLab(t, lab.Config{})
	for range 20 {
		w := watchLinks(t, l.Gateways[0])
		w.stop(t)
	}
	w := watchLinks(t, l.Gateways[0])
	release := make(chan struct{})
	w.block.Store(&release)
	churn(t, l.Gateways[0], 100)
	w.cancel()
	close(release)
	if err := <-w.done; err != nil {
		t.Error(err)
	}
}

// TestWatchLinksOverrun: more news than the socket can hold while the callee is
// busy. It is woken after the last of them, and by what comes later.
func TestWatchLinksOverrun(t *testing.T) {
	l := newLab(t, lab.Config{})
	gw := l.Gateways[0]
	w := watchLinks(t, gw)
	release := make(chan struct{})
	w.block.Store(&release)
	churn(t, gw, 1000)
	w.block.Store(nil)
	w.woken(t, "the end of the storm", func() error { close(release); return nil })
	for range 3 {
		w.woken(t, "a link that changes after the storm", func() error { churn(t, gw, 2); return nil })
	}
	w.stop(t)
}

// churn changes a link n times.
func churn(t *testing.T, gw *lab.Gateway, n int) {
	t.Helper()
	err := gw.Do(func() error {
		link, err := netlink.LinkByName("lan0")
		for i := 0; i < n && err == nil; i++ {
			err = netlink.LinkSetMTU(link, 1400+i%2)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
