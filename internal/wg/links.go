// SPDX-License-Identifier: MIT

package wg

import (
	"context"
	"errors"
	"fmt"
	"os"
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

// LinkByName returns a link of this network namespace. The error wraps
// ErrNoDevice if there is none of that name.
func LinkByName(name string) (Link, error) {
	l, err := netlink.LinkByName(name)
	if err != nil {
		if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
			return Link{}, fmt.Errorf("%w: %s", ErrNoDevice, name)
		}
		return Link{}, fmt.Errorf("look up link %s: %w", name, err)
	}
	a := l.Attrs()
	return Link{Name: a.Name, Ifindex: a.Index, Up: a.RawFlags&unix.IFF_UP != 0}, nil
}

// WatchLinks calls wake after links of this network namespace may have appeared,
// changed or gone, and once at the start. It is only a wake-up; the callee looks
// for itself. It returns when ctx ends, or with an error if the kernel refuses.
func WatchLinks(ctx context.Context, wake func()) error {
	for {
		// Buffered, so that a burst of links does not overrun the socket while
		// the callee looks.
		updates := make(chan netlink.LinkUpdate, 256)
		done := make(chan struct{})
		failed := make(chan error, 1)
		err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{
			ErrorCallback: func(err error) {
				select {
				case failed <- err:
				default:
				}
			},
		})
		if err != nil {
			close(done)
			return fmt.Errorf("watch links: %w", err)
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
			return fmt.Errorf("watch links: %w", err)
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
