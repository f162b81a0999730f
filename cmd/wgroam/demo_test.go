// SPDX-License-Identifier: MIT

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wgroam/wgroam/internal/demo"
)

// actAsWgroam makes the test binary wgroam. Its value marks the processes of
// one test, for they inherit it.
const actAsWgroam = "WGROAM_TEST_ACT_AS_WGROAM"

func TestMain(m *testing.M) {
	if os.Getenv(actAsWgroam) != "" {
		os.Exit(mainWithStatus(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// demoRun is a process of wgroam demo.
type demoRun struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
	mark           string
	temp           string // its directory for temporary files
}

func newDemo(t *testing.T, args ...string) *demoRun {
	t.Helper()
	switch {
	case os.Geteuid() == 0:
	case os.Getenv("CI") == "true":
		t.Fatal("the demo needs root")
	default:
		t.Skip("the demo needs root")
	}
	r := &demoRun{mark: actAsWgroam + "=" + t.Name(), temp: t.TempDir()}
	r.cmd = exec.CommandContext(t.Context(), "/proc/self/exe", append([]string{"demo"}, args...)...)
	r.cmd.Env = append(os.Environ(), r.mark, "TMPDIR="+r.temp)
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.stderr
	return r
}

// processes returns the directories in /proc of the demo and its children.
func (r *demoRun) processes(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var mine []string
	for _, dir := range all {
		env, err := os.ReadFile(dir + "/environ")
		if err == nil && bytes.Contains(append(env, 0), []byte(r.mark+"\x00")) {
			mine = append(mine, dir)
		}
	}
	return mine
}

// gone fails the test if the demo, which has ended, has left anything. What is
// in its mount namespace goes with its processes.
func (r *demoRun) gone(t *testing.T) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for left := r.processes(t); len(left) > 0; left = r.processes(t) {
		select {
		case <-deadline:
			t.Fatalf("processes are left: %v", left)
		case <-tick.C:
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte("wgroam-demo")) {
		t.Errorf("a mount is left:\n%s", mounts)
	}
	// Other tests may have labs of their own: names begin with the process id.
	ours := regexp.MustCompile(`^wgl` + strconv.FormatInt(int64(r.cmd.Process.Pid), 36) + `[0-9a-z]{2}-|^wgroam-demo`)
	for _, dir := range []string{"/run", "/run/netns", "/var/run/wireguard", "/sys/class/net", os.TempDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for _, e := range entries {
			if ours.MatchString(e.Name()) {
				t.Errorf("%s is left", filepath.Join(dir, e.Name()))
			}
		}
	}
}

func (r *demoRun) empty(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(r.temp)
	if err != nil || len(entries) > 0 {
		t.Errorf("%s: %v %v, want nothing", r.temp, entries, err)
	}
}

func TestDemo(t *testing.T) {
	r := newDemo(t, "--json")
	if err := r.cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, r.stderr.String())
	}
	r.gone(t)
	r.empty(t)

	var s demo.Summary
	dec := json.NewDecoder(&r.stdout)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		t.Fatal(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		t.Errorf("something follows the summary (%v)", err)
	}
	if !s.OK || s.Error != "" || s.Schema != demo.SummarySchema || s.Kernel == "" || s.WireGuard == "" || s.Detector.Rung == "" {
		t.Errorf("summary %+v", s)
	}
	if len(s.Roams) < 8 {
		t.Errorf("%d roams, want 8 or more", len(s.Roams))
	}
	kinds := map[string]bool{}
	for _, roam := range s.Roams {
		kinds[roam.What] = true
		if !roam.Arrived || roam.Cause == "" || roam.Old == roam.New || roam.LatencyUS < 0 {
			t.Errorf("roam %+v", roam)
		}
		if family := roam.Old.Addr().Is4() != roam.New.Addr().Is4(); family != (roam.What == "family") {
			t.Errorf("roam %+v", roam)
		}
	}
	if len(kinds) != 3 {
		t.Errorf("roams by %v, want port, address and family", kinds)
	}
	if l := s.Latency; l == nil || l.Method == "" || l.MinUS > l.MedianUS || l.MedianUS > l.MaxUS {
		t.Errorf("latency %+v", l)
	}
	f := s.Failover
	if f == nil {
		t.Fatal("no failover")
	}
	if f.Method == "" || len(f.With.Clients) != 3 || len(f.Without.Clients) != 3 {
		t.Fatalf("failover %+v", f)
	}
	if f.With.Known != 3 || f.Answered != 3 || f.Without.Known != 0 {
		t.Errorf("failover %+v", f)
	}
	for i, kind := range []string{"sends", "idle", "silent"} {
		with, without := f.With.Clients[i], f.Without.Clients[i]
		if with.Client != kind || without.Client != kind || !with.Back || with.OutageMS >= without.OutageMS {
			t.Errorf("with wgroam: %+v, without: %+v", with, without)
		}
		// Nothing makes a client that does not send look for another gateway.
		if without.Back != (kind == "sends") {
			t.Errorf("without: %+v", without)
		}
	}

	story := r.stderr.String()
	t.Log("\n" + story)
	if strings.ContainsRune(story, '\x1b') {
		t.Error("escape codes, and no terminal")
	}
	for _, want := range []string{"\n1. ", "\n2. ", "\n  with     idle ", "\n  without  silent ", "Summary"} {
		if !strings.Contains(story, want) {
			t.Errorf("the story has no %q:\n%s", want, story)
		}
	}
}

// begin starts the demo and waits for a line with such a beginning.
func (r *demoRun) begin(t *testing.T, line string) {
	t.Helper()
	r.cmd.Stdout = nil
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		fmt.Fprintln(&r.stdout, lines.Text())
		if strings.HasPrefix(lines.Text(), line) {
			return
		}
	}
	err = r.cmd.Wait()
	t.Fatalf("the demo ended: %v\n%s%s", err, r.stdout.String(), r.stderr.String())
}

// roamed begins a line of the demo when the client has roamed to another address.
const roamed = "  address "

func TestDemoSignals(t *testing.T) {
	for name, tt := range map[string]struct {
		sig       syscall.Signal
		line      string // when it is sent
		processes int
	}{
		"interrupt":             {syscall.SIGINT, roamed, 3},
		"terminated":            {syscall.SIGTERM, roamed, 3},
		"killed":                {syscall.SIGKILL, roamed, 3},
		"interrupt of failover": {syscall.SIGINT, "  without  sends   is back", 2},
	} {
		t.Run(strings.ReplaceAll(name, " ", "_"), func(t *testing.T) {
			sig := tt.sig
			r := newDemo(t)
			r.begin(t, tt.line)
			if n := len(r.processes(t)); n != tt.processes {
				t.Errorf("%d processes while it runs, want %d with the daemons", n, tt.processes)
			}
			start := time.Now()
			if err := r.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			err := r.cmd.Wait()
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v to end", took)
			}
			status := r.cmd.ProcessState.Sys().(syscall.WaitStatus)
			switch {
			case sig == syscall.SIGKILL:
				if status.Signal() != sig {
					t.Errorf("ended with %v", err)
				}
			case status.ExitStatus() != exitFailed || !strings.Contains(r.stderr.String(), "interrupted"):
				t.Errorf("ended with %v and said:\n%s", err, r.stderr.String())
			}
			r.gone(t)
			r.empty(t)
		})
	}
}

// A daemon that dies fails the demo, which keeps the logs.
func TestDemoDaemonDies(t *testing.T) {
	r := newDemo(t)
	r.begin(t, roamed)
	out := make(chan struct{}) // the rest of the output has been read below
	for _, dir := range r.processes(t) {
		cmdline, err := os.ReadFile(dir + "/cmdline")
		if err != nil || !bytes.Contains(cmdline, []byte("/a.toml")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		close(out)
	}
	select {
	case <-out:
	default:
		t.Fatal("no daemon on gateway a")
	}
	if err := r.cmd.Wait(); r.cmd.ProcessState.ExitCode() != exitFailed {
		t.Errorf("ended with %v", err)
	}
	said := r.stderr.String()
	if !strings.Contains(said, "gateway a ended by itself: signal: killed") || !strings.Contains(said, r.temp) {
		t.Errorf("said:\n%s", said)
	}
	for _, name := range []string{"a.log", "h.log"} {
		logs, err := filepath.Glob(filepath.Join(r.temp, "*", name))
		if err != nil || len(logs) != 1 {
			t.Errorf("%s: %v %v", name, logs, err)
		}
	}
	r.gone(t)
}

func TestDemoNeedsRoot(t *testing.T) {
	r := newDemo(t)
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	err := r.cmd.Run()
	if code := r.cmd.ProcessState.ExitCode(); code != exitFailed {
		t.Errorf("exit status %d (%v), want %d", code, err, exitFailed)
	}
	if !strings.Contains(r.stderr.String(), "run it as root") || r.stdout.Len() > 0 {
		t.Errorf("said:\n%s%s", r.stdout.String(), r.stderr.String())
	}
}
