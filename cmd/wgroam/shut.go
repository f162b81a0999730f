// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/wg"
)

// shutVerb shuts the ports that the devices of a configuration had before the host was
// started. It is for a time at which nobody has made them yet: who does may set them up
// before the daemon runs.
func shutVerb(_ context.Context, e env, args []string) error {
	cfg, err := loadConfig(e, "shut", args, config.LoadWithoutSecrets)
	if err != nil {
		return err
	}
	var errs []error
	for _, dc := range cfg.Devices {
		ports, err := shutAtBoot(cfg, dc)
		switch name := where(dc.Name, dc.Netns); {
		case err != nil:
			errs = append(errs, fmt.Errorf("device %s: %w", name, err))
		case len(ports) > 0:
			fmt.Fprintf(e.stdout, "%s is quiet until wgroam runs\n", name)
		}
	}
	return errors.Join(errs...)
}

func shutAtBoot(cfg config.Config, dc config.Device) (ports []int, err error) {
	if dc.Role == config.RoleAlways || dc.Role == config.RoleActive {
		return nil, nil
	}
	memory, err := failover.OpenMemory(cfg.StateDir, where(dc.Name, dc.Netns))
	if err != nil {
		return nil, err
	}
	space, err := openSpace(dc.Netns)
	if errors.Is(err, wg.ErrNoSpace) && !errors.Is(err, fs.ErrPermission) {
		return nil, nil // nor is the device there
	}
	if err != nil {
		return nil, err
	}
	defer space.Close()
	return failover.ShutAtBoot(space, dc.Name, memory)
}
