// SPDX-License-Identifier: MIT

package demo

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

const (
	width  = 79 // of every line but those of pictures: one less than a terminal, so that none wraps
	widest = 159
	height = 24
	// tall is the height of a terminal that has room for the whole story.
	tall = 50
)

// Screen shows the demo: on a terminal with a part at the bottom that moves,
// elsewhere as plain lines.
type Screen struct {
	w     io.Writer
	live  bool // has a moving part
	color bool
	tall  bool
	width int // of pictures
	drawn int // lines of the moving part
}

// NewScreen returns a Screen on w. The moving part takes a terminal of at least
// 80 by 24; colors are left out there when NO_COLOR is set. Pictures are as wide
// as a terminal, within reason, and elsewhere as one of 80 columns.
func NewScreen(w io.Writer) *Screen {
	s := &Screen{w: w, width: width}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) || os.Getenv("TERM") == "dumb" {
		return s
	}
	columns, lines, err := term.GetSize(int(f.Fd()))
	if err == nil && columns > 0 {
		s.width = min(columns-1, widest)
	}
	s.live = err == nil && columns > width && lines >= height
	s.color = os.Getenv("NO_COLOR") == ""
	s.tall = lines >= tall
	return s
}

// print adds lines for good. It removes the moving part.
func (s *Screen) print(lines ...string) {
	s.write(lines)
	s.drawn = 0
}

// draw replaces the moving part. Without one it does nothing.
func (s *Screen) draw(lines ...string) {
	if s.live {
		s.write(lines)
		s.drawn = len(lines)
	}
}

// write replaces the moving part by lines, in one write: a terminal shows what
// is in between.
func (s *Screen) write(lines []string) {
	var b strings.Builder
	if s.drawn > 0 {
		// The cursor may be behind what the terminal echoed, such as ^C.
		fmt.Fprintf(&b, "\r\x1b[%dA\x1b[J", s.drawn)
	}
	for _, l := range lines {
		b.WriteString(l + "\n")
	}
	_, _ = io.WriteString(s.w, b.String()) // nobody is looking any more
}

// Select Graphic Rendition.
const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
)

func (s *Screen) paint(sgr, text string) string {
	if !s.color || text == "" {
		return text
	}
	return "\x1b[" + sgr + "m" + text + "\x1b[0m"
}

// wrap breaks text into lines.
func (s *Screen) wrap(text string) []string {
	var out []string
	line := ""
	for word := range strings.FieldsSeq(text) {
		switch {
		case line == "":
			line = word
		case len(line)+1+len(word) > min(width, s.width):
			out = append(out, line)
			line = word
		default:
			line += " " + word
		}
	}
	return append(out, line)
}
