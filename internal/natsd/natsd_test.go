// SPDX-License-Identifier: MIT

package natsd_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/wgroam/wgroam/internal/feed"
	"github.com/wgroam/wgroam/internal/natsd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func keys(t *testing.T, seed byte) feed.Keys {
	t.Helper()
	k, err := feed.Derive([32]byte{8, seed}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func start(t *testing.T, groups ...feed.Keys) *natsd.Server {
	t.Helper()
	s, err := natsd.Start(t.Context(), "127.0.0.1:0", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	for _, k := range groups {
		s.AddGroup(k)
	}
	return s
}

// connect is a member's client.
func connect(t *testing.T, s *natsd.Server, config *tls.Config, more ...nats.Option) (*nats.Conn, error) {
	t.Helper()
	opts := append([]nats.Option{nats.Timeout(2 * time.Second), nats.NoReconnect()}, more...)
	if config != nil {
		opts = append(opts, nats.Secure(config), nats.TLSHandshakeFirst())
	}
	nc, err := nats.Connect("nats://"+s.Addr().String(), opts...)
	if err == nil {
		t.Cleanup(nc.Close)
	}
	return nc, err
}

func TestMembersOfAGroup(t *testing.T) {
	a, b := keys(t, 1), keys(t, 2)
	s := start(t, a, b)
	for _, k := range []feed.Keys{a, b} {
		tcp, err := connect(t, s, k.TLS())
		if err != nil {
			t.Fatal(err)
		}
		own, err := nats.Connect("", nats.InProcessServer(s), nats.UserInfo(k.Group(), ""))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(own.Close)
		subject := "wgroam.v1." + k.Group() + ".u.1"
		for _, pair := range [][2]*nats.Conn{{tcp, own}, {own, tcp}} {
			sub, err := pair[1].SubscribeSync("wgroam.v1." + k.Group() + ".>")
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(pair[1].Flush(), pair[0].Publish(subject, []byte("x"))); err != nil {
				t.Fatal(err)
			}
			if _, err := sub.NextMsg(5 * time.Second); err != nil {
				t.Error(err)
			}
			_ = sub.Unsubscribe()
		}
	}
}

func TestOtherSubjectsAreForbidden(t *testing.T) {
	a, b := keys(t, 1), keys(t, 2)
	s := start(t, a, b)
	errs := make(chan error, 16)
	handler := nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { errs <- err })
	tcp, err := connect(t, s, a.TLS(), handler)
	if err != nil {
		t.Fatal(err)
	}
	own, err := nats.Connect("", nats.InProcessServer(s), nats.UserInfo(a.Group(), ""), handler)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	witness, err := connect(t, s, b.TLS())
	if err != nil {
		t.Fatal(err)
	}
	heard, err := witness.SubscribeSync("wgroam.v1." + b.Group() + ".>")
	if err != nil {
		t.Fatal(err)
	}
	if err := witness.Flush(); err != nil {
		t.Fatal(err)
	}
	for name, nc := range map[string]*nats.Conn{"tcp": tcp, "in process": own} {
		for _, subject := range []string{
			"wgroam.v1." + b.Group() + ".u.1", "wgroam.v1." + b.Group() + ".>", "wgroam.>", ">", "$SYS.>", "_INBOX.x",
		} {
			if _, err := nc.SubscribeSync(subject); err != nil {
				t.Fatal(err)
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-errs:
				if !errors.Is(err, nats.ErrPermissionViolation) {
					t.Errorf("%s: subscribe to %s: %v", name, subject, err)
				}
			case <-time.After(5 * time.Second):
				t.Errorf("%s: subscribed to %s", name, subject)
			}
		}
		if err := errors.Join(nc.Publish("wgroam.v1."+b.Group()+".u.1", []byte("x")), nc.Flush()); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-errs:
			if !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("%s: publish: %v", name, err)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s: published for another group", name)
		}
	}
	// The witness's server round trip comes after all of the above.
	if err := witness.Flush(); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := heard.Pending(); n != 0 {
		t.Errorf("%d messages reached another group", n)
	}
}

// selfSigned is a certificate of somebody who has not the group's key.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestStrangersAreRefused(t *testing.T) {
	a, b := keys(t, 1), keys(t, 2)
	s := start(t, a)
	both := start(t, a, b)

	blind := func(k feed.Keys) *tls.Config { // verifies nothing
		c := k.TLS()
		c.VerifyConnection = nil
		return c
	}
	forged := blind(a)
	forged.Certificates = []tls.Certificate{selfSigned(t)}
	none := blind(a)
	none.Certificates = nil
	stolen := blind(a) // the group's certificate, which is no secret, without its key
	stolen.Certificates = []tls.Certificate{{Certificate: a.TLS().Certificates[0].Certificate, PrivateKey: selfSigned(t).PrivateKey}}
	old := blind(a)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	cross := blind(b) // a member of one group asks for the other
	cross.ServerName = a.Group()
	unnamed := blind(a)
	unnamed.ServerName = "127.0.0.1"

	for name, tc := range map[string]struct {
		server *natsd.Server
		config *tls.Config
		opts   []nats.Option
	}{
		"without TLS":                    {s, nil, nil},
		"without TLS, named like a pipe": {s, nil, []nats.Option{nats.UserInfo(a.Group(), "")}},
		"with another key":               {s, b.TLS(), nil},
		"with another group's key":       {both, cross, nil},
		"with a certificate of its own":  {s, forged, nil},
		"with a certificate and not its key": {
			s, stolen, nil,
		},
		"without a certificate": {s, none, nil},
		"with TLS 1.2":          {s, old, nil},
		"without a group":       {s, unnamed, nil},
	} {
		t.Run(name, func(t *testing.T) {
			nc, err := connect(t, tc.server, tc.config, tc.opts...)
			if err == nil {
				t.Fatal("was let in: ", nc.Status())
			}
			t.Log(err)
		})
	}
	for _, group := range []string{b.Group(), ""} {
		nc, err := nats.Connect("", nats.InProcessServer(s), nats.UserInfo(group, ""), nats.NoReconnect())
		if err == nil {
			nc.Close()
			t.Errorf("in process, for group %q: was let in", group)
		}
	}
}

// TestServerIsVerified connects to a server that has not the group's key.
func TestServerIsVerified(t *testing.T) {
	a := keys(t, 1)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		c, err := l.Accept()
		if err == nil {
			_ = c.(*tls.Conn).Handshake()
			_ = c.Close()
		}
	})
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = l.Close() })
	c, err := tls.Dial("tcp", l.Addr().String(), a.TLS())
	if err == nil {
		_ = c.Close()
		t.Fatal("accepted")
	}
	if !strings.Contains(err.Error(), "another WireGuard private key") {
		t.Errorf("got %v", err)
	}
}

func TestGroupAddedLater(t *testing.T) {
	a := keys(t, 1)
	s := start(t)
	if _, err := connect(t, s, a.TLS()); err == nil {
		t.Fatal("connected before the group was added")
	} else if !strings.Contains(err.Error(), "unrecognized name") {
		t.Errorf("got %v", err)
	}
	s.AddGroup(a)
	if _, err := connect(t, s, a.TLS()); err != nil {
		t.Fatal(err)
	}
}

func TestBadAddress(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	for name, tc := range map[string]struct {
		listen, remedy string
		is             error
	}{
		"in use":         {taken.Addr().String(), "another program listens there", syscall.EADDRINUSE},
		"not of us":      {"192.0.2.1:4950", "this host does not have that address", syscall.EADDRNOTAVAIL},
		"no port":        {"127.0.0.1", "host:port", nil},
		"no such port":   {"127.0.0.1:70000", "bad port", nil},
		"port of letter": {"127.0.0.1:x-y", "bad port", nil},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := natsd.Start(t.Context(), tc.listen, slog.New(slog.DiscardHandler))
			if err == nil {
				s.Shutdown()
				t.Fatal("started")
			}
			t.Log(err)
			if !strings.Contains(err.Error(), tc.listen) || !strings.Contains(err.Error(), tc.remedy) {
				t.Errorf("%q names not both %q and %q", err, tc.listen, tc.remedy)
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("is not %v", tc.is)
			}
		})
	}
}

func TestShutdown(t *testing.T) {
	a := keys(t, 1)
	s := start(t, a)
	addr := s.Addr().String()
	closed := make(chan struct{})
	if _, err := connect(t, s, a.TLS(), nats.ClosedHandler(func(*nats.Conn) { close(closed) })); err != nil {
		t.Fatal(err)
	}
	s.Shutdown()
	s.Shutdown()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Fatal("the client is still connected")
	}
	again, err := natsd.Start(t.Context(), addr, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	again.Shutdown()
}

// TestLogIsBounded has a stranger knock at the door many times.
func TestLogIsBounded(t *testing.T) {
	var log lockedBuffer
	s, err := natsd.Start(t.Context(), "127.0.0.1:0", slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	if log.String() != "" {
		t.Errorf("speaks when nothing has happened: %s", log.String())
	}
	for range 50 {
		c, err := tls.Dial("tcp", s.Addr().String(), keys(t, 1).TLS())
		if err == nil {
			_ = c.Close()
			t.Fatal("was let in")
		}
	}
	out := log.String()
	if n := strings.Count(out, "\n"); n == 0 || n > 5 {
		t.Errorf("%d lines: %s", n, out)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

var _ io.Writer = (*lockedBuffer)(nil)

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
