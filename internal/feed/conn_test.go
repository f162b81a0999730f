// SPDX-License-Identifier: MIT

package feed

import (
	"log/slog"
	"testing"
)

// TestForcedFails: a connection that is made anew is no line, but one that cannot be
// made is.
func TestForcedFails(t *testing.T) {
	for _, forced := range []bool{false, true} {
		log := &logged{}
		l, err := New(Config{Name: "gw-z", Keys: testKeys(t), Log: slog.New(log)})
		if err != nil {
			t.Fatal(err)
		}
		c := &conn{l: l, name: "test", forced: forced}
		c.up.Store(true)
		c.disconnected(nil)
		for range 3 {
			c.failed(errUnreachable)
		}
		lost, cannot := log.count("feed connection lost"), log.count("cannot connect")
		if lost+cannot != 1 || (cannot == 1) != forced {
			t.Errorf("forced %v: %q", forced, log.lines)
		}
	}
}
