// SPDX-License-Identifier: MIT

package tracker

import "time"

// pace keeps costly work from taking more than a tenth of a processor, whoever
// asks for it and however often: after each piece comes a rest of nine times as
// long, and no less than least. What takes that long that the rest would be more than
// most had to wait for a processor or a lock; then it is most. And what takes more than ten
// times as long as the piece before was stopped meanwhile, and counts as that piece; if it
// was not, the next one counts.
//
// A pace begins with no work done. It is not safe for concurrent use.
type pace struct {
	least, most time.Duration
	next        time.Time // no work before
	last        time.Duration
}

// did notes a piece of work that has just ended.
func (p *pace) did(began, ended time.Time) {
	took := ended.Sub(began)
	counts := took
	if p.last > 0 && took > 10*p.last {
		counts = p.last
	}
	p.last = took
	p.next = ended.Add(min(max(p.least, 9*counts), p.most))
}

// rest returns how long to wait before the next piece; zero or less is not at all.
func (p *pace) rest(now time.Time) time.Duration {
	return p.next.Sub(now)
}
