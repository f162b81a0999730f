// SPDX-License-Identifier: MIT

package tracker

import "time"

// pace keeps costly work from taking more than a tenth of a processor, whoever
// asks for it and however often: after each piece comes a rest of nine times as
// long, and no less than least. What takes that long that the rest would be more than
// most was stopped meanwhile, or had to wait for a processor or a lock; then it is most.
//
// A pace begins with no work done. It is not safe for concurrent use.
type pace struct {
	least, most time.Duration
	next        time.Time // no work before
}

// did notes a piece of work that has just ended.
func (p *pace) did(began, ended time.Time) {
	p.next = ended.Add(min(max(p.least, 9*ended.Sub(began)), p.most))
}

// rest returns how long to wait before the next piece; zero or less is not at all.
func (p *pace) rest(now time.Time) time.Duration {
	return p.next.Sub(now)
}
