// SPDX-License-Identifier: MIT

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/applier"
	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/wg"
)

// check is the daemon's answer to the verb check: what its status says, and what is
// found by looking closer.
func (d *daemon) check(ctx context.Context) []finding {
	out := checkStatus(d.status())
	out = append(out, checkPrivileges()...)
	for _, dev := range d.devices {
		if s := dev.live(); s != nil {
			out = append(out, dev.rehearse(ctx, s)...)
		}
	}
	return out
}

// reading is what was read of a device to compare it with others.
type reading struct {
	dev    wg.Device
	setups wgroam.Setups
	at     time.Time
	took   time.Duration
}

// setupReader reads a device to compare it with others, which takes no more than a tenth
// of a processor: who asks more often gets the last reading again.
type setupReader struct {
	client *wg.Client // its own: nobody waits for it
	name   string
	key    [32]byte

	mu   sync.Mutex
	last reading
}

func (r *setupReader) read() (reading, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	began := time.Now()
	if began.Sub(r.last.at) < 9*r.last.took {
		return r.last, nil
	}
	dev, setups, err := r.client.Setups(r.name, r.key)
	if err != nil {
		return reading{}, err
	}
	now := time.Now()
	r.last = reading{dev, setups, now, now.Sub(began)}
	return r.last, nil
}

// setups is what other nodes compare theirs with.
func (r *setupReader) setups() (wgroam.Setups, error) {
	got, err := r.read()
	return got.setups, err
}

// rehearse looks at what a promotion of a device would find.
func (d *device) rehearse(ctx context.Context, s *session) []finding {
	role, _, _ := d.desk.Role()
	r := rehearsal{d: d, s: s, standby: role != failover.Active && role != failover.Always}
	d.settle(ctx)
	began := time.Now()
	got, err := s.setups.read()
	if err != nil {
		r.add("peers", checkFail, err.Error(), "see the log of the daemon", nil)
		return r.out
	}
	r.table(got, got.at.After(began))
	r.drift(ctx, got.setups)
	if role != failover.Always {
		r.source(ctx, role, got.dev)
		r.estimate(got)
	}
	return r.out
}

// settleFor is how long an endpoint may take to be in the device. A promotion waits no
// longer.
const settleFor = 2 * time.Second

// settle waits until the device holds all endpoints that are known.
func (d *device) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleFor)
	defer cancel()
	_ = await(ctx, d.settled)
}

// rehearsal collects what is found of one device.
type rehearsal struct {
	d       *device
	s       *session
	standby bool
	out     []finding
}

func (r *rehearsal) add(check, state, detail, do string, peers []control.FindingPeer) {
	if state == checkOK {
		do = ""
	}
	r.out = append(r.out, finding{
		Device: r.d.cfg.Name, Netns: r.d.cfg.Netns, Check: check, State: state, Detail: detail, Do: do, Peers: peers,
	})
}

// table compares the device, which has just been read or a while ago, with the table, and
// the table with that of the active.
func (r *rehearsal) table(got reading, fresh bool) {
	var known, missing int
	var stale []control.FindingPeer
	for _, p := range got.dev.Peers {
		record, ok := r.s.table.Get(p.Key)
		state := r.s.applier.State(p.Key)
		differs := ok && record.Endpoint != p.Endpoint
		if differs && state == applier.StateYes {
			// Written since then; or somebody has set another where nothing tells of it.
			differs, state = fresh, applier.StateOverridden
		}
		switch {
		case differs && record.Version.HLC.Time().Before(got.at.Add(-settleFor)):
			stale = append(stale, control.FindingPeer{Peer: p.Key, What: string(state)})
		case ok, p.Endpoint.IsValid():
			known++
		default:
			missing++
		}
	}
	slices.SortFunc(stale, func(a, b control.FindingPeer) int { return bytes.Compare(a.Peer[:], b.Peer[:]) })
	detail := fmt.Sprintf("%d peers known, %d that nobody has seen, %d not where the group saw them last", known, missing, len(stale))
	if len(stale) > 0 {
		r.add("table", r.worse(), detail, "wgroam peers shows why: not written yet or with an error, or somebody has set another endpoint since", stale)
	} else {
		r.add("table", checkOK, detail, "", nil)
	}
	active := false
	for _, n := range r.s.nodes() {
		if n.Role != feed.RoleActive {
			continue
		}
		active = true
		detail := fmt.Sprintf("%d records, %d on %s, which is active: ", r.s.table.Len(), n.Records, n.Name)
		switch n.State {
		case applier.NodeSynced:
			r.add("table", checkOK, detail+"the same", "", nil)
		case applier.NodeSyncing:
			r.add("table", checkWarn, detail+"being compared", "wait a moment, and check again", nil)
		case applier.NodeStale:
			r.add("table", r.worse(), fmt.Sprintf("%swhat it saw in the last %.1f s is not known here", detail, time.Since(n.Heard).Seconds()),
				"if it lives, see the lines of the feed; if not, promote", nil)
		}
	}
	if r.standby && !active {
		r.add("table", checkWarn, fmt.Sprintf("%d records, and no other node is active", r.s.table.Len()), "make one of the nodes active", nil)
	}
}

// worse is the state of what stands in the way of a promotion, and harms an active less.
func (r *rehearsal) worse() string {
	if r.standby {
		return checkFail
	}
	return checkWarn
}

// drift compares how the device is configured with the other nodes, all at once.
func (r *rehearsal) drift(ctx context.Context, ours wgroam.Setups) {
	nodes := slices.DeleteFunc(r.s.nodes(), func(n groupNode) bool { return n.former || n.State == applier.NodeStale })
	diffs, errs := make([]wgroam.SetupDiff, len(nodes)), make([]error, len(nodes))
	have := ours.Digests()
	r.d.asking.Lock()
	var asking sync.WaitGroup
	for i, n := range nodes {
		asking.Go(func() { diffs[i], errs[i] = r.s.feed.AskSetups(ctx, n.ID, &have) })
	}
	asking.Wait()
	r.d.asking.Unlock()
	for i, n := range nodes {
		name := cmp.Or(n.Name, n.ID.String())
		if errs[i] != nil {
			r.add("peers", checkWarn, fmt.Sprintf("not known whether they are set up as on %s: %v", name, errs[i]),
				"check again; if it stays so, see the log there, or upgrade wgroam there", nil)
			continue
		}
		r.compared(name, ours, diffs[i])
		r.port(name, ours.Port, diffs[i].Port)
	}
}

// port reports where the device of another node listens, if not where this one does.
func (r *rehearsal) port(name string, ours, theirs int) {
	if theirs == 0 || theirs == ours {
		return
	}
	state := checkFail
	if role, _, _ := r.d.desk.Role(); role == failover.Always {
		state = checkWarn
	}
	r.add("peers", state, fmt.Sprintf("the device listens on port %d, that of %s on %d: after a failover peers send to where nobody listens", ours, name, theirs),
		"give the device the same ListenPort on all nodes", nil)
}

// compared reports in what the device differs from that of another node.
func (r *rehearsal) compared(name string, ours wgroam.Setups, diff wgroam.SetupDiff) {
	if diff.Differing == 0 {
		r.add("peers", checkOK, fmt.Sprintf("%d, set up as on %s: allowed IPs, preshared keys", ours.Len(), name), "", nil)
		return
	}
	var peers []control.FindingPeer
	counts := make(map[wgroam.Drift]int)
	for _, p := range ours.Compare(diff) {
		peers = append(peers, control.FindingPeer{Peer: p.Peer, What: string(p.What)})
		counts[p.What]++
	}
	var parts []string
	for _, what := range []wgroam.Drift{wgroam.DriftMissingHere, wgroam.DriftMissingThere, wgroam.DriftAllowedIPs, wgroam.DriftPresharedKey} {
		if n := counts[what]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, what))
		}
	}
	detail := fmt.Sprintf("not as on %s (%d peers here, %d there): %s", name, ours.Len(), diff.Peers, strings.Join(parts, ", "))
	if told := diff.Told.Len(); told < diff.Differing {
		detail += fmt.Sprintf(", and more: that is %d of %d parts that differ", told, diff.Differing)
	}
	r.add("peers", checkFail, detail, "give the device the same peers, allowed IPs and preshared keys on all nodes", peers)
}

// source proves that the device can send from the virtual IP.
func (r *rehearsal) source(ctx context.Context, role failover.Role, dev wg.Device) {
	vips := r.d.cfg.VIP
	if len(vips) == 0 {
		r.add("source", checkWarn, "no virtual IP: after a promotion peers are called from whatever address the routes say, and stay on that",
			"set vip, if the gateways share an address", nil)
		return
	}
	if role == failover.Active {
		switch missing, err := failover.Missing(ctx, r.s.space, vips); {
		case err != nil:
			r.add("source", checkFail, err.Error(), "see the log of the daemon", nil)
		case len(missing) > 0:
			r.add("source", checkFail, fmt.Sprintf("%v not on this host, which is active: what peers answer goes elsewhere", missing),
				"move the virtual IP here, or make the node that has it active", nil)
		}
	}
	r.d.probing.Lock()
	defer r.d.probing.Unlock()
	for _, family := range []struct {
		name string
		is   func(netip.Addr) bool
	}{{"IPv4", netip.Addr.Is4}, {"IPv6", netip.Addr.Is6}} {
		i := slices.IndexFunc(vips, family.is)
		if i < 0 {
			n := 0
			for _, p := range dev.Peers {
				if family.is(p.Endpoint.Addr()) {
					n++
				}
			}
			if n > 0 {
				r.add("source", r.worse(), fmt.Sprintf("no virtual IP for the %d peers that are at %s endpoints", n, family.name), "add one to vip", nil)
			}
			continue
		}
		switch err := failover.ProbeSource(r.s.space, r.d.cfg.Name, vips[i]); {
		case err == nil:
			r.add("source", checkOK, fmt.Sprintf("can send from %v", vips[i]), "", nil)
		case errors.Is(err, failover.ErrNotTried):
			r.add("source", checkWarn, fmt.Sprintf("not known whether packets can leave from %v: %v", vips[i], err), "set lo up in the network namespace of the device", nil)
		default:
			r.add("source", checkFail, err.Error(), "load nf_tables, and let the rules of this host pass what comes from the virtual IP", nil)
		}
	}
}

// assumedTrip is the round trip to a peer that estimates are made with: nobody has
// measured it before a promotion.
const assumedTrip = 50 * time.Millisecond

// estimate says how long a promotion would take, by what reading the device took now,
// and how the last one went.
func (r *rehearsal) estimate(got reading) {
	n := 0
	for _, p := range got.dev.Peers {
		if p.Endpoint.IsValid() {
			n++
		}
	}
	took := failover.CallTime(n, got.dev.Kernel, r.s.tracker.Status().Rung.Completes(), got.took, assumedTrip)
	detail := fmt.Sprintf("a promotion would have called all %d peers with an endpoint %v after its first call, if a round trip takes %v; each answers a round trip later",
		n, took.Round(time.Millisecond), assumedTrip)
	var last control.Failover
	r.d.keeperStatus(&last)
	if p := last.Promotion; p != nil && p.Answered > 0 {
		detail += fmt.Sprintf(". In the last one %d answered within %d ms (p50) and %d ms (p99)", p.Answered, p.P50MS, p.P99MS)
	}
	r.add("estimate", checkOK, detail, "", nil)
}

// behind is by how much this host's clock is behind the furthest of the other nodes'. It
// is no less: a heartbeat takes time.
func (s *session) behind() time.Duration { return furthest(s.nodes(), time.Now()) }

func furthest(nodes []groupNode, now time.Time) (most time.Duration) {
	for _, n := range nodes {
		if n.State == applier.NodeStale {
			// What it has stamped is so much older.
			n.Skew -= now.Sub(n.Heard)
		}
		most = max(most, n.Skew)
	}
	return most
}

// wgQuickDir is where wg-quick has its configurations.
const wgQuickDir = "/etc/wireguard"

// checkFiles looks into the files of others that may undo what a standby is: for the
// devices of the daemon's namespace that a check is about, as far as whoever runs it may
// read them.
func checkFiles(dir string, about []finding) []finding {
	var out []finding
	for _, f := range about {
		if f.Check != "failover" || f.Netns != "" {
			continue
		}
		path := filepath.Join(dir, f.Device+".conf")
		text, err := os.ReadFile(path)
		if err != nil || !savesConfig(text) {
			continue
		}
		out = append(out, finding{
			Device: f.Device, Check: "save_config", State: checkFail,
			Detail: path + " has SaveConfig = true: wg-quick down would write the quiet device of a standby into it, without keepalives, and without IPv6 addresses where the link is down",
			Do:     "set SaveConfig = false",
		})
	}
	return out
}

// savesConfig reads SaveConfig as wg-quick does.
func savesConfig(conf []byte) bool {
	saves := false
	for line := range bytes.Lines(conf) {
		line, _, _ = bytes.Cut(line, []byte("#"))
		key, value, _ := bytes.Cut(line, []byte("="))
		if strings.EqualFold(string(bytes.TrimSpace(key)), "SaveConfig") {
			saves = strings.EqualFold(string(bytes.TrimSpace(value)), "true")
		}
	}
	return saves
}
