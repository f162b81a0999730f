// SPDX-License-Identifier: MIT

package control

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestDocumented: doc/json.md has a line for every field, and no other.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile("../../doc/json.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := strings.Split(string(text), "\n## ")
	for i, c := range []struct {
		name string
		doc  reflect.Type
	}{
		{"status", reflect.TypeFor[Status]()},
		{"peers", reflect.TypeFor[Peers]()},
		{"watch", reflect.TypeFor[struct {
			Event
			Promotion Promotion `json:"promotion"`
		}]()},
		{"check", reflect.TypeFor[Check]()},
		{"handover", reflect.TypeFor[HandoverStep]()},
	} {
		if len(sections) <= i+1 || !strings.HasPrefix(sections[i+1], c.name+"\n") {
			t.Fatalf("no section %q", c.name)
		}
		var got []string
		for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(sections[i+1], -1) {
			got = append(got, row[1])
		}
		want := fields("", c.doc)
		slices.Sort(got)
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-fields +documented):\n%s", c.name, diff)
		}
	}
}

// fields returns the paths of all values in the JSON of a type.
func fields(path string, t reflect.Type) (out []string) {
	switch {
	case t.Kind() == reflect.Pointer:
		return fields(path, t.Elem())
	case t.Kind() == reflect.Slice:
		return fields(path+"[]", t.Elem())
	case t.Kind() != reflect.Struct, t == reflect.TypeFor[time.Time](), t.PkgPath() == "net/netip":
		return []string{path}
	}
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous:
			out = append(out, fields(path, f.Type)...)
		default:
			out = append(out, fields(strings.TrimPrefix(path+"."+name, "."), f.Type)...)
		}
	}
	return out
}
