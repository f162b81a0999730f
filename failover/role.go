// SPDX-License-Identifier: MIT

// Package failover decides which role this node has for a device.
package failover

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Role is what a node is to do with a device.
type Role string

// The roles.
const (
	Active  Role = "active"
	Standby Role = "standby"
	Always  Role = "always" // there is no role, as with anycast
)

// Source is somebody who gives a node its role.
type Source string

// The sources. While the role is not fixed, the first of the others that has
// spoken decides: verb before vrrp before vip.
const (
	ByConfig Source = "config" // fixed in the configuration
	ByVerb   Source = "verb"   // wgroam role
	ByVRRP   Source = "vrrp"   // keepalived, through its FIFO
	ByVIP    Source = "vip"    // a virtual IP is on this host, or none
	ByNone   Source = "none"   // nobody has spoken yet: standby
)

// words is what each source has said last; empty for one that has not spoken.
type words struct {
	Config Role `json:"-"`
	Verb   Role `json:"verb,omitempty"`
	VRRP   Role `json:"vrrp,omitempty"`
	VIP    Role `json:"-"`
	// wait: a source that will speak soon has not yet.
	wait bool
}

// said returns the words in the order in which they count.
func (w *words) said() []struct {
	by   Source
	role *Role
} {
	return []struct {
		by   Source
		role *Role
	}{{ByConfig, &w.Config}, {ByVerb, &w.Verb}, {ByVRRP, &w.VRRP}, {ByVIP, &w.VIP}}
}

// decide returns the role, and who gives it. The role is empty while it is not
// known yet.
func (w words) decide() (Role, Source) {
	for _, s := range w.said() {
		if *s.role != "" {
			return *s.role, s.by
		}
	}
	if w.wait {
		return "", ByNone
	}
	return Standby, ByNone
}

// conflict returns the sources that do not agree with the role; empty if all do.
func (w words) conflict() string {
	role, _ := w.decide()
	if role == Always {
		return ""
	}
	var others []string
	for _, s := range w.said() {
		if *s.role != "" && *s.role != role {
			others = append(others, fmt.Sprintf("%s says %s", s.by, *s.role))
		}
	}
	return strings.Join(others, ", ")
}

// Alarm is something that should not be.
type Alarm string

// The alarms.
const (
	// AlarmConflict: the sources do not agree. The one that comes first decides.
	AlarmConflict Alarm = "conflict"
	// AlarmTwoActives: another node of the group says that it is active, too.
	AlarmTwoActives Alarm = "two_actives"
	// AlarmTraffic: peers talk to this node, which is a standby: authenticated packets, or
	// such that its gate drops.
	AlarmTraffic Alarm = "traffic"
)

// Alarms are all alarms that there are.
var Alarms = []Alarm{AlarmConflict, AlarmTwoActives, AlarmTraffic}

const (
	// settle is how long sources may take to follow each other, and a dead node
	// to be taken for dead.
	settle = 3 * time.Second
	// trafficFor is how long the last packet to a standby is remembered.
	trafficFor = time.Minute
	// strangers is how many packets within that time are more than a stranger's, who looks
	// for open ports.
	strangers = 5
)

// Raised is an alarm that is up.
type Raised struct {
	Alarm  Alarm
	Detail string
	Since  time.Time
}

// watch is the state of one alarm.
type watch struct {
	since  time.Time // the condition holds since then; zero if it does not
	detail string
	raised bool
}

// see notes whether the condition of an alarm holds, and reports whether the alarm
// came up or went.
func (w *watch) see(detail string, now time.Time, after time.Duration) (changed bool) {
	before := w.raised
	if detail == "" {
		*w = watch{}
		return before
	}
	if w.since.IsZero() {
		w.since = now
	}
	w.detail, w.raised = detail, before || now.Sub(w.since) >= after
	return w.raised != before
}

// raised returns the alarms that are up, in the order of Alarms.
func raised(watches map[Alarm]*watch) []Raised {
	var out []Raised
	for a, w := range watches {
		if w.raised {
			out = append(out, Raised{a, w.detail, w.since})
		}
	}
	slices.SortFunc(out, func(a, b Raised) int { return slices.Index(Alarms, a.Alarm) - slices.Index(Alarms, b.Alarm) })
	return out
}
