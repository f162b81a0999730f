// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wgroam/wgroam/failover"
	"github.com/wgroam/wgroam/internal/config"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/wg"
)

// releaseVerb makes the devices of a configuration what they would be without
// failover.
func releaseVerb(ctx context.Context, e env, args []string) error {
	cfg, err := loadConfig(e, "release", args, config.LoadWithoutSecrets)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var status control.Status
	if err := control.Get(ctx, cfg.ControlSocket, control.VerbStatus, &status); !errors.Is(err, control.ErrNoDaemon) {
		return fmt.Errorf("a daemon has %s open, and would take the devices again: stop it first", cfg.ControlSocket)
	}
	var errs []error
	for _, dc := range cfg.Devices {
		name := where(dc.Name, dc.Netns)
		if err := release(e, cfg, dc); err != nil {
			errs = append(errs, fmt.Errorf("device %s: %w", name, err))
			continue
		}
		fmt.Fprintf(e.stdout, "%s is as without wgroam\n", name)
	}
	return errors.Join(errs...)
}

func release(e env, cfg config.Config, dc config.Device) error {
	memory, err := failover.OpenMemory(cfg.StateDir, where(dc.Name, dc.Netns))
	if err != nil {
		return err
	}
	space, err := openSpace(dc.Netns)
	if err != nil {
		return err
	}
	defer space.Close()
	client, err := space.Open()
	if err != nil {
		return err
	}
	defer client.Close()
	// Without a link there is only the gate.
	link, err := linkByName(space, dc.Name)
	if err != nil && !errors.Is(err, wg.ErrNoDevice) {
		return err
	}
	return failover.NewKeeper(failover.KeeperConfig{
		Device: client, Name: dc.Name, Ifindex: link.Ifindex, Space: space, Memory: memory, Log: e.log,
	}).Release()
}
