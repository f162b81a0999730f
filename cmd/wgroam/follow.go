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

// watchDelay and watchDelayMax are how long after a failure links are watched
// again: doubling, for as long as it fails.
const (
	watchDelay    = 100 * time.Millisecond
	watchDelayMax = 10 * time.Second
)

// spaceInterval is how often the name of a namespace is looked up: nothing tells
// when it is deleted, or made again for another one.
const spaceInterval = time.Second

// place is where a device is to be found.
type place struct {
	netns string // as in config.Device: "" for ours
	name  string
}

// life runs while a link exists that has the device's name, in its namespace; nil
// for ours.
type life func(ctx context.Context, space *wg.Space, link wg.Link) error

// follow runs session while there is such a link: each time one appears, until
// it is gone or is another one. It waits for a link, or a namespace, that does
// not exist, and says so once by absent. It returns nil when ctx ends, or the
// error of a session that no waiting can help.
func follow(ctx context.Context, at place, log *slog.Logger, absent func(error), session life) error {
	return inSpace(ctx, at.netns, absent, func(ctx context.Context, space *wg.Space) error {
		return followLink(ctx, space, at.name, log, absent, session)
	})
}

// inSpace runs f in a network namespace, as in config.Device: each time it is made,
// until it has lost its name. It says once by absent that there is none. It
// returns nil when ctx ends, or an error that no waiting can help.
func inSpace(ctx context.Context, netns string, absent func(error), f func(context.Context, *wg.Space) error) error {
	if netns == "" {
		return f(ctx, nil)
	}
	last := "" // the last complaint
	for {
		space, err := wg.OpenSpace(netns)
		switch {
		case hopeless(err) != nil:
			return err
		case err == nil:
			last = ""
			if err := whileNamed(ctx, space, f); err != nil {
				return err
			}
		case err.Error() != last:
			last = err.Error()
			absent(err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(spaceInterval):
		}
	}
}

// openSpace opens a network namespace, as in config.Device: a nil Space for ours.
func openSpace(netns string) (*wg.Space, error) {
	if netns == "" {
		return nil, nil
	}
	return wg.OpenSpace(netns)
}

// whileNamed runs f in a namespace, until that has lost its name. It closes the
// namespace, which lives as long as somebody holds it.
func whileNamed(ctx context.Context, space *wg.Space, f func(context.Context, *wg.Space) error) error {
	defer space.Close()
	inside, leave := context.WithCancel(ctx)
	g, inside := errgroup.WithContext(inside)
	g.Go(func() error { return f(inside, space) })
	g.Go(func() error {
		tick := time.NewTicker(spaceInterval)
		defer tick.Stop()
		for space.Current() {
			select {
			case <-inside.Done():
				return nil
			case <-tick.C:
			}
		}
		leave()
		return nil
	})
	err := g.Wait()
	leave()
	return err
}

// followLink is follow in a namespace that is there.
func followLink(ctx context.Context, space *wg.Space, name string, log *slog.Logger, absent func(error), session life) error {
	wake := make(chan struct{}, 1)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return watchLinks(ctx, space, log, func() {
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
			moved   bool   // the running session is ending, for its link is not ours any more
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
				delay := retryDelay
				if moved {
					delay = 0 // its successor may be there, and nobody will say so again
				}
				retry, moved = time.After(delay), false
				continue
			case <-retry:
			case <-wake:
			}
			link, err := linkByName(space, name)
			if err != nil && !errors.Is(err, wg.ErrNoDevice) {
				log.Warn("cannot look up the link; trying again", "err", err)
				retry = time.After(retryDelay)
				continue
			}
			if ended != nil {
				if err != nil || link.Ifindex != current.Ifindex {
					// It ends, and is waited for above.
					moved = true
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
			go func() { ended <- session(sctx, space, link) }()
		}
	})
	return g.Wait()
}

// watchLinks is wg.WatchLinks in a namespace, again and again. Links that come
// between two attempts are found at each.
func watchLinks(ctx context.Context, space *wg.Space, log *slog.Logger, wake func()) error {
	return again(ctx, log, "cannot watch links; trying again", func() error {
		wake()
		return space.Do(func() error { return wg.WatchLinks(ctx, wake) })
	})
}

// again runs f until ctx ends, again and again where it fails, as it does without a
// file descriptor to be had. It returns an error that no waiting can help.
func again(ctx context.Context, log *slog.Logger, complaint string, f func() error) error {
	for delay := watchDelay; ; delay = min(2*delay, watchDelayMax) {
		began := time.Now()
		err := f()
		if ctx.Err() != nil || hopeless(err) != nil {
			return hopeless(err)
		}
		if time.Since(began) > watchDelayMax {
			delay = watchDelay // it worked for a while
		}
		log.Warn(complaint, "in", delay, "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
}

// linkByName is wg.LinkByName in a namespace.
func linkByName(space *wg.Space, name string) (link wg.Link, err error) {
	err = space.Do(func() (err error) {
		link, err = wg.LinkByName(name)
		return err
	})
	return link, err
}

// hopeless returns err if neither time nor a new link will mend it. All else is
// this device's trouble, and no reason to leave the others alone.
func hopeless(err error) error {
	if errors.Is(err, wg.ErrPrivilege) {
		return err
	}
	return nil
}
