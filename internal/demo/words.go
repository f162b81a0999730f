// SPDX-License-Identifier: MIT

package demo

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// frame is the time between two pictures of the moving part.
const frame = 100 * time.Millisecond

const (
	title         = "wgroam demo: gateways a (active) and h (standby) with one key and virtual IP"
	roamsTitle    = "1. The client roams, sending a packet every 10 ms; h's link is down"
	outageMethod  = "from the cut, with no time to detect it, until a packet sent after it arrives; one is sent every 10 ms"
	failoverTitle = "2. Gateway a crashes: two labs, the same moment, with wgroam and without"
	failoverText  = "By hand, alike in both, as an operator's script would (there is no failover verb yet): " +
		"the virtual IP goes to h, h's link comes up, its keepalives call the clients it knows. " +
		"A client that sends notices by itself after 15 s, a silent one never does. " +
		"Outage: " + outageMethod + ". # = packets in 0.5 s."
)

// describe says what the numbers of this machine are worth.
func (s *show) describe() string {
	switch {
	case s.sum.WireGuard != "kernel":
		return fmt.Sprintf("Linux %s has no kernel WireGuard: this is wireguard-go, and wgroam detects by polling it every %s.",
			s.sum.Kernel, pollText)
	case s.hooked:
		return fmt.Sprintf("Linux %s, kernel WireGuard, kernel hook (%s)", s.sum.Kernel, s.sum.Detector.Rung)
	}
	return fmt.Sprintf("Linux %s, kernel WireGuard, but wgroam detects by polling it every %s: %s",
		s.sum.Kernel, pollText, s.sum.Detector.Reason)
}

var pollText = fmt.Sprintf("%d ms", poll.Milliseconds())

func (s *show) roamsHeader() string {
	return s.screen.paint(dim, fmt.Sprintf("  %-8s %-21s %-24s %-10s %s", "roam", "from", "to", "a saw", "h has it"))
}

func (s *show) roamRow(r Roam) string {
	has := s.screen.paint(green, fmt.Sprintf("%8s", s.number(r.LatencyUS)+" ms"))
	if !r.Arrived {
		has = s.screen.paint(red, "   never")
	}
	return fmt.Sprintf("  %-8s %-21s %-24s %-10s %s", r.What, r.Old, "-> "+r.New.String(), r.Cause, has)
}

// number prints a latency in milliseconds, as exactly as it was measured.
func (s *show) number(us int64) string {
	switch {
	case !s.hooked && us < 1000:
		return "<1"
	case !s.hooked:
		return fmt.Sprintf("%.0f", float64(us)/1000)
	case us < 10_000:
		return fmt.Sprintf("%.2f", float64(us)/1000)
	}
	return fmt.Sprintf("%.1f", float64(us)/1000)
}

func (s *show) traffic() string {
	sent, arrived := s.with.sends.count()
	return s.screen.paint(dim, fmt.Sprintf("  %d packets sent, %d echoes", sent, arrived))
}

func (s *show) latencyMethod() string {
	if s.hooked {
		return "from a's kernel taking the endpoint to h's doing so, both stamped by the hook"
	}
	return "from a's device showing the endpoint to h's device showing it, both read every ms; " +
		"up to " + pollText + " of it is a's daemon waiting to poll"
}

func (s *show) roamsResult() []string {
	text := fmt.Sprintf("%d of %d roams arrived in h's device", s.arrived(), len(s.sum.Roams))
	if l := s.sum.Latency; l != nil {
		text += fmt.Sprintf(" after %s to %s ms, median %s ms: %s", s.number(l.MinUS), s.number(l.MaxUS), s.number(l.MedianUS), l.Method)
	}
	return wrap(text + ".")
}

func (s *show) label(side *side, f *flow) string {
	with, client := "with wgroam", "sends"
	if side == s.without {
		with = "without"
	}
	if f == side.silent {
		client = "silent"
	}
	return fmt.Sprintf("%-12s  %-6s", with, client)
}

func (s *show) backRow(side *side, f *flow, outage time.Duration) string {
	return fmt.Sprintf("  %s  traffic is back after %s", s.label(side, f), seconds(outage))
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// failoverRows draws both labs, elapsed after the crash.
func (s *show) failoverRows(elapsed time.Duration) []string {
	rows := []string{s.screen.paint(dim, fmt.Sprintf("  %-12s  %-6s  %-13s%-10s%-10s%-6s%s %s", "", "client",
		"  crash", "5 s", "10 s", "15 s", "20 s", "outage"))}
	for _, side := range []*side{s.with, s.without} {
		for _, f := range []*flow{side.sends, side.silent} {
			result := s.screen.paint(red, fmt.Sprintf("down %.1f s", elapsed.Seconds()))
			if outage, ok := f.outage(side.crash, side.cut); ok {
				result = s.screen.paint(green, seconds(outage))
			} else if elapsed >= limit {
				result = s.screen.paint(red, "still down")
			}
			rows = append(rows, fmt.Sprintf("  %s  %s %s", s.label(side, f), s.paintStrip(f.strip(side.crash, side.cut, elapsed)), result))
		}
	}
	return rows
}

func (s *show) paintStrip(strip string) string {
	var b strings.Builder
	for strip != "" {
		n := len(strip) - len(strings.TrimLeft(strip, strip[:1]))
		sgr := map[byte]string{'#': green, '.': red}[strip[0]]
		if sgr == "" {
			b.WriteString(strip[:n])
		} else {
			b.WriteString(s.screen.paint(sgr, strip[:n]))
		}
		strip = strip[n:]
	}
	return b.String()
}

func (s *show) summaryRows() []string {
	row := func(what, with, without string) string {
		return strings.TrimRight(fmt.Sprintf("  %-27s %-26s %s", what, with, without), " ")
	}
	outage := func(o Outage) string {
		if !o.Back {
			return fmt.Sprintf("still down after %.0f s", limit.Seconds())
		}
		return seconds(time.Duration(o.OutageMS * float64(time.Millisecond)))
	}
	l, f := s.sum.Latency, s.sum.Failover
	known := func(o Outcome) string { return fmt.Sprintf("%d of %d", o.Known, clients) }
	return []string{
		"",
		s.screen.paint(bold, row("Summary", "with wgroam", "without")),
		row("roams in h's device", fmt.Sprintf("%d of %d", s.arrived(), len(s.sum.Roams)), "-"),
		row("  min / median / max", fmt.Sprintf("%s / %s / %s ms", s.number(l.MinUS), s.number(l.MedianUS), s.number(l.MaxUS)), "-"),
		row("clients known to h at crash", known(f.With), known(f.Without)),
		row("outage, client that sends", outage(f.With.Sends), outage(f.Without.Sends)),
		row("outage, silent client", outage(f.With.Silent), outage(f.Without.Silent)),
		row("WireGuard", s.sum.WireGuard+", Linux "+s.sum.Kernel, ""),
	}
}

// logRows returns the end of a log.
func logRows(name, text string) []string {
	const last = 10
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > last {
		lines = lines[len(lines)-last:]
	}
	return slices.Concat([]string{"", "End of " + name + ":"}, lines)
}
