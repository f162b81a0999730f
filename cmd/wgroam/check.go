// SPDX-License-Identifier: MIT

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
)

// The states of a finding.
const (
	checkOK   = "ok"
	checkWarn = "warn" // works, less well than it could
	checkFail = "fail" // not ready
)

// finding is one thing that check looked at.
type finding struct {
	Device string `json:"device"`          // empty: the node
	Netns  string `json:"netns,omitempty"` // as in the status
	Check  string `json:"check"`           // config, daemon, privilege, btf, hook, port, events, role, failover, device, detector, losses, applier, snapshot, feed, metrics
	State  string `json:"state"`           // ok, warn, fail
	Detail string `json:"detail"`
	Do     string `json:"do"` // what to do about it; empty when ok
}

// checkReport is the answer of the verb check.
type checkReport struct {
	Schema int       `json:"schema"`
	Ready  bool      `json:"ready"` // nothing has failed
	Checks []finding `json:"checks"`
}

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
	if err := parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	report := checkReport{Schema: control.Schema, Ready: true}
	var cfg config.Config
	if *file != "" {
		var err error
		f := finding{Check: "config", State: checkOK, Detail: *file + " can be read"}
		if cfg, err = config.Load(*file); err != nil {
			f = finding{Check: "config", State: checkFail, Detail: err.Error(), Do: "correct it: the daemon does not start with it"}
		}
		report.Checks = append(report.Checks, f)
	}
	path := cmp.Or(*socket, cfg.ControlSocket, defaultSocket)
	var status control.Status
	if *feedOnly {
		if err := control.Get(ctx, path, control.VerbStatus, &status); err != nil {
			return err
		}
		return inStep(status)
	}
	switch err := control.Get(ctx, path, control.VerbStatus, &status); {
	case errors.Is(err, control.ErrNoDaemon):
		report.Checks = append(report.Checks, finding{
			Check: "daemon", State: checkFail, Detail: "no daemon answers on " + path,
			Do: "start one with wgroam run, or pass its --config or --socket",
		})
		report.Checks = append(report.Checks, checkHost()...)
		if len(cfg.Devices) > 0 {
			report.Checks = append(report.Checks, checkConfig(ctx, cfg)...)
		}
	case err != nil:
		return err
	default:
		report.Checks = append(report.Checks, checkStatus(status)...)
	}
	for _, f := range report.Checks {
		report.Ready = report.Ready && f.State != checkFail
	}
	if err := printReport(e, report, *asJSON); err != nil {
		return err
	}
	if !report.Ready {
		return errNotReady
	}
	return nil
}

func printReport(e env, report checkReport, asJSON bool) error {
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
		out = append(out, finding{d.Name, d.Netns, check, state, detail, do})
	}
	warnIf := func(bad bool) string {
		if bad {
			return checkWarn
		}
		return checkOK
	}

	add("role", checkOK, roleLine(d), "")
	for _, a := range d.Alarms {
		add("role", checkFail, a.Alarm+": "+a.Detail, a.Do)
	}
	if d.State == control.StateMissing || d.State == control.StateWaiting {
		add("device", checkFail, withReason(d.State, d.LastError), missingDevice)
		return out
	}
	if d.Failover.Error != "" {
		add("failover", checkFail, d.Failover.Error, "see the log of the daemon")
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
	return append(out, checkFeed(d)...)
}

const missingDevice = "create the device and give it its private key, or correct its name in the configuration"

// inStep returns an error that says which tables may lack something that another
// node knows. A device without a feed has nobody to be in step with.
func inStep(s control.Status) error {
	var why []string
	for _, d := range s.Devices {
		name := where(d.Name, d.Netns)
		switch {
		case d.State == control.StateMissing, d.State == control.StateWaiting:
			why = append(why, name+" is "+withReason(d.State, d.LastError))
		case d.Feed.Mode != control.FeedNone && len(d.Feed.Nodes) == 0:
			why = append(why, name+": no other node has been heard")
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

// skewWarn is the difference between two clocks that peers would notice after a
// failover.
const skewWarn = 1000 // ms

const underFormer = "give its device the new private key, or its configuration the new secret_file"

func checkFeed(d control.DeviceStatus) []finding {
	var out []finding
	add := func(state, detail, do string) {
		out = append(out, finding{d.Name, d.Netns, "feed", state, detail, do})
	}
	if d.Feed.Mode == control.FeedNone {
		add(checkWarn, "none: no other node hears of roams", "set nats.listen and nats.peers, or nats.url")
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
		case max(n.SkewMS, -n.SkewMS) > skewWarn:
			add(checkWarn, detail, "keep both nodes on NTP: peers ignore the handshakes of a clock that is behind for that long")
		case n.Former:
			add(checkWarn, detail+", under former keys", underFormer)
		case n.State == control.NodeSyncing:
			add(checkWarn, detail, "wait a moment: its table is being compared with ours")
		default:
			add(checkOK, detail, "")
		}
	}
	if len(d.Feed.Nodes) == 0 {
		add(checkWarn, "no other node has been heard", "start wgroam on the other gateways of the group")
	}
	for _, r := range []struct{ reason, do string }{
		{"skew", "keep all nodes on NTP: what claims to be from the future is refused"},
		{"name_clash", "give each node a name of its own (node = ...)"},
		{"full", "give this device the peers that the others have"},
	} {
		if n := d.Feed.Refused[r.reason]; n > 0 {
			add(checkWarn, fmt.Sprintf("%d refused (%s)", n, r.reason), r.do)
		}
	}
	return out
}
