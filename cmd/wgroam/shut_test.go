// SPDX-License-Identifier: MIT

package main

import (
	"testing"

	"github.com/wgroam/wgroam/internal/config"
)

// TestShutWithoutNamespace: before the namespace is made there is nothing to keep quiet, and nothing wrong.
func TestShutWithoutNamespace(t *testing.T) {
	for _, netns := range []string{"wgroam-test-no-such", "/run/netns/wgroam-test-no-such"} {
		ports, err := shutAtBoot(config.Config{StateDir: t.TempDir()}, config.Device{Name: "wg0", Netns: netns, Role: config.RoleAuto})
		if ports != nil || err != nil {
			t.Errorf("%s: %v, %v", netns, ports, err)
		}
	}
}
