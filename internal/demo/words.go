// SPDX-License-Identifier: MIT

package demo

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/wgroam/wgroam/internal/control"
)

// frame is the time between two pictures of the moving part.
const frame = 100 * time.Millisecond

const (
	title         = "wgroam demo: gateways a (active) and h (standby) with one key and virtual IP"
	roamsTitle    = "1. The client roams, sending a packet every 5 ms; h's link is down"
	outageMethod  = "from the moment when h gets the virtual IP until a packet sent after a's death arrives; one is sent every 5 ms"
	failoverTitle = "2. Gateway a dies: two labs, the same moment, with wgroam and without"
	failoverText  = "Each lab has three clients, and all have roamed. One sends, and gets echoes; one is idle, with a " +
		"persistent keepalive of 25 s; one is silent. The gateway sends to the last two. a is cut off, its daemon killed. " +
		"1 s later, for failover tools take time to notice, the virtual IP moves to h. With wgroam the daemon on h sees that " +
		"and does the rest. Without, a script sets h's link up. Outage: " + outageMethod + "."
	legend = "# packets arrive  . none  | a dies  ^ h gets the virtual IP"
)

// describe says what the numbers of this machine are worth.
func (s *show) describe() string {
	what := fmt.Sprintf("Linux %s, kernel WireGuard", s.sum.Kernel)
	if s.sum.WireGuard != "kernel" {
		what = fmt.Sprintf("Linux %s has no kernel WireGuard: this is wireguard-go", s.sum.Kernel)
	}
	switch d := s.sum.Detector; {
	case s.hooked:
		return fmt.Sprintf("%s, kernel hook (%s).", what, d.Rung)
	case d.Rung == control.RungPort:
		return what + ", and wgroam detects by a program at its UDP port."
	default:
		return fmt.Sprintf("%s, and wgroam detects by polling it every %s: %s", what, pollText, d.Reason)
	}
}

var pollText = fmt.Sprintf("%d ms", poll.Milliseconds())

// does says of a client what it does.
func does(client int) string {
	if kinds[client].sends {
		return kinds[client].name
	}
	return "is " + kinds[client].name
}

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
	sent, arrived := s.with.flows[0].count()
	return s.screen.paint(dim, fmt.Sprintf("  %d packets sent, %d echoes", sent, arrived))
}

func (s *show) latencyMethod() string {
	if s.hooked {
		return "from a's kernel taking the endpoint to h's doing so, both stamped by the hook"
	}
	method := "from a's device showing the endpoint to h's device showing it, both read every ms"
	if s.sum.Detector.Rung == control.RungPolling {
		method += "; up to " + pollText + " of it is a's daemon waiting to poll"
	}
	return method
}

func (s *show) roamsResult() []string {
	text := fmt.Sprintf("%d of %d roams arrived in h's device", s.arrived(), len(s.sum.Roams))
	if l := s.sum.Latency; l != nil {
		text += fmt.Sprintf(" after %s to %s ms, median %s ms: %s", s.number(l.MinUS), s.number(l.MaxUS), s.number(l.MedianUS), l.Method)
	}
	return s.screen.wrap(text + ".")
}

// label names a row of the picture.
func (s *show) label(side *side, client int) string {
	with := "with"
	if side == s.without {
		with = "without"
	}
	return fmt.Sprintf("  %-7s  %-6s  ", with, kinds[client].name)
}

const (
	labelWidth  = 2 + 7 + 2 + 6 + 2
	resultWidth = 2 + len("down 40 s")
)

// columns is how wide a picture is between the two.
func (s *show) columns() int { return s.screen.width - labelWidth - resultWidth }

func (s *show) backRow(side *side, client int, outage time.Duration) string {
	return s.label(side, client) + "is back after " + seconds(outage)
}

func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.2f s", d.Seconds())
}

// failoverRows draws both labs as they are now.
func (s *show) failoverRows(now time.Time) []string {
	var rows []string
	for _, side := range s.sides() {
		marks := []mark{{side.death, '|'}}
		if !side.told.IsZero() {
			marks = append(marks, mark{side.told, '^'})
		}
		p := newPicture(s.columns(), side.death, 2*time.Second, notice+limit, marks...)
		if rows == nil {
			rows = append(rows, s.screen.paint(dim, "  "+legend), s.screen.paint(dim, strings.Repeat(" ", labelWidth)+p.ruler()))
		}
		for i, f := range side.flows {
			result := s.screen.paint(red, "down")
			if outage, ok := side.outage(i); ok {
				result = s.screen.paint(green, seconds(outage))
			} else if since := now.Sub(side.told); !side.told.IsZero() && since >= limit {
				result = s.screen.paint(red, moreThan)
			} else if !side.told.IsZero() {
				result = s.screen.paint(red, fmt.Sprintf("down %.0f s", since.Seconds()))
			}
			rows = append(rows, s.label(side, i)+s.paintStrip(p.row(f, side.death, side.cut, now))+"  "+result)
		}
	}
	return rows
}

var moreThan = fmt.Sprintf("> %.0f s", limit.Seconds())

// closeRows draws the moment when the lab with wgroam is back, which is too short
// for the other picture. Without it there are none.
func (s *show) closeRows(now time.Time) []string {
	var longest time.Duration
	for i := range s.with.flows {
		outage, ok := s.with.outage(i)
		if !ok {
			return nil
		}
		longest = max(longest, outage)
	}
	columns := s.columns()
	p := newPicture(columns, s.with.told, longest/4, longest*3/2, mark{s.with.told, '^'})
	p.size = columns - len(p.marks)
	rows := []string{"", s.screen.paint(dim, fmt.Sprintf("  The same with wgroam, %s a character", seconds(p.per))),
		s.screen.paint(dim, strings.Repeat(" ", labelWidth)+p.ruler())}
	for i, f := range s.with.flows {
		outage, _ := s.with.outage(i)
		row := p.row(f, s.with.death, s.with.cut, now)
		rows = append(rows, s.label(s.with, i)+s.paintStrip(row)+"  "+s.screen.paint(green, seconds(outage)))
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
	row := func(what, with, without, times string) string {
		return strings.TrimRight(fmt.Sprintf("  %-29s  %-11s  %-9s  %s", what, with, without, times), " ")
	}
	l, f := s.sum.Latency, s.sum.Failover
	known := func(o Outcome) string { return fmt.Sprintf("%d of %d", o.Known, len(kinds)) }
	rows := []string{
		"",
		s.screen.paint(bold, row("Summary", "with wgroam", "without", "times shorter")),
		row("clients known to h at death", known(f.With), known(f.Without), ""),
	}
	for i, with := range f.With.Clients {
		without := f.Without.Clients[i]
		text := func(o Outage) string {
			if !o.Back {
				return moreThan
			}
			return seconds(time.Duration(o.OutageMS * float64(time.Millisecond)))
		}
		var times string
		if with.Back && with.OutageMS > 0 {
			times = fmt.Sprintf("%.0f", math.Floor(without.OutageMS/with.OutageMS))
			if !without.Back {
				times = "> " + times
			}
		}
		rows = append(rows, row("outage, client that "+does(i), text(with), text(without), times))
	}
	return append(rows,
		row("h's daemon", fmt.Sprintf("has had the answers of %d of %d clients", f.Answered, len(kinds)), "", ""),
		row("roams in h's device", fmt.Sprintf("%d of %d", s.arrived(), len(s.sum.Roams)), "", ""),
		row("  min / median / max", fmt.Sprintf("%s / %s / %s ms", s.number(l.MinUS), s.number(l.MedianUS), s.number(l.MaxUS)), "", ""),
		row("WireGuard", s.sum.WireGuard+", Linux "+s.sum.Kernel, "", ""))
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
