// SPDX-License-Identifier: MIT

package failover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/snapshot"
)

// Memory is the file in which a device's failover keeps what must outlive the
// daemon. It counts for one boot of the host: what was said before is not known to
// be true any more, and what was taken from the device is gone.
//
// So only the ports, which count for the next boot, are waited for until the disk has
// them; the rest gets there later. A promotion has no time for a disk.
//
// A Memory is safe for concurrent use.
type Memory struct {
	path   string
	boot   string
	former bool // the file is of an earlier boot

	writing sync.Mutex // held while the file is written; before mu

	mu       sync.Mutex // not held while a disk may be waited for
	data     memory
	changes  int  // of data
	written  int  // how many of them are in the file
	unsynced bool // the disk may not have the file yet
	syncing  bool // it is getting it
}

// memory is the contents of the file.
type memory struct {
	Boot  string `json:"boot"` // as /proc/sys/kernel/random/boot_id
	Words words  `json:"words"`
	// Offered is the node that this one is handing its role over to, until it is
	// known what became of that.
	Offered string `json:"offered,omitempty"`
	// Gate: there may be a gate of ours.
	Gate bool `json:"gate,omitempty"`
	// Ports are those that a standby's device has had lately, the present one first.
	// They count for the next boot as well.
	Ports []int `json:"ports,omitempty"`
	// Taken is what was taken from the device to keep it quiet; nil if nothing was.
	Taken *taken `json:"taken,omitempty"`
}

// iface is one life of an interface.
type iface struct {
	Ifindex int `json:"ifindex"`
	// Netns is the cookie of its network namespace, which no other namespace has before
	// the host restarts, where an inode's number is used again; 0 where the kernel gives
	// none (before Linux 5.14).
	Netns uint64 `json:"netns,omitempty"`
}

// is reports whether two may be the same.
func (i iface) is(o iface) bool {
	return i.Ifindex == o.Ifindex && (i.Netns == o.Netns || i.Netns == 0 || o.Netns == 0)
}

// taken is what a device is to get back.
type taken struct {
	iface
	Keepalives map[wgroam.Key]time.Duration `json:"keepalives,omitempty"` // those that were on
	settings
	// Reset: the sessions are gone since it became a standby.
	Reset bool `json:"reset,omitempty"`
	// Promoted is when it began to get it back; zero while it is a standby.
	Promoted time.Time `json:"promoted,omitzero"`
	// Down: the link was down before anything was taken, so that what it had is not
	// known.
	Down bool `json:"down,omitempty"`
	// Called: the peers have been called, and only something else is not back.
	Called bool `json:"called,omitempty"`
}

var errBoot = errors.New("this boot of the host cannot be identified: let wgroam read /proc/sys/kernel/random/boot_id")

// OpenMemory reads the memory of a device, named as in the status, in the state
// directory. A file that cannot be used is left under another name, for an
// operator to look at; then the error says so, and the Memory is empty. It is
// empty, and nothing is written, where this boot of the host cannot be told from
// others.
func OpenMemory(dir, device string) (*Memory, error) {
	m := &Memory{path: filepath.Join(dir, "failover-"+url.PathEscape(device)+".json")}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return m, fmt.Errorf("%w: %w", errBoot, err)
	}
	m.boot = strings.TrimSpace(string(boot))
	m.data.Boot = m.boot
	data, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	var read memory
	if err == nil {
		err = json.Unmarshal(data, &read)
	}
	if err != nil {
		return m, fmt.Errorf("read %s: %w", m.path, errors.Join(err, os.Rename(m.path, m.path+".refused")))
	}
	if m.data.Ports, m.former = read.Ports, read.Boot != m.boot; !m.former {
		m.data = read
	}
	return m, nil
}

// words returns what the verb and keepalived said last.
func (m *Memory) words() (verb, vrrp Role) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.data.Words.Verb, m.data.Words.VRRP
}

// note notes what the verb and keepalived said, until it is written.
func (m *Memory) note(verb, vrrp Role) {
	m.change(func(d *memory) { d.Words.Verb, d.Words.VRRP = verb, vrrp })
}

// Offered returns the node that the role is being handed over to, by the verb; empty
// if it is not.
func (m *Memory) Offered() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.data.Offered
}

// Offer remembers the node that the role is being handed over to; empty for none.
func (m *Memory) Offer(node string) error {
	if m.Offered() == node {
		return nil
	}
	m.change(func(d *memory) { d.Offered = node })
	return m.write()
}

// taken returns what was taken from an interface; nil if nothing was, or it was
// another interface, which is gone with all that it had.
func (m *Memory) taken(of iface) *taken {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.data.Taken == nil || !m.data.Taken.is(of) {
		return nil
	}
	t := *m.data.Taken
	t.Keepalives = maps.Clone(t.Keepalives)
	return &t
}

// keepTaken keeps a copy of what was taken; nil if all is given back. After an error
// it is kept for as long as the daemon lives, and flush tries to write it.
func (m *Memory) keepTaken(t *taken) error {
	if t != nil {
		// It is written with the next word as well, while the keeper goes on with t.
		c := *t
		c.Keepalives = maps.Clone(t.Keepalives)
		t = &c
	}
	m.change(func(d *memory) { d.Taken = t })
	return m.write()
}

// gate tells whether there may be a gate of ours.
func (m *Memory) gate() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.data.Gate
}

// noGate keeps that there is no gate any more.
func (m *Memory) noGate() error {
	if m.has(func(d *memory) bool { return !d.Gate }) {
		return nil
	}
	m.change(func(d *memory) { d.Gate = false })
	return m.write()
}

// ports returns the ports to shut.
func (m *Memory) ports() []int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.data.Ports
}

// keepGate keeps that there is a gate, and for which ports. The caller may not change
// them.
func (m *Memory) keepGate(ports []int) error {
	if m.has(func(d *memory) bool { return d.Gate && slices.Equal(d.Ports, ports) }) {
		return nil
	}
	same := slices.Equal(m.ports(), ports)
	m.change(func(d *memory) { d.Gate, d.Ports = true, ports })
	if same {
		return m.write()
	}
	return m.put(snapshot.Replace, false)
}

// flush writes what could not be written, and has the disk get it, without waiting.
func (m *Memory) flush() error {
	if !m.has(func(*memory) bool { return true }) {
		if err := m.write(); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.unsynced || m.syncing {
		return nil
	}
	m.unsynced, m.syncing = false, true
	go func() {
		err := snapshot.Sync(m.path)
		m.mu.Lock()
		defer m.mu.Unlock()
		m.syncing, m.unsynced = false, m.unsynced || err != nil
	}()
	return nil
}

// remove deletes the file.
func (m *Memory) remove() error {
	m.writing.Lock()
	defer m.writing.Unlock()
	if err := os.Remove(m.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// change changes what is remembered, until it is written.
func (m *Memory) change(f func(*memory)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(&m.data)
	m.changes++
}

// has reports whether something is remembered, and written.
func (m *Memory) has(f func(*memory) bool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.written == m.changes && f(&m.data)
}

// write writes the file, which outlives the daemon then.
func (m *Memory) write() error { return m.put(snapshot.Put, true) }

// put writes the file by put, which may leave it unsynced.
func (m *Memory) put(put func(path string, data []byte) error, unsynced bool) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	if m.boot == "" {
		return errBoot
	}
	m.mu.Lock()
	changes := m.changes
	data, err := json.Marshal(m.data)
	m.mu.Unlock()
	if err == nil {
		err = put(m.path, data)
	}
	if err != nil {
		return fmt.Errorf("make state.dir writable, and room there: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.written, m.unsynced = changes, unsynced
	return nil
}
