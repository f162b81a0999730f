// SPDX-License-Identifier: MIT

package main

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/wgroam/wgroam/internal/demo"
)

func demoVerb(ctx context.Context, e env, args []string) error {
	fs, parse := flags(e, "demo")
	asJSON := fs.Bool("json", false, "print the summary as JSON, and the rest on standard error")
	if err := parse(args); err != nil {
		return err
	}
	if err := demo.Isolate(); err != nil {
		return err
	}
	story := e.stdout
	if *asJSON {
		story = e.stderr
	}
	summary, err := demo.Run(ctx, demo.NewScreen(story))
	if *asJSON {
		err = errors.Join(err, json.NewEncoder(e.stdout).Encode(summary))
	}
	return err
}
