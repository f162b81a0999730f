// SPDX-License-Identifier: MIT

package control

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/wgroam/wgroam"
)

// Schema is the version of the documents below. Fields may be added under the
// same number; none is renamed, removed or given another meaning.
const Schema = 1

// Status is the answer to the verb status. Arrays are never null and have a
// fixed order, so that two equal states are equal bytes.
type Status struct {
	Schema  int            `json:"schema"`
	Node    string         `json:"node"`
	NodeID  string         `json:"node_id"` // 16 hexadecimal digits
	Version string         `json:"version"`
	Started time.Time      `json:"started"` // RFC 3339, UTC
	Devices []DeviceStatus `json:"devices"` // by name, then namespace
	// Events is absent unless roams are published for other programs.
	Events *EventsStatus `json:"events,omitempty"`
}

// EventsStatus is what becomes of the roams that are published for other programs,
// since the start.
type EventsStatus struct {
	Connection
	Redact  bool   `json:"redact"`  // addresses are not to be read
	Sent    uint64 `json:"sent"`    // written to the connection
	Dropped uint64 `json:"dropped"` // too many waited, or the server did not take them
	Waiting int    `json:"waiting"` // for the connection
}

// The values of DeviceStatus.State.
const (
	StateUp      = "up"
	StateDown    = "down"    // the link is down
	StateMissing = "missing" // there was such a device, and it is gone
	StateWaiting = "waiting" // there has been no such device yet
)

// DeviceStatus is one WireGuard device of this node. Counters count from when
// the device appeared.
type DeviceStatus struct {
	Name string `json:"name"`
	// Netns is the device's network namespace, as in the configuration; absent for
	// the daemon's own.
	Netns string `json:"netns,omitempty"`
	// NetnsInode is the inode number of the device's network namespace; 0 without a device.
	NetnsInode uint32      `json:"netns_inode"`
	Ifindex    int         `json:"ifindex"` // 0 without a device
	State      string      `json:"state"`   // up, down, missing, waiting
	Role       string      `json:"role"`    // active, standby, always; unknown for the first moment
	RoleBy     string      `json:"role_by"` // who gives the role: config, verb, vrrp, vip, none
	RoleSince  time.Time   `json:"role_since"`
	Alarms     []RoleAlarm `json:"alarms"` // what is wrong with the roles; empty in health
	// Keepalived is absent where it is no source of the role.
	Keepalived *Keepalived  `json:"keepalived,omitempty"`
	Standby    string       `json:"standby"` // down, silent
	Failover   Failover     `json:"failover"`
	VIP        []netip.Addr `json:"vip"`   // in the order of the configuration
	Group      string       `json:"group"` // group id; empty until the device's key is known
	Detector   Detector     `json:"detector"`
	// ClockBehindMS is by how much this host's clock is behind the furthest of the
	// other nodes': so long would peers ignore its handshakes. 0 when it is not.
	ClockBehindMS int64 `json:"clock_behind_ms"`

	Events       uint64 `json:"events"`        // endpoint changes reported by the detector
	Lost         uint64 `json:"lost"`          // changes that the detector had no room for, on all devices
	Limited      uint64 `json:"limited"`       // changes held back until the peer had calmed down, on all devices
	Resyncs      uint64 `json:"resyncs"`       // full reads after a loss
	SweepRepairs uint64 `json:"sweep_repairs"` // changes that only the slow sweep found; 0 in health

	Peers       int    `json:"peers"`        // in the device
	Records     int    `json:"records"`      // in the table
	Waiting     int    `json:"waiting"`      // records of peers that the device does not have
	Applied     uint64 `json:"applied"`      // endpoints written to the device
	ApplyErrors uint64 `json:"apply_errors"` // endpoints that could not be written, retries included
	Undone      uint64 `json:"undone"`       // endpoints of a handshake that was only begun, perhaps a replay, that were taken back
	LastError   string `json:"last_error"`   // the newest error of any part; empty when none

	Snapshot Snapshot   `json:"snapshot"`
	Feed     FeedStatus `json:"feed"`
}

// RoleAlarm is something wrong with the roles of a group's nodes.
type RoleAlarm struct {
	Alarm  string    `json:"alarm"`  // conflict, two_actives, traffic
	Detail string    `json:"detail"` // for people
	Do     string    `json:"do"`     // what to do about it
	Since  time.Time `json:"since"`  // RFC 3339, UTC
}

// Keepalived is what a device hears of keepalived.
type Keepalived struct {
	FIFO   string   `json:"fifo"`   // where keepalived is heard
	Name   string   `json:"name"`   // of the instance or group that the device follows
	Says   string   `json:"says"`   // active, standby; empty before it has said anything
	Heard  bool     `json:"heard"`  // it has spoken of the name since the daemon started
	Others []string `json:"others"` // names of instances and groups that it has spoken of besides
	Tracks bool     `json:"tracks"` // its script, wgroam check --elect, has asked in the last 5 seconds, or the daemon has just started
	Error  string   `json:"error"`  // why it cannot be heard; empty when it can
}

// Failover is what became of the role.
type Failover struct {
	State     string     `json:"state"`               // idle: no role; quiet: standby; promoting, open: active; empty without a device
	Error     string     `json:"error"`               // why the device is not what the role asks for; empty when it is
	Promotion *Promotion `json:"promotion,omitempty"` // the last one, or the present; absent if there was none
	Yields    string     `json:"yields,omitempty"`    // the node that keepalived is to prefer, after a handover
}

// Promotion is how a device became that of an active.
type Promotion struct {
	Began    time.Time `json:"began"`          // RFC 3339, UTC
	Ended    time.Time `json:"ended,omitzero"` // absent while it goes on
	Peers    int       `json:"peers"`          // in the device
	Called   int       `json:"called"`
	Answered int       `json:"answered"` // have had a handshake since it began
	Silent   int       `json:"silent"`   // were called, and have not answered
	Unknown  int       `json:"unknown"`  // have no endpoint
	P50MS    int64     `json:"p50_ms"`   // from when it began to the handshake, of those that answered
	P99MS    int64     `json:"p99_ms"`
}

// Snapshot is the file that keeps the table.
type Snapshot struct {
	Path string `json:"path"` // empty without a device
	// Written is RFC 3339, UTC; absent while this process has not written it.
	Written time.Time `json:"written,omitzero"`
	Records int       `json:"records"` // in the file
	Error   string    `json:"error"`   // why it could not be read or written; empty when none
	Writes  uint64    `json:"writes"`  // of this process
	Errors  uint64    `json:"errors"`  // writes that failed
}

// The values of Detector.Rung, best first.
const (
	RungFentry  = "fentry"
	RungKprobe  = "kprobe"
	RungPort    = "port"
	RungPolling = "polling"
	RungNone    = "none"
)

// Detector says how endpoint changes are seen.
type Detector struct {
	Rung   string `json:"rung"`   // fentry, kprobe, port, polling, none
	Reason string `json:"reason"` // why not a better one; empty for the best
}

// The values of FeedStatus.Mode.
const (
	FeedEmbedded = "embedded"
	FeedExisting = "existing"
	FeedNone     = "none"
)

// FeedStatus is the exchange with the other nodes of the device's group.
type FeedStatus struct {
	Mode        string            `json:"mode"`        // embedded, existing, none
	Listen      string            `json:"listen"`      // the embedded server's host:port; empty when none
	Error       string            `json:"error"`       // why there is no server; empty when there is, or none is wanted
	Subjects    string            `json:"subjects"`    // all that the group uses; empty without a device
	Connections []FeedConnection  `json:"connections"` // by name
	Nodes       []NodeStatus      `json:"nodes"`       // the others, by name and id
	Refused     map[string]uint64 `json:"refused"`     // received frames and records that changed nothing, by reason
	Sent        uint64            `json:"sent"`        // records published, without answers to syncs
	Received    uint64            `json:"received"`    // records received and authentic, without answers to syncs

	// Frames of all kinds, on all connections, refused ones included, and their
	// bytes without those of NATS, TLS and TCP.
	FramesSent     uint64 `json:"frames_sent"`
	FramesReceived uint64 `json:"frames_received"`
	BytesSent      uint64 `json:"bytes_sent"`
	BytesReceived  uint64 `json:"bytes_received"`

	Dropped    uint64 `json:"dropped"`     // times that this node was too slow to read, and messages were lost
	Gaps       uint64 `json:"gaps"`        // updates that were missing, as their numbers show
	Syncs      uint64 `json:"syncs"`       // comparisons of tables that another node has answered in full
	SyncErrors uint64 `json:"sync_errors"` // those that none has, and were tried again
	Synced     uint64 `json:"synced"`      // records in the answers
}

// Connection is one connection to a NATS server.
type Connection struct {
	Name      string    `json:"name"` // host:port or URL, without user and password
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"` // of the present state; RFC 3339, UTC
	Error     string    `json:"error"` // why not connected, or which subject the server forbids; empty when neither
}

// FeedConnection is a Connection for a group of nodes.
type FeedConnection struct {
	Connection
	// Former: the group is that of former keys of the device.
	Former bool `json:"former,omitempty"`
}

// The values of NodeStatus.State.
const (
	NodeSynced  = "synced"
	NodeSyncing = "syncing"
	NodeStale   = "stale"
)

// NodeStatus is another node of the group.
type NodeStatus struct {
	Name    string `json:"name"`    // empty until it has said its name
	ID      string `json:"id"`      // 16 hexadecimal digits
	Role    string `json:"role"`    // active, standby, always
	State   string `json:"state"`   // synced, syncing, stale
	AgeMS   int64  `json:"age_ms"`  // since it was last heard
	SkewMS  int64  `json:"skew_ms"` // its clock minus ours
	Records int    `json:"records"` // in its table
	// Former: heard under former keys of the device, and not under those in force.
	Former bool `json:"former,omitempty"`
}

// Peers is the answer to the verb peers.
type Peers struct {
	Schema int    `json:"schema"`
	Peers  []Peer `json:"peers"` // by device, then namespace, then key bytes
}

// The values of Peer.Applied.
const (
	AppliedYes        = "yes"        // the device holds the newest endpoint
	AppliedNo         = "no"         // not yet, or it failed: see Peer.Error
	AppliedWaiting    = "waiting"    // the device does not have the peer
	AppliedOverridden = "overridden" // an administrator has set another endpoint since
	// AppliedUnconfirmed: the device took another endpoint from a handshake that
	// has only begun, and may be a replay.
	AppliedUnconfirmed = "unconfirmed"
)

// Peer is what is known of one WireGuard peer. Endpoints are ip:port or
// [ip6]:port, and empty when there is none.
type Peer struct {
	Device   string         `json:"device"`
	Netns    string         `json:"netns,omitempty"` // as DeviceStatus.Netns
	Peer     wgroam.Key     `json:"peer"`            // base64
	Endpoint netip.AddrPort `json:"endpoint"`        // the newest that any node has authenticated
	Held     netip.AddrPort `json:"held"`            // what the device holds
	Cause    string         `json:"cause"`           // data, response, initiation, config, snapshot; empty without endpoint
	Node     string         `json:"node"`            // who saw it: name, or id while the name is unknown
	// Observed is RFC 3339, UTC; absent without a record.
	Observed time.Time `json:"observed,omitzero"`
	AgeS     int64     `json:"age_s"` // seconds since Observed; 0 without a record
	Applied  string    `json:"applied"`
	Error    string    `json:"error"` // why Applied is no; empty when unknown or none
}

// The values of Finding.State.
const (
	CheckOK   = "ok"
	CheckWarn = "warn" // works, less well than it could
	CheckFail = "fail" // not ready
)

// Check is the answer to the verb check: what would be if the node were promoted now.
type Check struct {
	Schema int       `json:"schema"`
	Ready  bool      `json:"ready"`  // nothing has failed
	Checks []Finding `json:"checks"` // in the order in which people read them
}

// MaxFindingPeers is how many peers a Finding names at most.
const MaxFindingPeers = 1000

// Finding is one thing that was looked at.
type Finding struct {
	Device string `json:"device"`          // empty: the node
	Netns  string `json:"netns,omitempty"` // as DeviceStatus.Netns
	// Check is what was looked at: see doc/json.md.
	Check  string `json:"check"`
	State  string `json:"state"`  // ok, warn, fail
	Detail string `json:"detail"` // for people
	Do     string `json:"do"`     // what to do about it; empty when ok
	// Peers are those that it is about: at most MaxFindingPeers.
	Peers []FindingPeer `json:"peers,omitempty"`
}

// FindingPeer is a peer of a Finding.
type FindingPeer struct {
	Peer wgroam.Key `json:"peer"` // base64
	// What is, of peers: missing here, missing there, allowed-ips, preshared-key; of
	// table: what applied is in Peer.
	What string `json:"what"`
}

// settle gives c its fixed form.
func (c Check) settle() Check {
	c.Schema, c.Ready = Schema, true
	c.Checks = append([]Finding{}, c.Checks...)
	for i := range c.Checks {
		f := &c.Checks[i]
		c.Ready = c.Ready && f.State != CheckFail
		f.Peers = f.Peers[:min(len(f.Peers), MaxFindingPeers)]
	}
	return c
}

// NewCheck returns the findings as a Check.
func NewCheck(findings []Finding) Check { return Check{Checks: findings}.settle() }

// Event is one line of the verb watch: a change of a peer's endpoint in this
// node's device.
type Event struct {
	Time   time.Time      `json:"time"` // when the kernel accepted it; RFC 3339 with nanoseconds, UTC
	Device string         `json:"device"`
	Netns  string         `json:"netns,omitempty"` // as DeviceStatus.Netns
	Peer   wgroam.Key     `json:"peer"`            // base64
	Old    netip.AddrPort `json:"old"`             // ip:port or [ip6]:port; empty when none
	New    netip.AddrPort `json:"new"`             // as Old
	Cause  string         `json:"cause"`           // data, response, initiation, config
	// LatencyUS is how long the change took from the kernel to wgroam, in
	// microseconds.
	LatencyUS int64 `json:"latency_us"`
}

// NewEvent returns the line for an observation on device that reached wgroam
// at the time seen.
func NewEvent(device string, o wgroam.Observation, seen time.Time) Event {
	return Event{
		Time:      o.At.UTC(),
		Device:    device,
		Peer:      o.Peer,
		Old:       o.Old,
		New:       o.New,
		Cause:     o.Cause.String(),
		LatencyUS: max(0, seen.Sub(o.At).Microseconds()),
	}
}

// Progress is a line of watch, too: how far a promotion has come. There is one when it
// begins, one when it has ended, and some in between.
type Progress struct {
	Time      time.Time `json:"time"` // RFC 3339 with nanoseconds, UTC
	Device    string    `json:"device"`
	Netns     string    `json:"netns,omitempty"` // as DeviceStatus.Netns
	Promotion Promotion `json:"promotion"`
}

// The values of HandoverStep.Step.
const (
	HandoverAsked  = "asked"  // this node has asked the active for its role
	HandoverReady  = "ready"  // the other node has all, and can take over
	HandoverQuiet  = "quiet"  // the former active is a standby
	HandoverDone   = "done"   // the other node is active
	HandoverFailed = "failed" // Detail says why, and who is active
)

// HandoverStep is one line of the verb handover.
type HandoverStep struct {
	Time   time.Time `json:"time"` // RFC 3339 with nanoseconds, UTC
	Device string    `json:"device"`
	Netns  string    `json:"netns,omitempty"` // as DeviceStatus.Netns
	Step   string    `json:"step"`            // asked, ready, quiet, done, failed
	MS     int64     `json:"ms"`              // since it began
	Detail string    `json:"detail"`          // for people
}

// Missed is the line of the verb watch that stands where events are missing
// because the client did not read fast enough. The first line is a Missed of 0:
// the client hears of everything from then on.
type Missed struct {
	Missed uint64 `json:"missed"`
}

// settle gives s its fixed form. It works on copies: the slices belong to the
// handler.
func (s Status) settle() Status {
	s.Schema = Schema
	s.Started = s.Started.UTC()
	if s.Events != nil {
		e := *s.Events
		e.Since = e.Since.UTC()
		s.Events = &e
	}
	s.Devices = sorted(s.Devices, func(a, b DeviceStatus) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Netns, b.Netns)) })
	for i := range s.Devices {
		d := &s.Devices[i]
		d.VIP = append([]netip.Addr{}, d.VIP...)
		d.RoleSince = d.RoleSince.UTC()
		d.Alarms = append([]RoleAlarm{}, d.Alarms...)
		if d.Keepalived != nil {
			k := *d.Keepalived
			k.Others = append([]string{}, k.Others...)
			d.Keepalived = &k
		}
		for j := range d.Alarms {
			d.Alarms[j].Since = d.Alarms[j].Since.UTC()
		}
		if !d.Snapshot.Written.IsZero() {
			d.Snapshot.Written = d.Snapshot.Written.UTC()
		}
		f := &d.Feed
		f.Connections = sorted(f.Connections, func(a, b FeedConnection) int { return cmp.Compare(a.Name, b.Name) })
		for j := range f.Connections {
			f.Connections[j].Since = f.Connections[j].Since.UTC()
		}
		f.Nodes = sorted(f.Nodes, func(a, b NodeStatus) int {
			return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
		})
		if f.Refused == nil {
			f.Refused = map[string]uint64{}
		}
	}
	return s
}

func settlePeers(peers []Peer) Peers {
	peers = sorted(peers, func(a, b Peer) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.Netns, b.Netns), slices.Compare(a.Peer[:], b.Peer[:]))
	})
	for i := range peers {
		if !peers[i].Observed.IsZero() {
			peers[i].Observed = peers[i].Observed.UTC()
		}
	}
	return Peers{Schema: Schema, Peers: peers}
}

// sorted returns a sorted copy of s, never nil.
func sorted[T any](s []T, by func(a, b T) int) []T {
	s = append([]T{}, s...)
	slices.SortStableFunc(s, by)
	return s
}
