// SPDX-License-Identifier: MIT

// Package config reads the configuration file, one TOML document. The file
// reference.toml at the top of the source tree documents every key.
package config

import (
	"net/netip"
	"time"
)

// Config is a valid configuration, with all defaults filled in.
type Config struct {
	// Node is the name of this gateway: 1 to 64 bytes, no spaces. It must differ
	// between the nodes of a group.
	Node string
	// Devices has at least one element; no two have the same Name and Netns.
	Devices []Device
	NATS    NATS
	Events  Events
	// MaxSkew is how far ahead of this node's clock another node's may be.
	MaxSkew time.Duration
	// MaxAge is how much older than the newest record one may be.
	MaxAge time.Duration
	// KeepalivedFIFO is the absolute path of keepalived's vrrp_notify_fifo; "" for
	// none.
	KeepalivedFIFO string
	// StateDir is the absolute path of the directory for snapshots of the tables.
	StateDir string
	// ControlSocket is the absolute path of the unix socket for the verbs.
	ControlSocket string
	// MetricsListen is host:port, where host may be empty; "" for no metrics.
	MetricsListen string
}

// Role is what a node does with a device.
type Role string

// The roles.
const (
	RoleActive  Role = "active"
	RoleStandby Role = "standby"
	RoleAlways  Role = "always" // anycast and the like: there is no role
	RoleAuto    Role = "auto"   // follows the VIP, keepalived's FIFO and the role verb
)

// Standby is how a device on standby is kept quiet.
type Standby string

// The ways to stand by.
const (
	StandbyDown   Standby = "down"   // the link is down
	StandbySilent Standby = "silent" // the link is up, its UDP port is closed
)

// Device is one WireGuard device.
type Device struct {
	// Name is the interface name: 1 to 15 bytes, as the kernel accepts it.
	Name string
	// Netns is the network namespace that the device is in: a name below
	// /run/netns, or else an absolute path; "" for the daemon's own.
	Netns   string
	Role    Role
	Standby Standby
	// VIP are the virtual IP addresses of the group, without zone; nil for none.
	VIP []netip.Addr
	// VRRP is the name of keepalived's VRRP instance or group that the role
	// follows; "" for none.
	VRRP string
	// SecretFile is the absolute path that Secret was read from; "" for none.
	SecretFile string
	// Secret is mixed into the keys of the feed: 32 bytes to 64 KiB, nil for
	// none. Never print it.
	Secret []byte
	// FormerSecretFile is the absolute path that FormerSecret was read from; ""
	// for no former secret. FormerSecret is empty where there was none before.
	FormerSecretFile string
	FormerSecret     []byte
	// PollInterval is how often the device is read where changes cannot be
	// observed.
	PollInterval time.Duration
	// SweepInterval is how often the device is read where they can.
	SweepInterval time.Duration
}

// NATS says how the nodes reach each other. Either Listen and Peers are set
// (the embedded server), or URL or Context (an existing one), or nothing: then
// the node is alone.
type NATS struct {
	// Listen is the host:port of the embedded server, where host may be empty;
	// "" for no server.
	Listen string
	// Peers are the host:port of the other nodes' embedded servers.
	Peers []string
	// Heartbeat is the time between this node's signs of life.
	Heartbeat time.Duration
	External
}

// Events says where roams are published for other programs.
type Events struct {
	// Enabled is true if they are. There is a URL or a Context then.
	Enabled bool
	// Redact is true if addresses are not to be read in what is published.
	Redact bool
	External
}

// External is a NATS that is not of this program. It has the fields of
// feed.External, which it converts to.
type External struct {
	// URL is one NATS URL or several, with commas between them.
	URL string
	// Context is the name of a NATS context of the nats command line tool.
	Context string
	// Creds and NKey are absolute paths of a credentials file and of an NKey
	// seed file; at most one is set.
	Creds, NKey string
	// CA, Cert and Key are absolute paths of PEM files. Cert and Key are set
	// together or not at all.
	CA, Cert, Key string
}

// Existing reports whether there is one.
func (e External) Existing() bool { return e.URL != "" || e.Context != "" }
