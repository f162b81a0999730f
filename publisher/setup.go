// SPDX-License-Identifier: MIT

package publisher

import (
	"context"
	"log/slog"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/feed"
)

// SetupLink is the part of feed.Link that answers requests for setups.
type SetupLink interface {
	OnSetupRequest(func(*feed.Request))
	AnswerSetups(context.Context, *feed.Request, wgroam.SetupDiff) (sent int, err error)
}

// Setups tells other nodes in what their devices are set up differently from this
// node's, when they ask. It is apart from a Publisher because it reads the device,
// which takes time.
type Setups struct {
	link  SetupLink
	read  func() (wgroam.Setups, error)
	log   *slog.Logger
	asked *requests
}

// NewSetups makes Setups that read the device by read, in Run alone. The link must not
// have been started.
func NewSetups(link SetupLink, read func() (wgroam.Setups, error), log *slog.Logger) *Setups {
	s := &Setups{link: link, read: read, log: log, asked: newRequests()}
	link.OnSetupRequest(s.asked.add)
	return s
}

// Run answers until ctx ends.
func (s *Setups) Run(ctx context.Context) {
	s.asked.each(ctx, func(r *feed.Request) int {
		setups, err := s.read()
		if err != nil {
			s.log.Warn("cannot tell another node how the device is set up", "err", err)
			return 0
		}
		n, err := s.link.AnswerSetups(ctx, r, setups.Differing(&r.Have, feed.MaxSetups))
		if err != nil {
			s.log.Debug("answer about setups cut short", "node", r.Node, "err", err)
		}
		return n
	})
}
