// SPDX-License-Identifier: MIT

package demo

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// picture is how packets over time become a row of characters: # where some
// arrived, a dot where none did, a space where the time has not come.
type picture struct {
	zero time.Time     // of the ruler
	per  time.Duration // of one character
	lead int           // characters before zero
	size int           // characters in all, without those of marks
	// marks are characters of their own, between those of packets; in order.
	marks []mark
}

type mark struct {
	at   time.Time
	char byte
}

// steps are what one character may stand for.
var steps = []time.Duration{
	interval, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond,
	200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second,
}

// newPicture returns the finest picture that shows what is from lead before zero
// to span after it in so many columns.
func newPicture(columns int, zero time.Time, lead, span time.Duration, marks ...mark) picture {
	p := picture{zero: zero, marks: marks}
	for _, p.per = range steps {
		p.lead = int((lead + p.per - 1) / p.per)
		p.size = p.lead + int((span+p.per-1)/p.per)
		if p.size+len(marks) <= columns {
			break
		}
	}
	return p
}

// offset returns how many characters of packets are before a mark, which is not
// before zero. What comes after a mark in time comes after it in the row.
func (p picture) offset(m mark) int {
	return min(p.lead+int(m.at.Sub(p.zero)/p.per), p.size)
}

// row draws the packets of a flow, as far as now. What was sent before cut belongs
// before death.
func (p picture) row(f *flow, death, cut, now time.Time) string {
	hits := make([]bool, p.size)
	begin := p.zero.Add(-time.Duration(p.lead) * p.per)
	f.mu.Lock()
	for _, a := range f.arrivals {
		got := f.start.Add(a.got)
		if f.start.Add(a.sent).Before(cut) && !got.Before(death) {
			got = death.Add(-1)
		}
		if i := int(got.Sub(begin) / p.per); !got.Before(begin) && i < p.size {
			hits[i] = true
		}
	}
	f.mu.Unlock()
	marks := p.marks
	out := make([]byte, 0, p.size+len(marks))
	for i := range p.size + 1 {
		for ; len(marks) > 0 && p.offset(marks[0]) == i; marks = marks[1:] {
			out = append(out, marks[0].char)
		}
		switch {
		case i == p.size:
		case hits[i]:
			out = append(out, '#')
		case !begin.Add(time.Duration(i+1) * p.per).After(now):
			out = append(out, '.')
		default:
			out = append(out, ' ')
		}
	}
	return string(out)
}

// ruler labels every tenth character from zero on.
func (p picture) ruler() string {
	const every = 10
	row := slices.Repeat([]byte{' '}, p.size+len(p.marks))
	for n := 0; p.lead+n <= p.size; n += every {
		at := p.lead + n
		for _, m := range p.marks {
			// A mark at zero has the label above itself.
			if o := p.offset(m); o < p.lead+n || o == p.lead+n && n > 0 {
				at++
			}
		}
		text := "0"
		if d := time.Duration(n) * p.per; n > 0 && d < time.Second {
			text = fmt.Sprintf("%d ms", d.Milliseconds())
		} else if n > 0 {
			text = fmt.Sprintf("%g s", d.Seconds())
		}
		if at+len(text) <= len(row) {
			copy(row[at:], text)
		}
	}
	return strings.TrimRight(string(row), " ")
}
