// SPDX-License-Identifier: MIT

package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/feed"
)

// TestTickets: a ticket is good once, for a while, and for the life of the node that
// it was made for. So a recording makes nobody active.
func TestTickets(t *testing.T) {
	from := feed.Header{Node: 1, Boot: 2}
	for name, c := range map[string]struct {
		change func(q *feed.Question, d *device)
		refuse string
	}{
		"unknown":      {func(q *feed.Question, _ *device) { q.Ticket[0]++ }, "not good"},
		"none":         {func(q *feed.Question, _ *device) { q.Ticket = feed.Ticket{} }, "not good"},
		"another node": {func(q *feed.Question, _ *device) { q.Node++ }, "not good"},
		"another life": {func(q *feed.Question, _ *device) { q.Boot++ }, "not good"},
		"late": {func(q *feed.Question, d *device) {
			d.handing.tickets[q.Ticket] = ticket{from, time.Now().Add(-1)}
		}, "not good"},
		"used": {func(q *feed.Question, d *device) { _ = d.take(t.Context(), q) }, "not good"},
		// There is no device that could become active.
		"good": {func(*feed.Question, *device) {}, "did not become"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := roleDevice(t, config.Device{Role: config.RoleAuto})
			q := &feed.Question{Header: from, Step: feed.StepTake, Ticket: feed.Ticket{3}}
			d.handing.tickets = map[feed.Ticket]ticket{q.Ticket: {from, time.Now().Add(time.Minute)}}
			c.change(q, d)
			if err := d.take(t.Context(), q); err == nil || !strings.Contains(err.Error(), c.refuse) {
				t.Errorf("got %v, want %q", err, c.refuse)
			}
			if role, _, _ := d.desk.Role(); role != failover.Standby {
				t.Errorf("the role is %s", role)
			}
		})
	}
}

// TestRoleMeanwhile: the verb does not speak while a handover is going on.
func TestRoleMeanwhile(t *testing.T) {
	t.Parallel()
	dev := roleDevice(t, config.Device{Role: config.RoleAuto})
	d := &daemon{devices: []*device{dev}}
	dev.handing.giving.Lock()
	if err := d.setRole("", "active"); !errors.Is(err, errBusy) {
		t.Errorf("got %v, want %v", err, errBusy)
	}
	if role, by, _ := dev.desk.Role(); by != failover.ByNone {
		t.Errorf("the role is %s by %s", role, by)
	}
	// It is looked for a moment whether one was interrupted.
	time.AfterFunc(givingWithin/10, dev.handing.giving.Unlock)
	if err := d.setRole("", "active"); err != nil {
		t.Error(err)
	}
	if role, by, _ := dev.desk.Role(); role != failover.Active || by != failover.ByVerb {
		t.Errorf("the role is %s by %s", role, by)
	}
}
