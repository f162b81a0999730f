// SPDX-License-Identifier: MIT

// Package natsd is the NATS server inside a node, to which the other nodes of
// its groups connect. It keeps nothing: no JetStream, no files.
//
// One listener serves all groups of a node. A client proves by TLS that it has
// the key of the group whose name it sends as the server name, and may then
// use that group's subjects and nothing else. There is no other way in.
package natsd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/wgroam/wgroam/internal/feed"
)

// A node of every group opens one connection to each other node. The bound
// leaves room for many groups, and is there for strangers.
const maxConns = 1024

// Server is a running server. It is safe for concurrent use.
type Server struct {
	ns *server.Server

	mu     sync.RWMutex
	groups map[string]feed.Keys
}

// Start listens on a TCP address, host:port, and returns when the server
// accepts connections. Port 0 takes a free one, see Addr. No group can connect
// before AddGroup. The caller must Shutdown the server.
//
// The error names the address and says what to do about it; errors.Is finds
// syscall.EADDRINUSE and the like in it.
func Start(ctx context.Context, listen string, log *slog.Logger) (*Server, error) {
	host, portText, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, fmt.Errorf("[nats] listen = %q: want host:port: %w", listen, err)
	}
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", portText)
	if err != nil {
		return nil, fmt.Errorf("[nats] listen = %q: bad port: %w", listen, err)
	}
	// The server has no error to return for an address that it cannot have, so
	// see first whether it can.
	var lc net.ListenConfig
	probe, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return nil, fmt.Errorf("[nats] listen = %q: %w%s", listen, err, remedy(err))
	}
	_ = probe.Close()
	if port == 0 {
		port = server.RANDOM_PORT
	}

	s := &Server{groups: make(map[string]feed.Keys)}
	opts := &server.Options{
		Host:  host,
		Port:  port,
		NoLog: true,
		// Otherwise it exits the process on signals.
		NoSigs:        true,
		MaxConn:       maxConns,
		MaxSubs:       1024,
		MaxPayload:    1 << 20,
		PingInterval:  2 * time.Second,
		MaxPingsOut:   2,
		WriteDeadline: 2 * time.Second,
		AuthTimeout:   2,
		// Strangers get no byte before the handshake.
		TLSHandshakeFirst:          true,
		TLSTimeout:                 2,
		TLSConfig:                  &tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: s.config},
		CustomClientAuthentication: auth{s},
		NoSystemAccount:            true,
	}
	if s.ns, err = server.NewServer(opts); err != nil {
		return nil, fmt.Errorf("[nats] listen = %q: %w", listen, err)
	}
	b := &bridge{log: log}
	s.ns.SetLoggerV2(b, false, false, false)
	s.ns.Start()
	if !s.ns.ReadyForConnections(5 * time.Second) {
		s.Shutdown()
		return nil, fmt.Errorf("[nats] listen = %q: %w", listen, b.fatal())
	}
	b.open()
	return s, nil
}

func remedy(err error) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return ": another program listens there (ss -ltnp names it): stop it, or choose another port"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return ": this host does not have that address: choose one that it always has, not a virtual one, or 0.0.0.0"
	case errors.Is(err, syscall.EACCES):
		return ": ports below 1024 need CAP_NET_BIND_SERVICE: choose a higher one"
	}
	return ""
}

// Addr returns the address on which the server listens.
func (s *Server) Addr() net.Addr { return s.ns.Addr() }

// AddGroup lets the members of a group in. It may be called at any time.
func (s *Server) AddGroup(k feed.Keys) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.groups[k.Group()] = k
}

// RemoveGroup lets the members of a group in no longer. Those that are connected
// stay so until they part.
func (s *Server) RemoveGroup(k feed.Keys) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.groups, k.Group())
}

func (s *Server) group(name string) (feed.Keys, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	k, ok := s.groups[name]
	return k, ok
}

// InProcessConn returns a connection for a client in this process. It needs no
// TLS, and says in the user name which group it is for.
func (s *Server) InProcessConn() (net.Conn, error) { return s.ns.InProcessConn() }

// Shutdown disconnects everybody and waits until the server has ended.
func (s *Server) Shutdown() {
	s.ns.Shutdown()
	s.ns.WaitForShutdown()
}

// config chooses the group by the name that the client asks for. Without one
// there is no certificate, and the client learns that the name is unknown.
func (s *Server) config(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if k, ok := s.group(hello.ServerName); ok {
		return k.TLS(), nil
	}
	return nil, nil
}

type auth struct{ *Server }

// Check implements server.Authentication.
func (a auth) Check(c server.ClientAuthentication) bool {
	if c.Kind() != server.CLIENT {
		return false
	}
	var k feed.Keys
	ok := false
	if cs := c.GetTLSConnectionState(); cs != nil {
		k, ok = a.group(cs.ServerName)
		// The handshake has looked already. This is the place that grants.
		ok = ok && cs.HandshakeComplete && k.TLS().VerifyConnection(*cs) == nil
	} else if addr := c.RemoteAddress(); addr != nil && addr.Network() == "pipe" {
		// TLS comes first on every TCP connection. What has none is one of our
		// own pipes.
		k, ok = a.group(c.GetOpts().Username)
	}
	if !ok {
		return false
	}
	only := &server.SubjectPermission{Allow: []string{k.Subjects()}}
	c.RegisterUser(&server.User{
		Username:    k.Group(),
		Permissions: &server.Permissions{Publish: only, Subscribe: only},
	})
	return true
}
