// SPDX-License-Identifier: MIT

package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/lab"
)

// stopTimeout is how long a daemon may take to end.
const stopTimeout = 10 * time.Second

// daemon is wgroam run on a gateway.
type daemon struct {
	gateway     *lab.Gateway
	socket, log string // paths
	detector    control.Detector
	seen        *sightings // what its watch said

	cmd      *exec.Cmd
	stopping chan struct{} // closed when it is to end
	ended    chan struct{} // closed when it has
	err      error         // of the process; read after ended
}

// daemonConfig is the configuration of the daemon on g. TOML reads Go's quotes.
func daemonConfig(g, other *lab.Gateway, role, dir, socket string) string {
	return fmt.Sprintf(`node = %q
[[device]]
name = %q
role = %q
vip = [%q, %q]
poll_interval = %q
[nats]
listen = "%v:4950"
peers = ["%v:4950"]
[state]
dir = %q
[control]
socket = %q
`, g.Name, g.Device(), role, lab.VIP4, lab.VIP6, poll, g.Addr4, other.Addr4, dir, socket)
}

func (s *show) startDaemon(g, other *lab.Gateway, role string) (*daemon, error) {
	d := &daemon{
		gateway: g,
		socket:  filepath.Join(s.dir, g.Name+".sock"),
		log:     filepath.Join(s.dir, g.Name+".log"),
		seen:    new(sightings),

		stopping: make(chan struct{}),
		ended:    make(chan struct{}),
	}
	state, config := filepath.Join(s.dir, g.Name), filepath.Join(s.dir, g.Name+".toml")
	err := os.Mkdir(state, 0o700)
	if err == nil {
		err = os.WriteFile(config, []byte(daemonConfig(g, other, role, state, d.socket)), 0o600)
	}
	if err != nil {
		return nil, fmt.Errorf("prepare the daemon on gateway %s: %w", g.Name, err)
	}
	log, err := os.Create(d.log)
	if err != nil {
		return nil, fmt.Errorf("prepare the daemon on gateway %s: %w", g.Name, err)
	}
	defer log.Close()
	d.cmd = exec.Command("/proc/self/exe", "run", "--config", config)
	d.cmd.Args[0] = "wgroam"
	d.cmd.Stdout, d.cmd.Stderr = log, log
	// A group of its own, so that a Ctrl-C is for the demo alone, which then ends
	// the daemons in order.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := g.Start(d.cmd); err != nil {
		return nil, fmt.Errorf("start the daemon on gateway %s: %w", g.Name, err)
	}
	s.wg.Go(func() {
		d.err = d.cmd.Wait()
		close(d.ended)
		select {
		case <-d.stopping:
		default:
			s.fail(fmt.Errorf("the daemon on gateway %s ended: %w", g.Name, errors.Join(d.err, errEnded)))
		}
	})
	return d, nil
}

var errEnded = errors.New("nobody had told it to")

// stop ends the daemon in order. It returns an error when that takes force.
func (d *daemon) stop() error {
	select {
	case <-d.ended:
		return nil // reported already
	default:
	}
	close(d.stopping)
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop the daemon on gateway %s: %w", d.gateway.Name, err)
	}
	select {
	case <-d.ended:
	case <-time.After(stopTimeout):
		_ = d.cmd.Process.Kill() // it may have ended just now
		<-d.ended
		return fmt.Errorf("the daemon on gateway %s did not end within %v of SIGTERM", d.gateway.Name, stopTimeout)
	}
	if d.err != nil {
		return fmt.Errorf("the daemon on gateway %s: %w", d.gateway.Name, d.err)
	}
	return nil
}

// ready waits until the daemon follows its device and has the other's records.
func (d *daemon) ready(ctx context.Context) error {
	return eventually(ctx, "the daemon on gateway "+d.gateway.Name+" is in touch with the other", func() (bool, error) {
		var status control.Status
		if err := control.Get(ctx, d.socket, control.VerbStatus, &status); err != nil {
			return false, err
		}
		if len(status.Devices) != 1 {
			return false, fmt.Errorf("it has %d devices, want 1", len(status.Devices))
		}
		device := status.Devices[0]
		d.detector = device.Detector
		nodes := device.Feed.Nodes
		return d.detector.Rung != control.RungNone && len(nodes) == 1 && nodes[0].State == control.NodeSynced, nil
	})
}

// hooked tells that the daemon has the kernel's time of every change, also of
// what it writes itself.
func (d *daemon) hooked() bool {
	return d.detector.Rung == control.RungFentry || d.detector.Rung == control.RungKprobe
}

// follow collects what the daemon's watch says, from the time when it returns
// until ctx ends.
func (s *show) follow(ctx context.Context, d *daemon) error {
	ready := make(chan struct{})
	s.wg.Go(func() {
		first := true
		err := control.Stream(ctx, d.socket, control.VerbWatch, func(line json.RawMessage) error {
			if first {
				// The daemon says that it is listening.
				first = false
				close(ready)
				return nil
			}
			var e control.Event
			if err := json.Unmarshal(line, &e); err != nil {
				return err
			}
			d.seen.add(e)
			return nil
		})
		s.fail(fmt.Errorf("watch gateway %s: %w", d.gateway.Name, err))
	})
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sightings are changes of endpoints on one gateway, in their order. The zero
// value has none.
type sightings struct {
	mu     sync.Mutex
	events []control.Event
	more   chan struct{} // closed by the next add; nil when nobody waits
}

func (s *sightings) add(e control.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
	if s.more != nil {
		close(s.more)
		s.more = nil
	}
}

func (s *sightings) len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.events)
}

// wait returns the first event that matches, not looking at the first from
// ones, or ctx.Err().
func (s *sightings) wait(ctx context.Context, from int, match func(control.Event) bool) (control.Event, error) {
	for {
		s.mu.Lock()
		for ; from < len(s.events); from++ {
			if match(s.events[from]) {
				defer s.mu.Unlock()
				return s.events[from], nil
			}
		}
		if s.more == nil {
			s.more = make(chan struct{})
		}
		more := s.more
		s.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return control.Event{}, ctx.Err()
		}
	}
}

// readEvery is how often readDevices looks.
const readEvery = time.Millisecond

// readDevices adds the changes of a peer's endpoint in the devices of two
// gateways, with the time when they were first read, until ctx ends. One reads
// both, so that the first is not seen after the second because the machine is
// busy. last is the endpoint before.
func readDevices(ctx context.Context, gateways [2]*lab.Gateway, peer wgroam.Key, last netip.AddrPort, to [2]*sightings) error {
	tick := time.NewTicker(readEvery)
	defer tick.Stop()
	held := [2]netip.AddrPort{last, last}
	for {
		for i, g := range gateways {
			ep, err := g.Endpoint(peer)
			if err != nil {
				return err
			}
			if ep != held[i] {
				to[i].add(control.Event{Time: time.Now(), Peer: peer, Old: held[i], New: ep})
				held[i] = ep
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
