// SPDX-License-Identifier: MIT

package tracker

import "time"

// pace keeps costly work from taking more than a tenth of a processor, whoever
// asks for it and however often: after each piece comes a rest of nine times as
// long, and no less than least.
//
// The zero value has done no work yet. It is not safe for concurrent use.
type pace struct {
	least time.Duration
	next  time.Time // no work before
}

// did notes a piece of work that has just ended.
func (p *pace) did(began, ended time.Time) {
	p.next = ended.Add(max(p.least, 9*ended.Sub(began)))
}

// rest returns how long to wait before the next piece; zero or less is not at all.
func (p *pace) rest(now time.Time) time.Duration {
	return p.next.Sub(now)
}
