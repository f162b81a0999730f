// SPDX-License-Identifier: MIT

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
)

// The states of a finding.
const (
	checkOK   = control.CheckOK
	checkWarn = control.CheckWarn
	checkFail = control.CheckFail
)

type finding = control.Finding

// errNotReady ends check where something has failed; the report says what.
var errNotReady = errors.New("not ready: see the lines with fail")

// checkVerb reports every prerequisite, with what to do about those that are not
// met: as the daemon finds them, or what can be said without one.
func checkVerb(ctx context.Context, e env, args []string) error {
	fs, parse := flags(e, "check")
	asJSON := fs.Bool("json", false, "print JSON")
	file := fs.String("config", "", "configuration `file` of the daemon")
	socket := fs.String("socket", "", "control socket of the daemon (default that of --config, or else "+defaultSocket+")")
	feedOnly := fs.Bool("feed", false, "print nothing, and exit 1 unless every device's table is that of the group: for keepalived")
	electOnly := fs.Bool("elect", false, "print nothing, and exit 1 where no daemon answers, or one that is active hands its role over: for keepalived")
	device := fs.String("device", "", "with --feed or --elect, one device, as status names it, instead of all")
	if err := parse(args); err != nil {
		return err
	}
	if *device != "" && !*feedOnly && !*electOnly {
		fmt.Fprintln(e.stderr, "wgroam check: --device is for --feed and --elect")
		return errUsage
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	var (
		findings []finding
		cfg      config.Config
	)
	if *file != "" {
		var err error
		f := finding{Check: "config", State: checkOK, Detail: *file + " can be read"}
		if cfg, err = config.Load(*file); err != nil && (*feedOnly || *electOnly) {
			return err // or another daemon would be asked
		} else if err != nil {
			f = finding{Check: "config", State: checkFail, Detail: err.Error(), Do: "correct it: the daemon does not start with it"}
		}
		findings = append(findings, f)
	}
	path := cmp.Or(*socket, cfg.ControlSocket, defaultSocket)
	if *feedOnly || *electOnly {
		var (
			status control.Status
			err    error
		)
		if *electOnly {
			err = control.Elect(ctx, path, *device, &status)
		} else {
			err = control.Get(ctx, path, control.VerbStatus, &status)
		}
		if err != nil {
			return err
		}
		if *device != "" {
			status.Devices = slices.DeleteFunc(status.Devices, func(d control.DeviceStatus) bool { return where(d.Name, d.Netns) != *device })
			if len(status.Devices) == 0 {
				return noDevice(*device)
			}
		}
		if err := electable(status); *electOnly && err != nil {
			return err
		}
		if *feedOnly {
			return inStep(status)
		}
		return nil
	}
	var answer control.Check
	switch err := control.Get(ctx, path, control.VerbCheck, &answer); {
	case errors.Is(err, control.ErrNoDaemon):
		findings = append(findings, finding{
			Check: "daemon", State: checkFail, Detail: "no daemon answers on " + path,
			Do: "start one with wgroam run, or pass its --config or --socket",
		})
		findings = append(findings, checkHost()...)
		if len(cfg.Devices) > 0 {
			findings = append(findings, checkConfig(ctx, cfg)...)
		}
	case err != nil:
		return err
	default:
		findings = append(findings, answer.Checks...)
		findings = append(findings, checkFiles(wgQuickDir, answer.Checks)...)
	}
	report := control.NewCheck(findings)
	if err := printReport(e, report, *asJSON); err != nil {
		return err
	}
	if !report.Ready {
		return errNotReady
	}
	return nil
}

// checkTimeout bounds a check: with many peers, devices are read and compared for some
// seconds.
const checkTimeout = 30 * time.Second

// namedPeers is how many peers of a finding people get to see.
const namedPeers = 5

func printReport(e env, report control.Check, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(e.stdout).Encode(report)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	for _, f := range report.Checks {
		device := "-"
		if f.Device != "" {
			device = where(f.Device, f.Netns)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", f.State, device, f.Check, f.Detail)
		if f.Do != "" {
			fmt.Fprintf(w, "\t\t\t  %s\n", f.Do)
		}
		for i, p := range f.Peers {
			if i == namedPeers {
				more := fmt.Sprintf("%d more: see --json", len(f.Peers)-i)
				if len(f.Peers) == control.MaxFindingPeers {
					more = "more: --json names " + strconv.Itoa(len(f.Peers))
				}
				fmt.Fprintf(w, "\t\t\t  and %s\n", more)
				break
			}
			fmt.Fprintf(w, "\t\t\t  %v %s\n", p.Peer, p.What)
		}
	}
	return w.Flush()
}

// checkStatus judges what the daemon says of itself.
func checkStatus(s control.Status) []finding {
	out := []finding{{Check: "daemon", State: checkOK, Detail: fmt.Sprintf("%s runs version %s", s.Node, s.Version)}}
	if s.Events != nil {
		out = append(out, checkEvents(*s.Events))
	}
	for _, d := range s.Devices {
		out = append(out, checkDevice(d)...)
	}
	return out
}

func checkEvents(e control.EventsStatus) finding {
	f := finding{Check: "events", State: checkOK, Detail: fmt.Sprintf("%s: %d published, %d dropped, %d waiting", e.Name, e.Sent, e.Dropped, e.Waiting)}
	// The nodes do not need it, so it is no failure.
	switch {
	case !e.Connected:
		f.State, f.Detail, f.Do = checkWarn, withReason(e.Name+" is not connected", e.Error), "let this host reach the NATS of [events], or correct its keys"
	case e.Dropped > 0:
		f.State, f.Detail, f.Do = checkWarn, withReason(f.Detail, e.Error), "keep that NATS up, and allow publish on wgroam.events.>"
	}
	return f
}

func checkDevice(d control.DeviceStatus) []finding {
	var out []finding
	add := func(check, state, detail, do string) {
		if state == checkOK {
			do = ""
		}
		out = append(out, finding{Device: d.Name, Netns: d.Netns, Check: check, State: state, Detail: detail, Do: do})
	}
	warnIf := func(bad bool) string {
		if bad {
			return checkWarn
		}
		return checkOK
	}

	state := checkOK
	if d.Role == roleUnknown {
		state = checkWarn
		if time.Since(d.RoleSince) > knownWithin {
			state = checkFail
		}
	}
	add("role", state, roleLine(d), "if it stays so, the log of the daemon says whom it waits for")
	for _, a := range d.Alarms {
		add("role", checkFail, a.Alarm+": "+a.Detail, a.Do)
	}
	if k := d.Keepalived; k != nil {
		switch {
		case k.Error != "":
			add("keepalived", checkFail, "cannot be heard: "+k.FIFO+": "+k.Error, "mend that, or correct keepalived.fifo")
		case k.Heard:
			add("keepalived", checkOK, fmt.Sprintf("%q is %s", k.Name, cmp.Or(k.Says, "known")), "")
		case k.Says != "" && len(k.Others) > 0:
			add("keepalived", checkWarn, fmt.Sprintf("speaks of %s; that %q is %s was said before this daemon started", quoted(k.Others), k.Name, k.Says),
				"if keepalived.conf has no such instance or group, correct vrrp")
		case len(k.Others) > 0:
			add("keepalived", checkFail, fmt.Sprintf("speaks of %s, and not of %q", quoted(k.Others), k.Name),
				"name the instance or group of keepalived.conf in vrrp")
		case k.Says != "":
			add("keepalived", checkOK, fmt.Sprintf("%q is %s, as was said before this daemon started", k.Name, k.Says), "")
		default:
			add("keepalived", checkWarn, fmt.Sprintf("has said nothing of %q since the daemon started", k.Name),
				"start or reload keepalived, with vrrp_notify_fifo "+k.FIFO+" and fifo_write_vrrp_states_on_reload: see contrib/keepalived")
		}
	}
	if k := d.Keepalived; k != nil && !k.Tracks {
		add("keepalived", checkWarn, "does not ask wgroam check --elect: it is dead, or would elect this node when wgroam is",
			"start keepalived, and let it track that as in contrib/keepalived")
	}
	if to := d.Failover.Yields; to != "" {
		add("keepalived", checkWarn, "prefers "+to+" since a handover: check --feed fails here", "have "+to+" hand over to this node, or take that back with wgroam role auto")
	}
	if d.State == control.StateMissing || d.State == control.StateWaiting {
		add("device", checkFail, withReason(d.State, d.LastError), missingDevice)
		return out
	}
	switch {
	case d.Failover.Error != "":
		add("failover", checkFail, d.Failover.Error, "see the log of the daemon")
	case d.Role == string(failover.Standby) && d.Failover.State != failover.StateQuiet:
		add("failover", checkFail, withReason("the device is not quiet yet", d.Failover.State), "wait a moment, or see the log of the daemon")
	case d.Role == string(failover.Active) && d.Failover.State != failover.StateOpen && d.Failover.State != failover.StatePromoting:
		add("failover", checkFail, withReason("the device is not that of an active yet", d.Failover.State), "wait a moment, or see the log of the daemon")
	case d.Failover.State != "" && d.Failover.State != failover.StateIdle:
		add("failover", checkOK, "the device is "+d.Failover.State, "")
	}
	add("device", checkOK, fmt.Sprintf("%s, %d peers", d.State, d.Peers), "")
	switch d.Detector.Rung {
	case control.RungFentry:
		add("detector", checkOK, d.Detector.Rung, "")
	case control.RungKprobe, control.RungPort:
		add("detector", checkOK, withReason(d.Detector.Rung, d.Detector.Reason), "")
	default:
		add("detector", checkWarn, withReason(d.Detector.Rung, d.Detector.Reason),
			"remove the reason if you can: polling sees a roam late, and guesses its cause")
	}
	add("losses", warnIf(d.SweepRepairs > 0),
		fmt.Sprintf("%d changes seen, %d lost and found again, %d repaired by the sweep", d.Events, d.Lost, d.SweepRepairs),
		"report this with the output of wgroam status: the sweep should have nothing to repair")
	add("applier", warnIf(d.ApplyErrors > 0), fmt.Sprintf("%d endpoints written, %d errors", d.Applied, d.ApplyErrors),
		"wgroam peers shows the peers that were not written, and why")
	if d.Snapshot.Error != "" {
		add("snapshot", checkWarn, d.Snapshot.Error, "make room in state.dir, and let wgroam write there: the table is in memory only")
	}
	out = append(out, checkFeed(d)...)
	if f, ok := checkClock(d); ok {
		out = append(out, f)
	}
	return out
}

func quoted(names []string) string {
	var out []string
	for _, n := range names {
		out = append(out, strconv.Quote(n))
	}
	return strings.Join(out, ", ")
}

// skewWarn is the difference between two clocks that peers would notice after a
// failover, and skewNote one that those notice which had a handshake right before.
const (
	skewWarn = 1000 // ms
	skewNote = 100  // ms
)

// knownWithin is how long it may take until the role is known.
const knownWithin = 15 * time.Second

// checkClock compares this host's clock with those of the other nodes; false if there
// are none.
func checkClock(d control.DeviceStatus) (finding, bool) {
	if len(d.Feed.Nodes) == 0 {
		return finding{}, false
	}
	f := finding{Device: d.Name, Netns: d.Netns, Check: "clock", State: checkOK, Detail: "agrees with those of the other nodes"}
	alive := slices.DeleteFunc(slices.Clone(d.Feed.Nodes), func(n control.NodeStatus) bool { return n.State == control.NodeStale })
	slowest := slices.MinFunc(append(alive, control.NodeStatus{}), func(a, b control.NodeStatus) int { return cmp.Compare(a.SkewMS, b.SkewMS) })
	switch seconds := float64(d.ClockBehindMS) / 1000; {
	case d.ClockBehindMS > skewWarn && (d.Role == string(failover.Active) || d.Role == string(failover.Always)):
		f.State, f.Detail = checkWarn, fmt.Sprintf("%.1f s behind the group's: peers that were another node's before ignore this one's handshakes for so long", seconds)
	case d.ClockBehindMS > skewWarn:
		f.State, f.Detail = checkFail, fmt.Sprintf("%.1f s behind the group's: peers would ignore the handshakes of this node for so long", seconds)
	case d.ClockBehindMS > skewNote:
		f.State, f.Detail = checkWarn, fmt.Sprintf("%d ms behind the group's: peers that had a handshake so shortly before a promotion would ignore this node's first one", d.ClockBehindMS)
	case -slowest.SkewMS > skewWarn:
		f.State, f.Detail = checkWarn, fmt.Sprintf("%.1f s ahead of %s's: peers would ignore the handshakes of that node for so long", float64(-slowest.SkewMS)/1000, slowest.Name)
	}
	if f.State != checkOK {
		f.Do = "set the clocks, and keep all nodes on NTP"
	}
	return f, true
}

const missingDevice = "create the device and give it its private key, or correct its name in the configuration"

// electable returns an error where keepalived has to take the virtual IP away. Once the
// node is a standby, it may be elected again.
func electable(s control.Status) error {
	for _, d := range s.Devices {
		if to := d.Failover.Yields; to != "" && d.Role == string(failover.Active) {
			return fmt.Errorf("%s: being handed over to %s", where(d.Name, d.Netns), to)
		}
	}
	return nil
}

// inStep returns an error that says which tables may lack something that another
// node knows. A device without a feed has nobody to be in step with; as a standby it should.
func inStep(s control.Status) error {
	var why []string
	for _, d := range s.Devices {
		name := where(d.Name, d.Netns)
		switch {
		case d.State == control.StateMissing, d.State == control.StateWaiting:
			why = append(why, name+" is "+withReason(d.State, d.LastError))
		case len(d.Feed.Nodes) == 0 && (d.Feed.Mode != control.FeedNone || d.Role == string(failover.Standby)):
			why = append(why, name+": no other node has been heard")
		}
		if to := d.Failover.Yields; to != "" {
			why = append(why, fmt.Sprintf("%s: handed over to %s", name, to))
		}
		for _, n := range d.Feed.Nodes {
			if n.State != control.NodeSynced {
				why = append(why, fmt.Sprintf("%s: node %s is %s", name, cmp.Or(n.Name, n.ID), stateLine(n)))
			}
		}
	}
	if why != nil {
		return fmt.Errorf("not in step: %s", strings.Join(why, ", "))
	}
	return nil
}

const underFormer = "give its device the new private key, or its configuration the new secret_file"

func checkFeed(d control.DeviceStatus) []finding {
	var out []finding
	add := func(state, detail, do string) {
		out = append(out, finding{Device: d.Name, Netns: d.Netns, Check: "feed", State: state, Detail: detail, Do: do})
	}
	alone := checkWarn
	if d.Role == string(failover.Standby) {
		alone = checkFail // it knows nothing of the peers
	}
	if d.Feed.Mode == control.FeedNone {
		add(alone, "none: no other node hears of roams, nor this one of theirs", "set nats.listen and nats.peers, or nats.url")
		return out
	}
	if d.Feed.Error != "" {
		add(checkFail, d.Feed.Error, "free the address, or correct nats.listen")
	}
	for _, c := range d.Feed.Connections {
		switch {
		case c.Former && (!c.Connected || c.Error == ""):
			// Where there is none, the other node has no former keys any more.
		case c.Connected && c.Error == "":
			add(checkOK, c.Name+" is connected", "")
		case !c.Connected && slices.ContainsFunc(d.Feed.Connections, func(o control.FeedConnection) bool { return o.Former && o.Name == c.Name && o.Connected }):
			add(checkWarn, c.Name+" is connected under former keys only", underFormer)
		case c.Connected:
			add(checkFail, withReason(c.Name+" is connected", c.Error), "correct the permissions of the NATS user; what is forbidden is tried again")
		default:
			add(checkFail, withReason(c.Name+" is not connected", c.Error), "unless the error says more: start wgroam or NATS there, and let this host reach it")
		}
	}
	for _, n := range d.Feed.Nodes {
		detail := fmt.Sprintf("node %s is %s, clock %+d ms", n.Name, stateLine(n), n.SkewMS)
		switch {
		case n.State == control.NodeStale:
			add(checkFail, detail, "it is silent: see wgroam status there")
		case n.Former:
			add(checkWarn, detail+", under former keys", underFormer)
		case n.State == control.NodeSyncing:
			add(checkWarn, detail, "wait a moment: its table is being compared with ours")
		default:
			add(checkOK, detail, "")
		}
	}
	if len(d.Feed.Nodes) == 0 {
		add(alone, "no other node has been heard", "start wgroam on the other gateways of the group, with the same private key and secret_file")
	}
	for _, why := range []string{"skew", "name_clash", "full"} {
		if n := d.Feed.Refused[why]; n > 0 {
			add(checkWarn, fmt.Sprintf("%d refused (%s)", n, why), remedies[why])
		}
	}
	return out
}
