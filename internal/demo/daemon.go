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
func daemonConfig(g, other *lab.Gateway, dir, socket string) string {
	return fmt.Sprintf(`node = %q
[[device]]
name = %q
role = "auto"
vip = [%q, %q]
poll_interval = %q
[nats]
listen = "%v:4950"
peers = ["%v:4950"]
[state]
dir = %q
[control]
socket = %q
`, g.Name, g.Device(), lab.VIP4, lab.VIP6, poll, g.Addr4, other.Addr4, dir, socket)
}

func (s *show) startDaemon(g, other *lab.Gateway) (*daemon, error) {
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
		err = os.WriteFile(config, []byte(daemonConfig(g, other, state, d.socket)), 0o600)
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
		select {
		case <-d.stopping:
		default:
			s.fail(fmt.Errorf("the daemon on gateway %s ended by itself: %v", g.Name, d.cmd.ProcessState))
		}
		close(d.ended)
	})
	return d, nil
}

// stop ends the daemon in order. It returns an error when that takes force.
func (d *daemon) stop() error {
	select {
	case <-d.ended:
		return nil // reported already
	case <-d.stopping: // killed
		<-d.ended
		return nil
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

// kill ends the daemon as a crash would.
func (d *daemon) kill() error {
	close(d.stopping)
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill the daemon on gateway %s: %w", d.gateway.Name, err)
	}
	return nil
}

// device returns what the daemon says of its device.
func (d *daemon) device(ctx context.Context) (control.DeviceStatus, error) {
	var status control.Status
	if err := control.Get(ctx, d.socket, control.VerbStatus, &status); err != nil {
		return control.DeviceStatus{}, err
	}
	if len(status.Devices) != 1 {
		return control.DeviceStatus{}, fmt.Errorf("it has %d devices, want 1", len(status.Devices))
	}
	return status.Devices[0], nil
}

// ready waits until the daemon follows its device, has made it what the role asks
// for, and has the other's records.
func (d *daemon) ready(ctx context.Context) error {
	return eventually(ctx, "the daemon on gateway "+d.gateway.Name+" is in touch with the other", func() (bool, error) {
		device, err := d.device(ctx)
		if err != nil {
			return false, err
		}
		d.detector = device.Detector
		nodes, state := device.Feed.Nodes, device.Failover.State
		return d.detector.Rung != control.RungNone && len(nodes) == 1 && nodes[0].State == control.NodeSynced &&
			(state == "open" || state == "quiet"), nil
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
		err := control.Watch(ctx, d.socket, false, func(line json.RawMessage) error {
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
		select {
		case <-ctx.Done():
		case <-d.stopping:
		case <-d.ended: // that is the reason
		case <-time.After(stopTimeout):
			s.fail(fmt.Errorf("watch gateway %s: %w", d.gateway.Name, err))
		}
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
		e, more := s.find(&from, match)
		if more == nil {
			return e, nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return control.Event{}, ctx.Err()
		}
	}
}

// find looks at the events from the given one on, and moves that. Without a
// match it returns a channel that is closed when there are more.
func (s *sightings) find(from *int, match func(control.Event) bool) (control.Event, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; *from < len(s.events); *from++ {
		if match(s.events[*from]) {
			return s.events[*from], nil
		}
	}
	if s.more == nil {
		s.more = make(chan struct{})
	}
	return control.Event{}, s.more
}

// readEvery is how often readDevices looks.
const readEvery = time.Millisecond

// readDevices adds the changes of a peer's endpoint in the devices of the active
// and the standby, until ctx ends. last is the endpoint before. The time of a
// change is that of the round in which it was first read. A round reads the
// standby first, so that what the standby has is never new on the active later.
func readDevices(ctx context.Context, active, standby *lab.Gateway, peer wgroam.Key, last netip.AddrPort, onActive, onStandby *sightings) error {
	tick := time.NewTicker(readEvery)
	defer tick.Stop()
	devices := []struct {
		gateway *lab.Gateway
		held    netip.AddrPort
		to      *sightings
	}{{standby, last, onStandby}, {active, last, onActive}}
	for {
		now := time.Now()
		for i := range devices {
			d := &devices[i]
			ep, err := d.gateway.Endpoint(peer)
			if err != nil {
				return err
			}
			if ep != d.held {
				d.to.add(control.Event{Time: now, Peer: peer, Old: d.held, New: ep})
				d.held = ep
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
