// SPDX-License-Identifier: MIT

package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"

	"golang.org/x/sys/unix"
)

// ErrNoDaemon is what Get and Watch wrap when nobody listens on the socket.
var ErrNoDaemon = errors.New("no daemon answers")

// Get asks the daemon on the socket at path and decodes the one document of
// its answer into out: *Status for VerbStatus, *Peers for VerbPeers, or a
// *json.RawMessage for the bytes as they are. Fields that out does not have are
// skipped.
//
// The error wraps ErrNoDaemon when there is none, fs.ErrPermission when the
// caller may not ask, and ctx.Err() when ctx is done.
func Get(ctx context.Context, path, verb string, out any) error {
	return get(ctx, path, request{Verb: verb}, out)
}

// Elect is Get for VerbStatus, by keepalived's script, for a device, or for all if that is empty.
func Elect(ctx context.Context, path, device string, out any) error {
	return get(ctx, path, request{Verb: VerbElect, Device: device}, out)
}

// SetRole gives the verb's word on the role of a device, or of all that listen to it
// if the device is empty: active, standby, or auto to take it back. It decodes the
// *Status after that into out. Errors are as of Get.
func SetRole(ctx context.Context, path, device, role string, out any) error {
	return get(ctx, path, request{Verb: VerbRole, Device: device, Role: role}, out)
}

// Handover hands the role of a device over to a node, each empty where there is only
// one, and calls each with every step of it, which is a HandoverStep. The last one is
// HandoverDone or HandoverFailed. Errors are as of Watch, but for the end.
func Handover(ctx context.Context, path, device, to string, each func(json.RawMessage) error) error {
	return ask(ctx, path, request{Verb: VerbHandover, Device: device, To: to}, func(r *bufio.Reader) error {
		for {
			line, err := r.ReadBytes('\n')
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := refusal(line); err != nil {
				return err
			}
			if err := each(bytes.TrimSpace(line)); err != nil {
				return err
			}
		}
	})
}

func get(ctx context.Context, path string, req request, out any) error {
	return ask(ctx, path, req, func(r *bufio.Reader) error {
		raw, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		if len(raw) == 0 {
			return io.EOF
		}
		if err := refusal(raw); err != nil {
			return err
		}
		return json.Unmarshal(raw, out)
	})
}

// Watch asks the daemon on the socket at path for events, and promotions, if they are
// wanted, and calls each with every line of its answer: an Event, a Progress or a
// Missed. The bytes are each's to keep. Watch returns the error that each returned, unwrapped, or one that
// wraps io.EOF when the daemon has ended, or one as of Get; never nil.
func Watch(ctx context.Context, path string, promotions bool, each func(json.RawMessage) error) error {
	var stopped error
	err := ask(ctx, path, request{Verb: VerbWatch, Promotions: promotions}, func(r *bufio.Reader) error {
		for {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return err // A line cut off is no line.
			}
			line = bytes.TrimSpace(line)
			if err := refusal(line); err != nil {
				return err
			}
			if stopped = each(line); stopped != nil {
				return stopped
			}
		}
	})
	if stopped != nil {
		return stopped
	}
	return err
}

// refusal returns the error that an answer consists of, if it does.
func refusal(answer []byte) error {
	if !bytes.HasPrefix(answer, []byte(`{"error":`)) {
		return nil
	}
	var f failure
	if err := json.Unmarshal(answer, &f); err != nil {
		return err
	}
	return errors.New(f.Error)
}

func ask(ctx context.Context, path string, req request, read func(*bufio.Reader) error) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return fmt.Errorf("%w on %s: start one with wgroam run, or pass --socket", ErrNoDaemon, path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w: run as root", path, fs.ErrPermission)
	default:
		return fmt.Errorf("control socket %s: %w", path, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()

	err = encode(c, req)
	if err == nil {
		err = read(bufio.NewReader(c))
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("the daemon on %s does not answer, see its log: %w", path, ctx.Err())
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, io.EOF), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return fmt.Errorf("the daemon on %s has ended: %w", path, io.EOF)
	default:
		return fmt.Errorf("the daemon on %s, verb %s: %w", path, req.Verb, err)
	}
}
