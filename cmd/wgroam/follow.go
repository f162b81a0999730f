// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wgroam/wgroam/internal/wg"
)

// retryDelay is how long a link that cannot be used yet is left alone: one that
// is not a WireGuard device (a user space implementation may be on its way), has
// no private key, or fails otherwise. The kernel says nothing when that changes.
const retryDelay = time.Second

// follow runs session while a link called name exists: each time one appears,
// until it is gone or is another one. It waits for a link that does not exist,
// and says so once by absent. It returns nil when ctx ends, or the error of a
// session that no waiting can help.
func follow(ctx context.Context, name string, log *slog.Logger, absent func(error),
	session func(context.Context, wg.Link) error,
) error {
	wake := make(chan struct{}, 1)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return wg.WatchLinks(ctx, func() {
			select {
			case wake <- struct{}{}:
			default:
			}
		})
	})
	g.Go(func() error {
		var (
			current wg.Link
			cancel  context.CancelFunc
			ended   chan error // of the running session; nil when none runs
			retry   <-chan time.Time
			last    string // the last complaint
		)
		complain := func(err error) {
			if err.Error() != last {
				last = err.Error()
				absent(err)
			}
		}
		for {
			select {
			case <-ctx.Done():
				if ended != nil {
					cancel()
					return hopeless(<-ended)
				}
				return nil
			case err := <-ended:
				cancel()
				ended = nil
				if hopeless(err) != nil {
					return err
				}
				if err != nil {
					complain(err)
				}
				retry = time.After(retryDelay)
				continue
			case <-retry:
			case <-wake:
			}
			link, err := wg.LinkByName(name)
			if err != nil && !errors.Is(err, wg.ErrNoDevice) {
				log.Warn("cannot look up link", "device", name, "err", err)
				continue
			}
			if ended != nil {
				if err != nil || link.Ifindex != current.Ifindex {
					// It ends, and is waited for above.
					cancel()
				}
				continue
			}
			if err != nil {
				complain(err)
				continue
			}
			sctx, stop := context.WithCancel(ctx)
			cancel, current, ended, retry, last = stop, link, make(chan error, 1), nil, ""
			go func() { ended <- session(sctx, link) }()
		}
	})
	return g.Wait()
}

// hopeless returns err if neither time nor a new link will mend it. All else is
// this device's trouble, and no reason to leave the others alone.
func hopeless(err error) error {
	if errors.Is(err, wg.ErrPrivilege) {
		return err
	}
	return nil
}
