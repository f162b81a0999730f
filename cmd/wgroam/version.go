// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime/debug"

	"github.com/wgroam/wgroam/bpf"
)

// version is the release that this tree leads to. commit is set by the linker.
const version = "0.1.0-dev"

var commit string

// buildCommit returns the commit this binary was built from, or "unknown".
func buildCommit() string {
	if commit != "" {
		return commit
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}

func versionVerb(_ context.Context, e env, args []string) error {
	fs, parse := flags(e, "version")
	asJSON := fs.Bool("json", false, "print JSON")
	if err := parse(args); err != nil {
		return err
	}
	if *asJSON {
		return json.NewEncoder(e.stdout).Encode(struct {
			Version string            `json:"version"`
			Commit  string            `json:"commit"`
			BPF     map[string]string `json:"bpf"`
		}{version, buildCommit(), bpf.ObjectHashes()})
	}
	fmt.Fprintf(e.stdout, "wgroam %s\ncommit %s\n", version, buildCommit())
	for name, hash := range bpf.ObjectHashes() {
		fmt.Fprintf(e.stdout, "bpf/%s sha256:%s\n", name, hash)
	}
	return nil
}
