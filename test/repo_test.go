// SPDX-License-Identifier: MIT

//go:build !vm

// Package test holds the end-to-end tests, which run in network namespaces of this machine and on the kernels of test/vm,
// and the rules of this repository. The latter need its files and git, so the virtual machine goes without them.
package test

import (
	"bytes"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// tracked returns the files that git knows or would add, relative to the root of the repository.
func tracked(t *testing.T) []string {
	t.Helper()
	out := command(t, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")
	var files []string
	for name := range strings.SplitSeq(strings.TrimSuffix(out, "\x00"), "\x00") {
		// A file deleted but not yet committed is still in the index.
		if _, err := os.Stat(filepath.Join("..", name)); err == nil {
			files = append(files, name)
		}
	}
	if len(files) == 0 {
		t.Fatal("git ls-files names no files")
	}
	return files
}

// command runs a program in the root of the repository and returns what it printed.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = ".."
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Every source says its licence in its first lines; the BPF programs are dual-licensed, for the kernel's helpers ask for
// the GPL.
func TestLicence(t *testing.T) {
	header := regexp.MustCompile(`(?m)^(//|#|/\*) SPDX-License-Identifier: (.*?)( \*/)?$`)
	for _, name := range tracked(t) {
		text := read(t, name)
		want := "MIT"
		switch path.Ext(name) {
		case ".c", ".h":
			want = "(MIT OR GPL-2.0-only)"
		case ".go", ".sh", ".toml", ".yml", ".yaml", ".service":
		default:
			if path.Base(name) != "Makefile" && !strings.HasPrefix(text, "#!") {
				continue
			}
		}
		if strings.HasPrefix(text, "// Code generated ") {
			continue
		}
		// Room for a line such as #! or //go:build above it.
		lines := strings.SplitN(text, "\n", 5)
		found := header.FindStringSubmatch(strings.Join(lines[:min(len(lines), 4)], "\n"))
		if found == nil {
			t.Errorf("%s has no SPDX-License-Identifier in its first lines", name)
		} else if found[2] != want {
			t.Errorf("%s is under %s, want %s", name, found[2], want)
		}
	}
}

// Each package says what it is, once.
func TestPackageDocs(t *testing.T) {
	docs := map[string][]string{}
	for _, name := range tracked(t) {
		if path.Ext(name) != ".go" {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, read(t, name), parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		dir := path.Dir(name)
		if file.Doc != nil {
			docs[dir] = append(docs[dir], name)
		} else if _, ok := docs[dir]; !ok {
			docs[dir] = nil
		}
	}
	for dir, names := range docs {
		if len(names) != 1 {
			t.Errorf("package %s is documented in %d files %q, want one", dir, len(names), names)
		}
	}
}

// A replace directive does not hold for those who depend on this module, and go install refuses it.
func TestModule(t *testing.T) {
	if strings.Contains(command(t, "go", "mod", "edit", "-json"), `"Replace": [`) {
		t.Error("go.mod has a replace directive")
	}
	command(t, "go", "mod", "tidy", "-diff")
}

// The systemd unit is one, and gives the capabilities that TestUnit runs the daemon with; the README names them.
func TestUnitFile(t *testing.T) {
	text := read(t, "contrib/systemd/wgroam.service")
	want := strings.Join(capNames(capSet(forAll...)), " ")
	for _, key := range []string{"AmbientCapabilities", "CapabilityBoundingSet"} {
		found := regexp.MustCompile(`(?m)^`+key+`=(.*)$`).FindAllStringSubmatch(text, -1)
		if len(found) != 1 {
			t.Errorf("%s is there %d times, want once", key, len(found))
			continue
		}
		if got := capsOf(found[0][1]); got != capsOf(want) {
			t.Errorf("%s is %q, want %q", key, found[0][1], want)
		}
	}
	readme := read(t, "README.md")
	for what, caps := range map[string][]int{
		"reading and writing kernel WireGuard": forPolling,
		"the kernel hook":                      forFentry,
		"the program at the UDP port":          forPort,
		"a device with `netns`":                forNetns,
		"WireGuard in user space":              forSockets,
	} {
		row := regexp.MustCompile(`(?m)^ *\| ` + regexp.QuoteMeta(what) + `[^|]*\|([^|]*)\|`).FindStringSubmatch(readme)
		if row == nil || capsOf(strings.NewReplacer("`", "", ",", "").Replace(row[1])) != capsOf(strings.Join(capNames(capSet(caps...)), " ")) {
			t.Errorf("README.md says %q for %s, want %q", row, what, capNames(capSet(caps...)))
		}
	}

	// The command has to be there.
	dir := t.TempDir()
	for _, name := range []string{"wgroam.service", "wgroam-shut.service"} {
		unit := filepath.Join(dir, name)
		text := strings.Replace(read(t, "contrib/systemd/"+name), "/usr/local/sbin/wgroam", binary(t), 1)
		if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("systemd-analyze", "verify", unit).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("systemd-analyze %s: %v: %s", name, err, out)
		}
	}
}

// capsOf brings the names of capabilities into one order.
func capsOf(names string) string {
	list := strings.Fields(names)
	slices.Sort(list)
	return strings.Join(list, " ")
}

// A link from one document to another file leads there.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]+)`)
	for _, name := range tracked(t) {
		if path.Ext(name) != ".md" {
			continue
		}
		for _, found := range link.FindAllStringSubmatch(read(t, name), -1) {
			if strings.Contains(found[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join("..", path.Dir(name), found[1])); err != nil {
				t.Errorf("%s links to %s: %v", name, found[1], err)
			}
		}
	}
}

// Alerts and dashboard are about metrics that there are.
func TestContribMetrics(t *testing.T) {
	known := documented(t)
	for _, name := range []string{"contrib/prometheus/wgroam.rules.yml", "contrib/grafana/wgroam.json"} {
		used := regexp.MustCompile(`wgroam_[a-z_]+`).FindAllString(read(t, name), -1)
		if len(used) < 10 {
			t.Errorf("%s has the metrics %q only", name, used)
		}
		for _, metric := range used {
			base, isBucket := strings.CutSuffix(metric, "_bucket")
			kind, ok := known[base]
			if !ok || isBucket != strings.HasPrefix(kind, "histogram") {
				t.Errorf("%s is about %s, which there is not", name, metric)
			}
		}
	}
}

// What is committed reads the same everywhere.
func TestText(t *testing.T) {
	for _, name := range tracked(t) {
		text := read(t, name)
		if strings.Contains(text, "\x00") {
			continue // an object file or a picture
		}
		if strings.Contains(text, "\r") {
			t.Errorf("%s has carriage returns", name)
		}
		if text != "" && !strings.HasSuffix(text, "\n") {
			t.Errorf("%s does not end with a line feed", name)
		}
		for i, line := range strings.Split(text, "\n") {
			if strings.HasPrefix(line, "<<<<<<< ") || strings.HasPrefix(line, ">>>>>>> ") {
				t.Errorf("%s:%d: a merge conflict", name, i+1)
			}
		}
	}
}
