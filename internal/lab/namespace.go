// SPDX-License-Identifier: MIT

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"

	"github.com/wgroam/wgroam/internal/thread"
)

// namespace is a network namespace with open netlink sockets in it. It has no
// name below /run/netns: this process and its children alone hold it, so that
// it goes when they do, however they end.
type namespace struct {
	name   string // in errors
	handle netns.NsHandle
	nl     *netlink.Handle
	wg     *wgctrl.Client

	work chan func()   // runs on the namespace's own thread
	stop chan struct{} // ends that thread
	gone chan struct{} // closed when it has ended
}

// newNamespace makes a namespace. On error nothing is left.
func newNamespace(name string) (*namespace, error) {
	n := &namespace{
		name:   name,
		handle: netns.None(),
		work:   make(chan func()),
		stop:   make(chan struct{}),
		gone:   make(chan struct{}),
	}
	ready := make(chan error)
	thread.Go(func() {
		defer close(n.gone)
		var err error
		n.handle, err = netns.New()
		if err == nil {
			err = sysctls(
				// A new namespace copies these from the host for IPv4.
				"ipv4/conf/all/rp_filter", "0",
				"ipv4/conf/default/rp_filter", "0",
				// Duplicate address detection would hold every IPv6 address back for a second.
				"ipv6/conf/all/accept_dad", "0",
				"ipv6/conf/default/accept_dad", "0",
			)
		}
		ready <- err
		for {
			select {
			case f := <-n.work:
				f()
			case <-n.stop:
				return
			}
		}
	})
	if err := <-ready; err != nil {
		return nil, errors.Join(fmt.Errorf("make network namespace for %s (needs root): %w", name, err), n.close())
	}
	var err error
	if n.nl, err = netlink.NewHandleAt(n.handle, unix.NETLINK_ROUTE); err == nil {
		err = n.openWG()
	}
	if err == nil {
		err = n.linkUp("lo")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set up network namespace of %s: %w", name, err), n.close())
	}
	return n, nil
}

// openWG opens the WireGuard client, or opens it again: it is of no use any more
// when the module has been loaded anew.
func (n *namespace) openWG() error {
	if n.wg != nil {
		if err := n.wg.Close(); err != nil {
			return err
		}
	}
	return n.do(func() (err error) {
		n.wg, err = wgctrl.New()
		return err
	})
}

func (n *namespace) close() error {
	close(n.stop)
	<-n.gone
	if n.nl != nil {
		n.nl.Close()
	}
	var err error
	if n.wg != nil {
		err = n.wg.Close()
	}
	if n.handle.IsOpen() {
		err = errors.Join(err, n.handle.Close())
	}
	return err
}

// do runs f on a thread in the namespace and returns its error. It may be
// called from within f.
func (n *namespace) do(f func() error) error {
	err := errors.New("the function ended its goroutine")
	done := make(chan struct{})
	thread.Go(func() {
		defer close(done)
		if e := netns.Set(n.handle); e != nil {
			err = fmt.Errorf("enter network namespace of %s: %w", n.name, e)
			return
		}
		err = f()
	})
	<-done
	return err
}

// start starts cmd in the namespace. The kernel kills the process when this
// process dies or the namespace is closed, unless cmd has a SysProcAttr of its
// own.
func (n *namespace) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		// The signal follows the death of the thread that forks, so that has to be
		// the one that lives as long as the namespace.
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	}
	err := make(chan error, 1)
	select {
	case n.work <- func() { err <- cmd.Start() }:
		return <-err
	case <-n.gone:
		return fmt.Errorf("start %s: the network namespace of %s is closed", cmd.Path, n.name)
	}
}

// link finds a link. A closed netlink.Handle would look for it in the namespace
// of the calling thread.
func (n *namespace) link(name string) (netlink.Link, error) {
	select {
	case <-n.gone:
		return nil, fmt.Errorf("the network namespace of %s is closed", n.name)
	default:
		return n.nl.LinkByName(name)
	}
}

// delay makes what leaves a link do so later.
func (n *namespace) delay(name string, by time.Duration) error {
	link, err := n.link(name)
	if err != nil {
		return err
	}
	attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	netem := netlink.NewNetem(attrs, netlink.NetemQdiscAttrs{Latency: uint32(by.Microseconds()), Limit: 10_000})
	if err := n.nl.QdiscAdd(netem); err != nil {
		return fmt.Errorf("delay what leaves %s (modprobe sch_netem): %w", name, err)
	}
	return nil
}

func (n *namespace) linkUp(name string) error {
	link, err := n.link(name)
	if err == nil {
		err = n.nl.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	return nil
}

func (n *namespace) linkDown(name string) error {
	link, err := n.link(name)
	if err == nil {
		err = n.nl.LinkSetDown(link)
	}
	if err != nil {
		return fmt.Errorf("set link %s down: %w", name, err)
	}
	return nil
}

// sysctls writes pairs of path below /proc/sys/net and value, in the namespace
// of the calling thread.
func sysctls(pairs ...string) error {
	for i := 0; i < len(pairs); i += 2 {
		if err := os.WriteFile("/proc/sys/net/"+pairs[i], []byte(pairs[i+1]), 0); err != nil {
			return err
		}
	}
	return nil
}
