// SPDX-License-Identifier: MIT

// Command wgroam keeps the WireGuard gateways of a group informed of where their
// peers are. See the README.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"
)

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// env is what a verb gets from the world.
type env struct {
	stdout, stderr io.Writer
	log            *slog.Logger
}

// A verb that is a noun reads; the others act.
type verb struct {
	name, args, does string
	run              func(ctx context.Context, e env, args []string) error
}

func verbs() []verb {
	return []verb{
		{"run", "--config FILE | --device NAME", "the daemon", runVerb},
		{"watch", "[--device NAME] [--json [--promotions]]", "print endpoint changes as they happen", watchVerb},
		{"status", "[--json]", "this node, its group and the feed", statusVerb},
		{"peers", "[--json]", "every peer with its endpoint", peersVerb},
		{"role", "[active|standby|auto] [--device NAME] [--json]", "show or set the role", roleVerb},
		{"handover", "[--to NODE] [--device NAME] [--json]", "have another node take over, or take over", handoverVerb},
		{"shut", "--config FILE", "at boot, before the network: keep devices quiet until the daemon knows their roles", shutVerb},
		{"release", "--config FILE | --device NAME", "give the devices back, as they are without failover; the daemon has to be stopped", releaseVerb},
		{"check", "[--json] [--config FILE] [--feed] [--elect] [--device NAME]", "every prerequisite, and what to do about those that are not met", checkVerb},
		{"demo", "[--json]", "the whole story on this machine, in network namespaces", demoVerb},
		{"version", "[--json]", "version, commit and hashes of the BPF objects", versionVerb},
	}
}

// errUsage ends a verb whose arguments were wrong; the verb has said so.
var errUsage = errors.New("usage")

func main() {
	os.Exit(mainWithStatus(os.Args[1:], os.Stdout, os.Stderr))
}

func mainWithStatus(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// A second signal ends the process at once.
	context.AfterFunc(ctx, stop)

	if len(args) == 0 {
		usage(stderr)
		return exitUsage
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		usage(stdout)
		return exitOK
	}
	e := env{
		stdout: stdout,
		stderr: stderr,
		log:    slog.New(slog.NewTextHandler(stderr, nil)),
	}
	for _, v := range verbs() {
		if v.name != args[0] {
			continue
		}
		switch err := bounded(ctx, func() error { return v.run(ctx, e, args[1:]) }); {
		case err == nil, errors.Is(err, flag.ErrHelp):
			return exitOK
		case errors.Is(err, errUsage):
			return exitUsage
		default:
			fmt.Fprintf(stderr, "wgroam %s: %v\n", v.name, err)
			return exitFailed
		}
	}
	fmt.Fprintf(stderr, "wgroam: unknown verb %q\n\n", args[0])
	usage(stderr)
	return exitUsage
}

// grace is how long a verb may take to end after a signal.
const grace = 5 * time.Second

// bounded runs f, and gives up waiting for it some time after ctx has ended: a
// WireGuard implementation that does not answer must not keep us alive. The
// kernel cleans up after a process.
func bounded(ctx context.Context, f func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(grace):
		return fmt.Errorf("something still hangs %v after the signal: leaving it", grace)
	}
}

func usage(w io.Writer) {
	fmt.Fprintln(w, "usage: wgroam VERB [flags]")
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, v := range verbs() {
		fmt.Fprintf(tw, "  %s %s\t%s\n", v.name, v.args, v.does)
	}
	tw.Flush()
	fmt.Fprintln(w, "\nData goes to standard output, talk to standard error.")
	fmt.Fprintln(w, "Exit status: 0 fine, 1 failed or not ready, 2 wrong usage.")
}

// flags returns a flag set that prints to the right place, and a parse function
// that refuses leftover arguments.
func flags(e env, name string) (*flag.FlagSet, func([]string) error) {
	fs := flag.NewFlagSet("wgroam "+name, flag.ContinueOnError)
	fs.SetOutput(e.stderr)
	return fs, func(args []string) error {
		err := fs.Parse(args)
		switch {
		case errors.Is(err, flag.ErrHelp):
			return err
		case err != nil:
			return errUsage // the flag set has said why
		case fs.NArg() > 0:
			fmt.Fprintf(e.stderr, "wgroam %s: unexpected argument %q\n", name, fs.Arg(0))
			fs.Usage()
			return errUsage
		}
		return nil
	}
}
