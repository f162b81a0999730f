// SPDX-License-Identifier: MIT

package natsd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// bridge hands the server's warnings and errors to slog, a bounded number of
// them: a stranger who knocks all day must not fill the log.
type bridge struct {
	log *slog.Logger

	mu         sync.Mutex
	started    bool
	err        error
	since      time.Time
	lines, cut int
}

const (
	linesPer = 5
	per      = 10 * time.Second
)

// open lets warnings pass: those of the start describe the way the server is
// meant to be.
func (b *bridge) open() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.started = true
}

// fatal returns why the server did not start.
func (b *bridge) fatal() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		return errors.New("the server did not start")
	}
	return b.err
}

func (b *bridge) emit(level slog.Level, format string, args []any) {
	msg := fmt.Sprintf(format, args...)
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.started {
		if level > slog.LevelWarn && b.err == nil {
			b.err = errors.New(msg)
		}
		return
	}
	if now := time.Now(); now.Sub(b.since) > per {
		if b.cut > 0 {
			b.log.Warn("nats server: messages left out", "count", b.cut)
		}
		b.since, b.lines, b.cut = now, 0, 0
	}
	if b.lines == linesPer {
		b.cut++
		return
	}
	b.lines++
	b.log.Log(context.Background(), level, "nats server: "+msg)
}

// The methods of server.Logger. Notices, and what is below, say nothing that a
// Link does not say better. Fatal ones do not exit: Start returns them.

func (b *bridge) Noticef(string, ...any)           {}
func (b *bridge) Debugf(string, ...any)            {}
func (b *bridge) Tracef(string, ...any)            {}
func (b *bridge) Warnf(format string, args ...any) { b.emit(slog.LevelWarn, format, args) }
func (b *bridge) Errorf(format string, args ...any) {
	b.emit(slog.LevelError, format, args)
}
func (b *bridge) Fatalf(format string, args ...any) {
	b.emit(slog.LevelError, format, args)
}
