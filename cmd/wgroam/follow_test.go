// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/wg"
)

// TestAgain: what fails for want of something that may come back is tried until
// ctx ends, less and less often; what no waiting can help is not.
func TestAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var tries []time.Duration
		began := time.Now()
		err := again(ctx, slog.New(slog.DiscardHandler), "cannot", func() error {
			tries = append(tries, time.Since(began))
			if len(tries) == 4 {
				cancel()
			}
			return fmt.Errorf("watch: %w", unix.EMFILE)
		})
		want := []time.Duration{0, watchDelay, 3 * watchDelay, 7 * watchDelay}
		if err != nil || !slices.Equal(tries, want) {
			t.Errorf("tried after %v, error %v, want %v", tries, err, want)
		}
		err = again(t.Context(), slog.New(slog.DiscardHandler), "cannot", func() error { return wg.ErrPrivilege })
		if !errors.Is(err, wg.ErrPrivilege) {
			t.Errorf("error %v", err)
		}
	})
}
