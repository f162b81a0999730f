// SPDX-License-Identifier: MIT

package test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/lab"
)

// line is one of what check --json prints.
type line struct{ Device, Check, State, Detail, Do string }

// TestCheck: check finds a pair of nodes ready, and says so when one of them is
// gone.
func TestCheck(t *testing.T) {
	l := newLab(t, lab.Config{})
	nodes := startMesh(t, l)
	a, h := nodes[0], nodes[1]

	check := func() (status int, ready bool, lines []line) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), binary(t), "check", "--json", "--socket", a.socket).Output()
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			status = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		var report struct {
			Ready  bool
			Checks []line
		}
		if err := json.Unmarshal(out, &report); err != nil {
			t.Fatalf("check printed %q: %v", out, err)
		}
		return status, report.Ready, report.Checks
	}

	status, ready, lines := check()
	if status != 0 || !ready {
		t.Errorf("exit status %d, ready %v: %+v", status, ready, lines)
	}
	rung := a.status().Detector.Rung
	found := false
	for _, f := range lines {
		found = found || f.Check == "detector" && f.Device == a.gw.Device() && strings.HasPrefix(f.Detail, rung)
	}
	if !found {
		t.Errorf("no line for the detector, which is %s: %+v", rung, lines)
	}

	h.stop()
	await(t, "check notices that the other node is gone", func() (bool, string) {
		status, ready, lines = check()
		return status == 1 && !ready, ""
	})
	for _, f := range lines {
		if f.State != "ok" && f.Do == "" {
			t.Errorf("%+v does not say what to do", f)
		}
	}
}

// TestCheckAlone: without a daemon, check says what this host lets wgroam do, by
// the capabilities that it has, and whether what the configuration names is there.
func TestCheckAlone(t *testing.T) {
	l := newLab(t, lab.Config{Gateways: []string{"a"}})
	a := l.Gateways[0]
	// Not t.TempDir, which nobody else may enter.
	dir, err := os.MkdirTemp("", "wgroam-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "wgroam.toml")
	if err := errors.Join(os.WriteFile(file, []byte(config(a, dir)), 0o644), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		caps []int
		// What is not ok, among what depends on capabilities.
		missing, hook, port string
	}{
		{nil, "CAP_NET_ADMIN CAP_SYS_ADMIN CAP_BPF CAP_PERFMON", "warn", "warn"},
		{[]int{unix.CAP_NET_ADMIN}, "CAP_SYS_ADMIN CAP_BPF CAP_PERFMON", "warn", "warn"},
		{forPort, "CAP_SYS_ADMIN", "warn", "ok"},
		{forAll, "", "ok", "ok"},
	} {
		p := confined(t, a, confinement{UID: nobody, Caps: c.caps}, "check", "--json", "--config", file)
		<-p.exited
		var report struct {
			Ready  bool
			Checks []line
		}
		if err := json.Unmarshal([]byte(p.stdout.String()), &report); err != nil {
			t.Fatalf("check printed %q: %v\n%s", &p.stdout, err, &p.stderr)
		}
		if report.Ready || p.cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("%v: ready without a daemon, exit status %d", capNames(capSet(c.caps...)), p.cmd.ProcessState.ExitCode())
		}
		var missing []string
		states := make(map[string]string)
		for _, f := range report.Checks {
			if f.Detail == "" || (f.Do == "") != (f.State == "ok") {
				t.Errorf("%+v: every line says what it is, and those that are not ok what to do", f)
			}
			if f.Check == "privilege" && f.State != "ok" {
				name, _, _ := strings.Cut(strings.TrimPrefix(f.Detail, "no "), ",")
				missing = append(missing, name)
			}
			states[f.Check] = f.State
		}
		hook := c.hook
		if !l.Kernel {
			hook = "warn"
		}
		if got := strings.Join(missing, " "); got != c.missing || states["hook"] != hook || states["port"] != c.port || states["btf"] != "ok" {
			t.Errorf("with %v: missing %q, %v", capNames(capSet(c.caps...)), got, states)
		}
		// The socket of one in user space is root's.
		if want := l.Kernel && len(c.caps) > 0; (states["device"] == "ok") != want || states["config"] != "ok" || states["daemon"] != "fail" {
			t.Errorf("with %v: %v, want the device %v", capNames(capSet(c.caps...)), states, want)
		}
	}
}
