// SPDX-License-Identifier: MIT

package failover

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/wgroam/wgroam/internal/snapshot"
)

// Memory is the file in which a device's failover keeps what must outlive the
// daemon. It counts for one boot of the host: what was said before is not known to
// be true any more, and what was taken from the device is gone.
//
// A Memory is safe for concurrent use.
type Memory struct {
	path string
	boot string

	mu   sync.Mutex
	data memory
}

// memory is the contents of the file.
type memory struct {
	Boot  string `json:"boot"` // as /proc/sys/kernel/random/boot_id
	Words words  `json:"words"`
}

// OpenMemory reads the memory of a device, named as in the status, in the state
// directory. A file that cannot be used is left under another name, for an
// operator to look at; then the error says so, and the Memory is empty.
func OpenMemory(dir, device string) (*Memory, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("identify this boot of the host: %w", err)
	}
	m := &Memory{
		path: filepath.Join(dir, "failover-"+url.PathEscape(device)+".json"),
		boot: strings.TrimSpace(string(boot)),
	}
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
	if read.Boot == m.boot {
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

func (m *Memory) keepWords(verb, vrrp Role) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.data.Words.Verb, m.data.Words.VRRP = verb, vrrp
	return m.write()
}

// write writes the file. m.mu is held.
func (m *Memory) write() error {
	data, err := json.Marshal(m.data)
	if err == nil {
		err = snapshot.Replace(m.path, data)
	}
	if err != nil {
		return fmt.Errorf("make state.dir writable, and room there: %w", err)
	}
	return nil
}
