// SPDX-License-Identifier: MIT

package events

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.uber.org/goleak"

	"github.com/wgroam/wgroam"
	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 10 * time.Second

func groupKeys(t *testing.T, seed byte) feed.Keys {
	t.Helper()
	k, err := feed.Derive([32]byte{8, seed}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// startServer starts a NATS on a port; 0 for any. It returns the port.
func startServer(t *testing.T, o server.Options) (*server.Server, int) {
	t.Helper()
	o.Host, o.NoLog, o.NoSigs = "127.0.0.1", true, true
	if o.Port == 0 {
		o.Port = server.RANDOM_PORT
	}
	s, err := server.NewServer(&o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	if !s.ReadyForConnections(patience) {
		t.Fatal("no NATS")
	}
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	return s, s.Addr().(*net.TCPAddr).Port
}

// subscribe returns what other programs get from a server.
func subscribe(t *testing.T, s *server.Server, login ...nats.Option) *nats.Subscription {
	t.Helper()
	nc, err := nats.Connect("", append(login, nats.InProcessServer(s))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	sub, err := nc.SubscribeSync("wgroam.events.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return sub
}

// next returns the next event and the number at the end of its id.
func next(t *testing.T, sub *nats.Subscription) (m *nats.Msg, id, number string) {
	t.Helper()
	m, err := sub.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	id = m.Header.Get(nats.MsgIdHdr)
	return m, id, id[strings.LastIndexByte(id, '-')+1:]
}

// startPublisher starts a Publisher to a port of this host.
func startPublisher(t *testing.T, port int, cfg Config) *Publisher {
	t.Helper()
	cfg.Node = "gw-a"
	cfg.NATS.URL = fmt.Sprintf("nats://127.0.0.1:%d", port)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := New(cfg)
	var done sync.WaitGroup
	done.Go(func() { p.Run(t.Context()) })
	t.Cleanup(done.Wait)
	return p
}

func until(t *testing.T, p *Publisher, what string, cond func(control.EventsStatus) bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(patience); !cond(p.Status()); {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("not %s after %v: %+v", what, patience, p.Status())
		}
	}
}

func event(old, now string, cause wgroam.Cause) control.Event {
	o := wgroam.Observation{Peer: wgroam.Key{1, 2, 3}, Cause: cause, At: time.Now()}
	if old != "" {
		o.Old = netip.MustParseAddrPort(old)
	}
	o.New = netip.MustParseAddrPort(now)
	return control.NewEvent("wg0", o, o.At.Add(time.Millisecond))
}

func schema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	s, err := c.Compile("../../doc/events.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSchema: what is published is what the schema says, plain and redacted, and the
// schema has all fields.
func TestSchema(t *testing.T) {
	s, port := startServer(t, server.Options{})
	sub := subscribe(t, s)
	contract := schema(t)
	keys := groupKeys(t, 1)

	netns := event("192.0.2.1:1", "[2001:db8::7]:65535", wgroam.CauseInitiation)
	netns.Netns, netns.Device = "blue", "wg.home"
	sent := []control.Event{
		event("", "192.0.2.1:41641", wgroam.CauseData),
		event("[2001:db8::7]:1", "[fe80::1%3]:7", wgroam.CauseResponse),
		netns,
	}
	for _, redact := range []bool{false, true} {
		p := startPublisher(t, port, Config{Redact: redact})
		for i, e := range sent {
			p.Publish(keys, e)
			m, _, number := next(t, sub)
			if want := fmt.Sprint(i + 1); number != want {
				t.Errorf("event %s has number %s", want, number)
			}
			if want := Subject(keys.Group(), e.Device); m.Subject != want {
				t.Errorf("published on %s, want %s", m.Subject, want)
			}
			doc, err := jsonschema.UnmarshalJSON(strings.NewReader(string(m.Data)))
			if err != nil {
				t.Fatal(err)
			}
			if err := contract.Validate(doc); err != nil {
				t.Errorf("%s: %v", m.Data, err)
			}
			fields := doc.(map[string]any)
			for name := range fields {
				if contract.Properties[name] == nil {
					t.Errorf("the schema does not have %s", name)
				}
			}
			var got Event
			if err := json.Unmarshal(m.Data, &got); err != nil {
				t.Fatal(err)
			}
			if got.V != Schema || got.Node != "gw-a" || got.Group != keys.Group() || got.Netns != e.Netns || !got.Time.Equal(e.Time) {
				t.Errorf("got %+v of %+v", got, e)
			}
			if redact {
				for _, ep := range []netip.AddrPort{e.Old, e.New} {
					if ep.IsValid() && strings.Contains(string(m.Data), ep.Addr().String()) {
						t.Errorf("%v is to be read in %s", ep, m.Data)
					}
				}
			} else if got.Old != plain(e.Old) || got.New != e.New.String() {
				t.Errorf("endpoints %s, %s, want %v, %v", got.Old, got.New, e.Old, e.New)
			}

			// The schema can fail.
			for name := range fields {
				was := fields[name]
				fields[name] = 4.5
				if contract.Validate(doc) == nil {
					t.Errorf("the schema takes anything for %s", name)
				}
				fields[name] = was
			}
			fields["cause"] = "config"
			if contract.Validate(doc) == nil {
				t.Error("the schema takes what is configured")
			}
		}
	}
	// The line of watch is one field, two of its own are overlaid.
	if n := reflect.TypeFor[Event]().NumField() + reflect.TypeFor[control.Event]().NumField() - 3; n != len(contract.Properties) {
		t.Errorf("an event has %d fields, the schema %d", n, len(contract.Properties))
	}
}

// TestExample: the event in doc/events.md is one.
func TestExample(t *testing.T) {
	text, err := os.ReadFile("../../doc/events.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "```json\n")
	example, _, found := strings.Cut(rest, "```")
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(example))
	if !found || err != nil {
		t.Fatalf("no JSON in doc/events.md: %v", err)
	}
	if err := schema(t).Validate(doc); err != nil {
		t.Error(err)
	}
}

func TestSubject(t *testing.T) {
	for device, want := range map[string]string{
		"wg0": "wg0", "wg.home": "wg%2Ehome", "*": "%2A", ">": "%3E", "a-B_9": "a-B_9", "ü%": "%C3%BC%25",
	} {
		if got := Subject("g", device); got != "wgroam.events.g."+want {
			t.Errorf("the subject of %q is %q", device, got)
		}
	}
}

// TestRedacted: equal addresses can be told, in the group, and nothing else.
func TestRedacted(t *testing.T) {
	a, b := netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.1:2")
	mine, other := groupKeys(t, 1), groupKeys(t, 2)
	host := func(k feed.Keys, ep netip.AddrPort) string {
		h, port, err := net.SplitHostPort(Redacted(k, ep))
		if err != nil || port != fmt.Sprint(ep.Port()) {
			t.Errorf("%v is redacted to %s", ep, Redacted(k, ep))
		}
		return h
	}
	if host(mine, a) != host(groupKeys(t, 1), b) {
		t.Error("two nodes have two names for an address")
	}
	if host(mine, a) == host(other, a) {
		t.Error("two groups have one name for an address")
	}
	if host(mine, a) == host(mine, netip.MustParseAddrPort("192.0.2.2:1")) {
		t.Error("two addresses have one name")
	}
	if got := Redacted(mine, netip.AddrPort{}); got != "" {
		t.Errorf("no endpoint is redacted to %q", got)
	}
}

// TestAway: nobody waits for a NATS that is away. What there is room for waits for
// it, the rest is counted, and the numbers say what is missing.
func TestAway(t *testing.T) {
	s, port := startServer(t, server.Options{})
	sub := subscribe(t, s)
	keys := groupKeys(t, 1)
	p := startPublisher(t, port, Config{})
	e := event("", "192.0.2.1:1", wgroam.CauseData)
	p.Publish(keys, e)
	_, before, _ := next(t, sub)

	s.Shutdown()
	s.WaitForShutdown()
	until(t, p, "disconnected", func(s control.EventsStatus) bool { return !s.Connected })
	// One is taken from the queue, and held.
	p.Publish(keys, e)
	until(t, p, "one taken", func(s control.EventsStatus) bool { return s.Waiting == 0 })
	const over = 10
	for range queued + over {
		p.Publish(keys, e)
	}
	if s := p.Status(); s.Dropped != over || s.Waiting != queued || s.Sent != 1 || s.Error == "" {
		t.Errorf("%d dropped, %d waiting, %d sent, error %q", s.Dropped, s.Waiting, s.Sent, s.Error)
	}

	// The first of them may come before anybody has subscribed again.
	s, _ = startServer(t, server.Options{Port: port})
	until(t, p, "all published", func(s control.EventsStatus) bool { return s.Sent == queued+2 && s.Connected && s.Error == "" })
	sub = subscribe(t, s)
	p.Publish(keys, e)
	_, after, number := next(t, sub)
	for last := fmt.Sprint(1 + 1 + queued + over + 1); number != last; {
		_, after, number = next(t, sub)
	}
	if strings.TrimSuffix(after, number) != strings.TrimSuffix(before, "1") {
		t.Errorf("one daemon goes by %s and %s", before, after)
	}
	if s := p.Status(); s.Dropped != over {
		t.Errorf("%d dropped", s.Dropped)
	}
}

// TestLate: what happens before the NATS is there for the first time is published
// when it is.
func TestLate(t *testing.T) {
	s, port := startServer(t, server.Options{})
	s.Shutdown()
	s.WaitForShutdown()
	keys := groupKeys(t, 1)
	p := startPublisher(t, port, Config{})
	until(t, p, "in trouble", func(s control.EventsStatus) bool { return s.Error != "" })
	p.Publish(keys, event("", "192.0.2.1:1", wgroam.CauseData))
	startServer(t, server.Options{Port: port})
	until(t, p, "published", func(s control.EventsStatus) bool { return s.Sent == 1 && s.Connected })
}

// TestDenied: a server that does not take events is a loss that is counted, and said
// once with what to do about it.
func TestDenied(t *testing.T) {
	_, port := startServer(t, server.Options{Users: []*server.User{{
		Username: "u", Password: "p",
		Permissions: &server.Permissions{Publish: &server.SubjectPermission{Allow: []string{"else"}}},
	}}})
	var log strings.Builder
	p := New(Config{
		Node: "gw-a", NATS: feed.External{URL: fmt.Sprintf("nats://u:p@127.0.0.1:%d", port)},
		Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	var done sync.WaitGroup
	done.Go(func() { p.Run(t.Context()) })
	t.Cleanup(func() {
		done.Wait()
		if n := strings.Count(log.String(), "allow publish on wgroam.events.>"); n != 1 {
			t.Errorf("the remedy is named %d times in\n%s", n, log.String())
		}
		if strings.Contains(log.String(), "u:p") {
			t.Errorf("the password is in\n%s", log.String())
		}
	})
	for range 3 {
		p.Publish(groupKeys(t, 1), event("", "192.0.2.1:1", wgroam.CauseData))
	}
	until(t, p, "denied", func(s control.EventsStatus) bool { return s.Dropped == 3 && s.Connected && s.Error != "" })
}

// TestPermission: the one that doc/events.md asks for is enough.
func TestPermission(t *testing.T) {
	s, port := startServer(t, server.Options{
		NoAuthUser: "node",
		Users: []*server.User{
			{Username: "node", Password: "p", Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: []string{"wgroam.events.>"}},
				Subscribe: &server.SubjectPermission{Deny: []string{">"}},
			}},
			{Username: "reader", Password: "p"},
		},
	})
	sub := subscribe(t, s, nats.UserInfo("reader", "p"))
	p := startPublisher(t, port, Config{})
	p.Publish(groupKeys(t, 1), event("", "192.0.2.1:1", wgroam.CauseData))
	next(t, sub)
	if s := p.Status(); s.Dropped != 0 || s.Error != "" {
		t.Errorf("%+v", s)
	}
}

// TestGranted: a permission that came later ends the complaint, once events are taken.
func TestGranted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Config{Log: slog.New(slog.DiscardHandler)})
		p.connected(nil)
		for range 3 {
			p.accepted()
			p.refused(nats.ErrPermissionViolation)
			time.Sleep(2 * settled)
			if p.Status().Error == "" {
				t.Error("no complaint while all are refused")
			}
		}
		for range 5 { // more often than complaints are waited for
			p.accepted()
			time.Sleep(settled / 4)
		}
		if s := p.Status(); s.Error != "" || s.Dropped != 3 {
			t.Errorf("%+v", s)
		}
	})
}

// TestEnd: a clean end is no trouble.
func TestEnd(t *testing.T) {
	_, port := startServer(t, server.Options{})
	var log strings.Builder
	p := New(Config{
		Node: "gw-a", NATS: feed.External{URL: fmt.Sprintf("nats://127.0.0.1:%d", port)},
		Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { p.Run(ctx) })
	until(t, p, "connected", func(s control.EventsStatus) bool { return s.Connected })
	cancel()
	done.Wait()
	if log.Len() > 0 {
		t.Errorf("warns of its own end:\n%s", log.String())
	}
}

// TestNoFile: a credentials file that is not there yet is waited for.
func TestNoFile(t *testing.T) {
	p := startPublisher(t, 4222, Config{NATS: feed.External{Creds: filepath.Join(t.TempDir(), "none.creds")}})
	until(t, p, "complaining", func(s control.EventsStatus) bool { return strings.Contains(s.Error, "none.creds") })
	p.Publish(groupKeys(t, 1), event("", "192.0.2.1:1", wgroam.CauseData))
	if s := p.Status(); s.Connected || s.Waiting != 1 {
		t.Errorf("%+v", s)
	}
}
