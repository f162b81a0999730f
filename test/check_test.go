// SPDX-License-Identifier: MIT

package test

import (
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/wgroam/wgroam/internal/lab"
)

// TestCheck: check finds a pair of nodes ready, and says so when one of them is
// gone.
func TestCheck(t *testing.T) {
	l := newLab(t, lab.Config{})
	nodes := startMesh(t, l)
	a, h := nodes[0], nodes[1]

	type line struct{ Device, Check, State, Detail, Do string }
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
