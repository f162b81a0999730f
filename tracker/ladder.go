// SPDX-License-Identifier: MIT

package tracker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/wgroam/wgroam/internal/wg"
)

// Rung is a source of observations.
type Rung string

// The rungs, best first.
const (
	RungFentry  Rung = "fentry"
	RungKprobe  Rung = "kprobe"
	RungPort    Rung = "port"
	RungPolling Rung = "polling"
	RungNone    Rung = "none"
)

// errUserspace is why the kernel hook is of no use for a device.
var errUserspace = errors.New("the device is a user space implementation, which the kernel hook cannot see")

// rejectAfter is how long a session lives at most, in every implementation
// (messages.h REJECT_AFTER_TIME). When the program at the port has been there for
// so long, it has seen the handshakes of all sessions.
const rejectAfter = 180 * time.Second

// lookEvery is how often the tracker looks whether the device's socket is still
// where it was, or there again.
const lookEvery = time.Second

// ladder is a tracker's place, of its Run goroutine.
type ladder struct {
	tap *tap // on the rung port; else nil
	// What a dump has said of the device, that the rungs depend on.
	port       uint16
	kernel     bool
	peerCount  int
	suppressed uint64 // hints, before the newest dump
	// Why the better rungs do not work; nil where they do, or were not tried.
	hookErr, portErr error
}

// saw notes what a dump says of the device.
func (l *ladder) saw(d wg.Device) {
	l.port, l.kernel, l.peerCount = uint16(d.Port), d.Kernel, len(d.Peers)
}

// hooked reports whether a rung is one of the kernel hook.
func hooked(r Rung) bool { return r == RungFentry || r == RungKprobe }

// Completes reports whether Config.Completed is called on a rung.
func (r Rung) Completes() bool { return hooked(r) || r == RungPort }

// climb takes the best rung that works. It reports whether that is another one
// than before: what fell between has to be read from the device then.
func (t *Tracker) climb() (other bool) {
	if hooked(t.Status().Rung) {
		return false
	}
	if rung, err := t.climbHook(); err == nil {
		t.stepOff()
		t.ladder.portErr = nil // what was wrong there does not matter now
		t.choose(rung)
		return true
	}
	return t.climbPort()
}

func (t *Tracker) climbHook() (Rung, error) {
	t.ladder.hookErr = errUserspace
	if !t.ladder.kernel {
		return RungNone, errUserspace
	}
	// What the hook remembers of the device from before is for the dump to say.
	boot, err := bootTime()
	if err != nil {
		return RungNone, err
	}
	t.mu.Lock()
	t.dumped, t.hookErr = max(t.dumped, boot), nil
	t.mu.Unlock()
	fallback, err := t.cfg.Kernel.follow(t.id(), t.ladder.peerCount, &subscriber{
		event: t.event, settled: t.settled, lost: t.lost, silent: t.wantDump,
		broken: t.hookBreaks,
	})
	switch {
	case err != nil:
		t.ladder.hookErr = err
		return RungNone, err
	case fallback != nil:
		t.ladder.hookErr = fallback
		return RungKprobe, nil
	}
	t.ladder.hookErr = nil
	return RungFentry, nil
}

// climbPort takes the rung port, or else polling.
func (t *Tracker) climbPort() (other bool) {
	if t.ladder.tap != nil {
		t.choose(RungPort)
		return false
	}
	t.mu.Lock()
	t.sessions, t.unnamed, t.strays, t.hinted, t.since = newSessions(), nil, hints{}, 0, time.Now()
	for _, p := range t.peers {
		p.heard = false // of sessions that are older than the program there will be no hint
	}
	t.mu.Unlock()
	t.ladder.tap, t.ladder.portErr = t.cfg.Port.follow(t.cfg.Space, t.ladder.port, t.ladder.peerCount,
		&portSubscriber{
			event: t.uplinkEvent, foreign: t.wantDump, lost: t.uplinkLost,
			broken: func(error) { t.wakeBroken() }, // the tap knows why
		})
	if t.ladder.portErr != nil {
		t.choose(RungPolling)
		return false
	}
	t.ladder.suppressed = 0
	t.mu.Lock()
	t.since = time.Now() // from now on all is heard, and all before was young
	t.mu.Unlock()
	t.choose(RungPort)
	return true
}

// stepOff leaves the rung port.
func (t *Tracker) stepOff() {
	if t.ladder.tap == nil {
		return
	}
	if err := t.ladder.tap.close(); err != nil {
		t.cfg.Log.Warn("cannot let go of a UDP port", "port", t.ladder.tap.port, "err", err)
	}
	t.ladder.tap = nil
}

// fall leaves a rung that broke. It is not tried again before the next sweep. It
// reports whether there was one: the news may be of one that has been left.
func (t *Tracker) fall() bool {
	t.mu.Lock()
	hookErr := t.hookErr
	t.hookErr = nil
	t.mu.Unlock()
	rung := t.Status().Rung
	switch {
	case t.ladder.tap != nil && t.ladder.tap.s.alive() != nil:
		t.ladder.portErr = t.ladder.tap.s.alive()
		t.stepOff()
		t.choose(RungPolling)
	case hooked(rung) && hookErr != nil:
		t.ladder.hookErr = hookErr
		t.climbPort()
	default:
		return false
	}
	return true
}

// look looks after the device's socket: whether it is still at its port, or, if
// there was none, whether there is one now.
func (t *Tracker) look(ctx context.Context) error {
	if hooked(t.Status().Rung) {
		return nil // what was wrong with the port before does not matter
	}
	switch {
	case t.ladder.tap == nil && !errors.Is(t.ladder.portErr, errNoSocket) && !errors.Is(t.ladder.portErr, errTaken):
		return nil // on a better rung, or no socket would help
	case t.ladder.tap != nil:
		ok, err := t.ladder.tap.bound()
		if err != nil {
			return err
		}
		if ok && t.ladder.tap.port == t.ladder.port {
			// A socket elsewhere was the best guess while there was none at home.
			if ok, err = t.ladder.tap.guess(t.cfg.Space); err != nil || !ok {
				return errors.Join(err, t.listen())
			}
		}
		// It may have another port, or be down.
		t.stepOff()
		if err := t.dump(ctx, dumpResync); err != nil {
			return err
		}
	}
	if t.climbPort() {
		return t.dump(ctx, dumpResync)
	}
	return nil
}

// choose notes the rung.
func (t *Tracker) choose(rung Rung) {
	var why []string
	if t.ladder.hookErr != nil {
		why = append(why, fmt.Sprintf("fentry: %v", t.ladder.hookErr))
	}
	if t.ladder.portErr != nil && rung == RungPolling {
		why = append(why, fmt.Sprintf("port: %v", t.ladder.portErr))
	}
	reason := strings.Join(why, "; ")
	t.mu.Lock()
	same := t.status.Rung == rung && t.status.Reason == reason
	t.status.Rung, t.status.Reason = rung, reason
	t.mu.Unlock()
	switch {
	case same:
	case rung == RungPolling:
		t.cfg.Log.Warn("following endpoint changes by polling: slower, and causes are guesses",
			"every", t.cfg.Poll, "reason", reason)
	case reason == "":
		t.cfg.Log.Info("following endpoint changes", "by", rung)
	default:
		t.cfg.Log.Info("following endpoint changes", "by", rung, "reason", reason)
	}
}

// interval is how often the device is read anyway, and why: at the UDP port it is
// polled as well while there are links that the program does not see, or may be sessions
// that are older than it.
func (t *Tracker) interval() (time.Duration, dumpReason) {
	rung := t.Status().Rung
	if rung == RungPolling || rung == RungPort && (time.Since(t.since) < rejectAfter || t.ladder.tap.unwatched() != nil) {
		return t.cfg.Poll, dumpPoll
	}
	return t.cfg.Sweep, dumpSweep
}

// leave leaves whatever rung the tracker is on.
func (t *Tracker) leave() error {
	t.stepOff()
	return t.cfg.Kernel.unfollow(t.id())
}

// barrier waits until the events from before the call have been taken.
func (t *Tracker) barrier(ctx context.Context) (done bool, err error) {
	if t.ladder.tap != nil {
		return t.ladder.tap.barrier(ctx)
	}
	return t.cfg.Kernel.barrier(ctx)
}
