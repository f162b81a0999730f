// SPDX-License-Identifier: MIT

package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
)

// parser collects the mistakes in a file.
type parser struct {
	file, text string
	mistakes   []error

	located bool
	keys    []toml.Key
	lines   []int // where the keys begin
}

// mistake notes what is wrong with a key, dotted as in toml.Key, of the device
// of that index; -1 for keys that belong to no device.
func (p *parser) mistake(dev int, key, format string, args ...any) {
	where := p.file
	if line := p.line(dev, key); line > 0 {
		where = fmt.Sprintf("%s:%d", p.file, line)
	}
	if where != "" {
		where += ": "
	}
	p.mistakes = append(p.mistakes, fmt.Errorf("%s%s: %s", where, key, fmt.Sprintf(format, args...)))
}

// line returns the line of a key, or else that of its table; 0 if there is
// none.
func (p *parser) line(dev int, key string) int {
	if !p.located {
		p.located = true
		p.keys, p.lines, _ = locate(p.text)
	}
	table, device := 0, -1
	for i, k := range p.keys {
		s := k.String()
		if s == "device" {
			device++
		}
		if dev >= 0 && device != dev {
			continue
		}
		if s == key {
			return p.lines[i]
		}
		if table == 0 && strings.HasPrefix(key, s+".") {
			table = p.lines[i]
		}
	}
	return table
}

// locate returns all keys of a text that is valid TOML, and the lines on which
// they begin. It ends with the first value of a wrong type, and returns the
// error. A long text has no lines.
//
// The TOML package knows the line of each key, and keeps it to itself. So this
// reads the text again, a line longer each time: what comes in was on that line.
func locate(text string) (keys []toml.Key, lines []int, err error) {
	rows := strings.SplitAfter(text, "\n")
	if len(rows) > 1000 {
		return nil, nil, nil
	}
	start, end := 1, 0
	for n, row := range rows {
		end += len(row)
		var r raw
		md, err := toml.Decode(text[:end], &r)
		if _, ok := errors.AsType[toml.ParseError](err); ok {
			continue // The value goes on.
		}
		keys = md.Keys()
		for len(lines) < len(keys) {
			lines = append(lines, start)
		}
		if err != nil {
			return keys, lines, err
		}
		start = n + 2
	}
	return keys, lines, nil
}

// wrongType returns what to say of a text that toml.Decode has refused for the
// type of a value.
func (p *parser) wrongType(err error) error {
	keys, lines, first := locate(p.text)
	if first == nil || len(keys) == 0 {
		return fmt.Errorf("%s: %w", p.file, err)
	}
	// What came in last is what did not fit, unless it made a table of device,
	// as device.name = "wg0" does, or [device.wg0].
	last := keys[len(keys)-1]
	key := last.String()
	if last[0] == "device" && !slices.ContainsFunc(keys, func(k toml.Key) bool { return k.String() == "device" }) {
		key = "device"
	}
	want := map[reflect.Kind]string{
		reflect.String: `want a string, in quotes`,
		reflect.Bool:   `want true or false`,
		reflect.Slice:  `want an array of strings: ["...", "..."]`,
		reflect.Struct: fmt.Sprintf("want a table: [%s]", key),
		reflect.Array:  fmt.Sprintf("want an array of tables: [[%s]]", key),
	}[knownKeys()[key]]
	if want == "" {
		return fmt.Errorf("%s: %w", p.file, err)
	}
	return fmt.Errorf("%s:%d: %s: %s", p.file, lines[len(lines)-1], key, want)
}

// unknown notes the keys that are not in raw. It compares as TOML does, where
// toml.Decode (and with it MetaData.Undecoded) takes Name for name.
func (p *parser) unknown(keys []toml.Key) {
	known := knownKeys()
	device := -1
	noted := map[string]bool{}
	for _, k := range keys {
		key := k.String()
		if key == "device" {
			device++
		}
		if _, ok := known[key]; ok {
			continue
		}
		noted[key] = true
		if noted[k[:len(k)-1].String()] {
			continue // One mistake, one line.
		}
		dev := -1
		if k[0] == "device" {
			dev = device
		}
		why := "unknown key"
		if near := nearest(key, slices.Sorted(maps.Keys(known))); near != "" {
			why += ": did you mean " + near + "?"
		} else {
			why += ": remove it; reference.toml has all keys"
		}
		p.mistake(dev, key, "%s", why)
	}
}

// knownKeys returns all keys of raw with what they hold: String, Bool, Slice (of
// strings), Struct (a table) or Array (of tables).
func knownKeys() map[string]reflect.Kind {
	known := map[string]reflect.Kind{}
	var walk func(prefix string, t reflect.Type)
	walk = func(prefix string, t reflect.Type) {
		for f := range t.Fields() {
			if f.Anonymous {
				walk(prefix, f.Type)
				continue
			}
			key := prefix + f.Tag.Get("toml")
			known[key] = f.Type.Kind()
			if f.Type.Kind() == reflect.Struct {
				walk(key+".", f.Type)
			}
			if f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct {
				known[key] = reflect.Array
				walk(key+".", f.Type.Elem())
			}
		}
	}
	walk("", reflect.TypeFor[raw]())
	return known
}

// nearest returns the known keys that differ from key in the table only, or
// else the one that takes the fewest edits; "" if none comes close.
func nearest(key string, known []string) string {
	if len(key) > 64 {
		return ""
	}
	last := func(k string) string { return k[strings.LastIndexByte(k, '.')+1:] }
	var moved []string
	for _, k := range known {
		if strings.EqualFold(last(k), last(key)) {
			moved = append(moved, k)
		}
	}
	if len(moved) > 0 {
		return strings.Join(moved, " or ")
	}
	best := slices.MinFunc(known, func(a, b string) int { return cmp.Compare(edits(key, a), edits(key, b)) })
	if edits(key, best) > 1+len(last(key))/3 {
		return ""
	}
	return best
}

// edits returns the number of bytes to insert, delete or replace to make a of
// b.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
