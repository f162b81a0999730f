// SPDX-License-Identifier: MIT

package wg

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Link is a network link as rtnetlink describes it.
type Link struct {
	Name    string
	Ifindex int
	Up      bool
}

// LinkByName returns a link of the calling thread's network namespace. The error
// wraps ErrNoDevice if there is none of that name.
func LinkByName(name string) (Link, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
			return Link{}, fmt.Errorf("%w: %s: create it, or correct the name", ErrNoDevice, name)
		}
		return Link{}, fmt.Errorf("look up link %s: %w", name, err)
	}
	a := l.Attrs()
	return Link{Name: a.Name, Ifindex: a.Index, Up: a.RawFlags&unix.IFF_UP != 0}, nil
}

// Links returns all links of the calling thread's network namespace.
func Links() ([]Link, error) {
	links, err := netlink.LinkList()
	// An interrupted dump is followed by a change that wakes who watches.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	out := make([]Link, len(links))
	for i, l := range links {
		a := l.Attrs()
		out[i] = Link{Name: a.Name, Ifindex: a.Index, Up: a.RawFlags&unix.IFF_UP != 0}
	}
	return out, nil
}

// uapiDir is where implementations in user space have their sockets.
const uapiDir = "/var/run/wireguard"

// Names returns the names of all WireGuard devices of the calling thread's
// network namespace, sorted. It asks for links and not, as wgctrl would, for
// whole devices: that fails on the socket of an implementation that has died,
// finds those of other namespaces, and no kernel device if the module was loaded
// after the client was opened. The error wraps ErrAccess if there are none to be
// seen, but may be some in user space.
func (c *Client) Names() ([]string, error) {
	links, err := netlink.LinkList()
	// An interrupted dump is followed by a change that wakes who watches.
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var (
		names  []string
		denied error
	)
	for _, l := range links {
		name := l.Attrs().Name
		if l.Type() != "wireguard" {
			if _, err := os.Stat(filepath.Join(uapiDir, name+".sock")); err != nil {
				if errors.Is(err, fs.ErrPermission) {
					denied = err
				}
				continue
			}
		}
		names = append(names, name)
	}
	if len(names) == 0 && denied != nil {
		return nil, fmt.Errorf("%w: run as root or grant CAP_DAC_OVERRIDE: %w", ErrAccess, denied)
	}
	slices.Sort(names)
	return names, nil
}

// WatchLinks calls wake after links of the calling thread's network namespace may
// have appeared, changed or gone, and once at the start. It is only a wake-up; the callee looks
// for itself. It returns when ctx ends, or with an error if the kernel refuses.
func WatchLinks(ctx context.Context, wake func()) error {
	return watch(ctx, "links", wake, func(updates chan<- netlink.LinkUpdate, done <-chan struct{}, failed func(error)) error {
		return netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{ErrorCallback: failed})
	})
}

// WatchAddrs is WatchLinks for the addresses of links.
func WatchAddrs(ctx context.Context, wake func()) error {
	return watch(ctx, "addresses", wake, func(updates chan<- netlink.AddrUpdate, done <-chan struct{}, failed func(error)) error {
		return netlink.AddrSubscribeWithOptions(updates, done, netlink.AddrSubscribeOptions{ErrorCallback: failed})
	})
}

func watch[Update any](ctx context.Context, what string, wake func(), subscribe func(chan<- Update, <-chan struct{}, func(error)) error) error {
	for {
		// Buffered, so that a burst does not overrun the socket while the callee
		// looks.
		updates := make(chan Update, 256)
		done := make(chan struct{})
		failed := make(chan error, 1)
		err := subscribe(updates, done, func(err error) {
			select {
			case failed <- err:
			default:
			}
		})
		if err != nil {
			close(done)
			return fmt.Errorf("watch %s: %w", what, err)
		}
		// Whatever happened before or between two subscriptions.
		wake()
		for open := true; open; {
			select {
			case <-ctx.Done():
				close(done)
				for range updates { // until the library has let go
				}
				return nil
			case _, open = <-updates:
				if open {
					wake()
				}
			}
		}
		close(done)
		// The library ends a subscription on any error, such as ENOBUFS after a
		// burst: subscribe again.
		select {
		case err = <-failed:
		default:
			err = errors.New("subscription ended")
		}
		if errors.Is(err, os.ErrPermission) {
			return fmt.Errorf("watch %s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Netns returns the inode number of the calling thread's network namespace: the
// name that the kernel hook knows it by.
func Netns() (uint32, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return 0, fmt.Errorf("identify network namespace: %w", err)
	}
	return uint32(st.Ino), nil
}
