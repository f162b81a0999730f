// SPDX-License-Identifier: MIT

package main

import (
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/config"
)

// TestCheckConfig: what a configuration names and is not there, or not free, is
// found, and what is there is fine.
func TestCheckConfig(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	taken, gone := listen().Addr().String(), listen()
	nobody := gone.Addr().String()
	gone.Close()

	check := func(cfg config.Config) map[string]int {
		t.Helper()
		got := make(map[string]int)
		for _, f := range checkConfig(t.Context(), cfg) {
			if f.Detail == "" || (f.Do == "") != (f.State == checkOK) {
				t.Errorf("%+v: every line says what it is, and those that are not ok what to do", f)
			}
			got[f.Check+" "+f.State]++
		}
		return got
	}
	same := func(what string, got, want map[string]int) {
		t.Helper()
		if !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	same("nothing is there", check(config.Config{
		Devices:  []config.Device{{Name: "nosuchwg0"}, {Name: "wg0", Netns: "wgroam-test-no-such"}},
		StateDir: filepath.Join(file, "state"), MetricsListen: taken,
		NATS:   config.NATS{Listen: taken, Peers: []string{nobody}, External: config.External{Creds: filepath.Join(dir, "none")}},
		Events: config.Events{Enabled: true, External: config.External{NKey: filepath.Join(dir, "none")}},
	}), map[string]int{
		"events warn": 1,
		"device fail": 2, "snapshot warn": 1, "metrics fail": 1,
		"feed fail": 2, // the address, and the file
		"feed warn": 1, // the other node
	})
	same("all is there", check(config.Config{
		StateDir: filepath.Join(dir, "not", "yet"), MetricsListen: nobody,
		NATS: config.NATS{Listen: "127.0.0.1:0", Peers: []string{taken}, External: config.External{Creds: file}},
	}), map[string]int{"snapshot ok": 1, "metrics ok": 1, "feed ok": 3})
	if _, err := os.Stat(filepath.Join(dir, "not")); err == nil {
		t.Error("it made the directory")
	}

	fifo := filepath.Join(dir, "fifo")
	for _, c := range []struct{ what, path, state string }{
		{"no directory", filepath.Join(dir, "not", "fifo"), checkWarn},
		{"a file", file, checkFail},
		{"none yet", fifo, checkOK},
	} {
		same(c.what, check(config.Config{StateDir: dir, KeepalivedFIFO: c.path}), map[string]int{"snapshot ok": 1, "keepalived " + c.state: 1})
	}
	if _, err := os.Stat(fifo); err == nil {
		t.Error("it made the FIFO")
	}
	for mode, state := range map[os.FileMode]string{0o622: checkFail, 0o600: checkOK} {
		if err := errors.Join(unix.Mkfifo(fifo, 0o600), os.Chmod(fifo, mode)); err != nil {
			t.Fatal(err)
		}
		same(mode.String(), check(config.Config{StateDir: dir, KeepalivedFIFO: fifo}), map[string]int{"snapshot ok": 1, "keepalived " + state: 1})
		if err := os.Remove(fifo); err != nil {
			t.Fatal(err)
		}
	}
}
