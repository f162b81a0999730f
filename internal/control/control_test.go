// SPDX-License-Identifier: MIT

package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var zone = time.FixedZone("CET", 3600)

func key(b byte) wgroam.Key { return wgroam.Key{0: b, 31: 0x41} }

// testStatus returns a status with every field set, in no good order.
func testStatus() Status {
	return Status{
		Node: "gw-a", NodeID: "0123456789abcdef", Version: "v0.1.0",
		Started: time.Date(2026, 11, 23, 7, 0, 0, 0, zone),
		Events: &EventsStatus{
			Connection: Connection{Name: "nats://events", Since: time.Date(2026, 11, 23, 7, 0, 1, 0, zone), Error: "away"},
			Redact:     true, Sent: 12, Dropped: 13, Waiting: 14,
		},
		Devices: []DeviceStatus{
			{Name: "wg0", Netns: "blue", State: StateWaiting, Role: "always", Standby: "down", Detector: Detector{Rung: RungNone, Reason: "no device wg0"}, Feed: FeedStatus{Mode: FeedNone}},
			{
				Name: "wg0", NetnsInode: 4026531840, Ifindex: 7, State: StateUp, Role: "standby", Standby: "silent",
				RoleBy: "vrrp", RoleSince: time.Date(2026, 11, 23, 7, 0, 4, 0, zone),
				Failover: Failover{"promoting", "no route", &Promotion{
					time.Date(2026, 11, 23, 6, 0, 6, 0, time.UTC), time.Date(2026, 11, 23, 6, 0, 7, 0, time.UTC), 7, 6, 5, 4, 3, 2, 1,
				}, "gw-b"},
				Keepalived: &Keepalived{"/run/wgroam/keepalived.fifo", "VI_1", "active", true, []string{"VI_2"}, true, "not a FIFO"},
				Alarms:     []RoleAlarm{{"traffic", "peers talk", "look", time.Date(2026, 11, 23, 7, 0, 5, 0, zone)}},
				VIP:        []netip.Addr{netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8::10")},
				Group:      "5f1d",
				Detector:   Detector{Rung: RungPolling, Reason: "no BTF <wireguard>"}, ClockBehindMS: 20000,
				Events: 1, Lost: 2, Limited: 10, Resyncs: 3, SweepRepairs: 4, Peers: 5, Records: 6, Waiting: 7, Applied: 8, ApplyErrors: 9, Undone: 11,
				LastError: "none & nothing",
				Snapshot: Snapshot{
					Path: "/var/lib/wgroam/5f1d.snapshot", Written: time.Date(2026, 11, 23, 7, 0, 3, 0, zone), Records: 6, Error: "no space left",
					Writes: 3, Errors: 2,
				},
				Feed: FeedStatus{
					Mode: FeedEmbedded, Listen: "10.0.0.11:4950", Error: "address in use", Subjects: "wgroam.v1.abc.>",
					Connections: []FeedConnection{
						{Connection{Name: "10.0.0.13:4950", Since: time.Date(2026, 11, 23, 7, 0, 1, 0, zone), Error: "connection refused"}, true},
						{Connection{Name: "10.0.0.12:4950", Since: time.Date(2026, 11, 23, 6, 0, 2, 5000, time.UTC), Connected: true}, false},
					},
					Nodes: []NodeStatus{
						{Name: "gw-c", ID: "0000000000000003", Role: "always", State: NodeStale, AgeMS: 90000, SkewMS: -3},
						{Name: "gw-b", ID: "0000000000000002", Role: "standby", State: NodeSynced, AgeMS: 120, SkewMS: 4, Records: 6, Former: true},
						{ID: "0000000000000001", State: NodeSyncing},
					},
					Refused: map[string]uint64{"seal": 2, "endpoint": 1},
					Sent:    10, Received: 11,
					FramesSent: 12, FramesReceived: 13, BytesSent: 14, BytesReceived: 15,
					Dropped: 16, Gaps: 17, Syncs: 18, SyncErrors: 19, Synced: 20,
				},
			},
		},
	}
}

func testPeers() []Peer {
	return []Peer{
		{Device: "wg0", Netns: "blue", Peer: key(1), Applied: AppliedWaiting},
		{
			Device: "wg0", Peer: key(2), Applied: AppliedNo, Cause: "initiation", Node: "0000000000000002",
			Endpoint: netip.MustParseAddrPort("[2001:db8::1]:51820"), Held: netip.MustParseAddrPort("198.51.100.7:51820"),
			Observed: time.Date(2026, 11, 23, 7, 0, 0, 250e6, zone), AgeS: 12, Error: "device busy",
		},
		{
			Device: "wg0", Peer: key(1), Applied: AppliedYes, Cause: "data", Node: "gw-a",
			Endpoint: netip.MustParseAddrPort("198.51.100.8:4000"), Held: netip.MustParseAddrPort("198.51.100.8:4000"),
			Observed: time.Date(2026, 11, 23, 6, 0, 0, 0, time.UTC), AgeS: 12,
		},
	}
}

func testEvent(n int) Event {
	at := time.Date(2026, 11, 23, 7, 0, 0, 123456789, zone)
	return NewEvent("wg0", wgroam.Observation{
		Peer: key(1), New: netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1"), uint16(n)), Cause: wgroam.CauseData, At: at,
	}, at.Add(57*time.Microsecond))
}

// serve starts a server on a socket of its own, and stops it when the test
// ends.
func serve(t *testing.T, h Handler) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "run", "s")
	s, err := Listen(path, h)
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	return path
}

// run serves until stop is called or the test ends.
func run(t *testing.T, s *Server) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func testFindings(context.Context) []Finding {
	return []Finding{
		{Check: "daemon", State: CheckOK, Detail: "gw-a runs"},
		{Device: "wg0", Netns: "blue", Check: "peers", State: CheckFail, Detail: "not as on gw-b", Do: "mend", Peers: []FindingPeer{{key(1), "missing here"}}},
	}
}

func handler() Handler {
	return Handler{Status: testStatus, Elect: func(string) Status { return testStatus() }, Peers: testPeers, Check: testFindings, Events: NewHub(), SetRole: func(device, role string) error {
		if role != "active" || device != "wg0" {
			return fmt.Errorf("%s of %s", role, strings.TrimSpace(device+" all"))
		}
		return nil
	}, Handover: func(_ context.Context, device, to string, tell func(HandoverStep)) error {
		if device != "wg0" {
			return errors.New("no device " + device)
		}
		tell(HandoverStep{Device: device, Step: HandoverReady})
		tell(HandoverStep{Device: device, Step: HandoverDone, Detail: to})
		return nil
	}}
}

// TestHandover: every step is a line, and a request that makes no sense is an error.
func TestHandover(t *testing.T) {
	path := serve(t, handler())
	var steps []HandoverStep
	take := func(line json.RawMessage) error {
		var s HandoverStep
		err := json.Unmarshal(line, &s)
		steps = append(steps, s)
		return err
	}
	if err := Handover(t.Context(), path, "wg0", "gw-b", take); err != nil {
		t.Fatal(err)
	}
	want := []HandoverStep{{Device: "wg0", Step: HandoverReady}, {Device: "wg0", Step: HandoverDone, Detail: "gw-b"}}
	if !slices.Equal(steps, want) {
		t.Errorf("got %+v, want %+v", steps, want)
	}
	if err := Handover(t.Context(), path, "wg9", "", take); err == nil || !strings.Contains(err.Error(), "no device wg9") {
		t.Errorf("got %v", err)
	}
	var out Status
	if err := get(t.Context(), path, request{Verb: VerbStatus, To: "gw-b"}, &out); err == nil || !strings.Contains(err.Error(), "does not take to") {
		t.Errorf("got %v", err)
	}
}

// golden compares got, one JSON document on one line, with a file.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	if strings.Count(string(got), "\n") > 1 {
		t.Errorf("more than one line: %s", got)
	}
	var v json.RawMessage
	if err := json.Unmarshal(got, &v); err != nil {
		t.Fatal(err)
	}
	pretty := new(strings.Builder)
	e := json.NewEncoder(pretty)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(pretty.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), pretty.String()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func TestGet(t *testing.T) {
	path := serve(t, handler())
	for _, verb := range []string{VerbStatus, VerbPeers, VerbCheck} {
		var one, two json.RawMessage
		if err := Get(t.Context(), path, verb, &one); err != nil {
			t.Fatal(err)
		}
		if err := Get(t.Context(), path, verb, &two); err != nil {
			t.Fatal(err)
		}
		if string(one) != string(two) {
			t.Errorf("%s: two answers differ:\n%s\n%s", verb, one, two)
		}
		golden(t, verb+".json", one)
	}

	var status Status
	if err := Get(t.Context(), path, VerbStatus, &status); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(testStatus().settle(), status, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	var peers Peers
	if err := Get(t.Context(), path, VerbPeers, &peers); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(settlePeers(testPeers()), peers, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
}

// TestEmpty: arrays and maps are never null.
func TestEmpty(t *testing.T) {
	status := func() Status { return Status{Devices: []DeviceStatus{{Keepalived: &Keepalived{}}}} }
	h := Handler{
		Status: status, Elect: func(string) Status { return status() },
		Peers:  func() []Peer { return nil },
		Check:  func(context.Context) []Finding { return nil },
		Events: NewHub(),
	}
	path := serve(t, h)
	for _, verb := range []string{VerbStatus, VerbElect, VerbPeers, VerbCheck} {
		var got json.RawMessage
		if err := Get(t.Context(), path, verb, &got); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(got), "null") {
			t.Errorf("%s: %s", verb, got)
		}
	}
}

// TestSettleCopies: what the handler returns may be its own state.
func TestSettleCopies(t *testing.T) {
	status, peers := testStatus(), testPeers()
	status.settle()
	settlePeers(peers)
	if want := testStatus(); !reflect.DeepEqual(want, status) {
		t.Error("settle has changed the status of its caller")
	}
	if want := testPeers(); !reflect.DeepEqual(want, peers) {
		t.Error("settlePeers has changed the peers of its caller")
	}
}

// TestCheckReady: what fails decides, and what only warns does not.
func TestCheckReady(t *testing.T) {
	many := make([]FindingPeer, MaxFindingPeers+1)
	for state, ready := range map[string]bool{CheckOK: true, CheckWarn: true, CheckFail: false} {
		c := NewCheck([]Finding{{State: CheckOK}, {State: state, Peers: many}, {State: CheckOK}})
		if c.Ready != ready || c.Schema != Schema || len(c.Checks) != 3 || len(c.Checks[1].Peers) != MaxFindingPeers {
			t.Errorf("%s: ready is %v, %d peers", state, c.Ready, len(c.Checks[1].Peers))
		}
	}
}

func TestSchemaIsComplete(t *testing.T) {
	// The golden status has every field set, so that none can be renamed
	// without the test's notice.
	var unset func(path string, v reflect.Value) []string
	unset = func(path string, v reflect.Value) (out []string) {
		switch {
		case v.Type() == reflect.TypeFor[time.Time](), v.Kind() != reflect.Struct && v.Kind() != reflect.Slice:
			if v.IsZero() {
				out = append(out, path)
			}
		case v.Kind() == reflect.Struct:
			for i := range v.NumField() {
				if v.Type().Field(i).IsExported() {
					out = append(out, unset(path+"."+v.Type().Field(i).Name, v.Field(i))...)
				}
			}
		case v.Len() == 0:
			out = append(out, path)
		}
		return out
	}
	s := testStatus().settle()
	d := s.Devices[0]
	for _, v := range []any{s, d, d.Feed.Connections[1], d.Feed.Nodes[1], testPeers()[1], settlePeers(testPeers()), testFindings(t.Context())[1]} {
		for _, path := range unset(fmt.Sprintf("%T", v), reflect.ValueOf(v)) {
			if path != "control.FeedConnection.Connection.Connected" && !strings.HasSuffix(path, ".Netns") {
				t.Errorf("%s is not set", path)
			}
		}
	}
}

func TestEvent(t *testing.T) {
	e := testEvent(51820)
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"time":"2026-11-23T06:00:00.123456789Z","device":"wg0","peer":"` + key(1).String() +
		`","old":"","new":"[2001:db8::1]:51820","cause":"data","latency_us":57}`
	if diff := cmp.Diff(want, string(b)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	e.Old, e.New, e.Netns = netip.MustParseAddrPort("198.51.100.7:1"), netip.AddrPort{}, "blue"
	if b, _ = json.Marshal(e); !strings.Contains(string(b), `"device":"wg0","netns":"blue",`) || !strings.Contains(string(b), `"old":"198.51.100.7:1","new":""`) {
		t.Errorf("got %s", b)
	}
	var back Event
	if err := json.Unmarshal(b, &back); err != nil || !reflect.DeepEqual(e, back) {
		t.Errorf("back comes %+v, %v, want %+v", back, err, e)
	}
}

// line reads a line of a watch.
type line struct {
	Event
	Missed *uint64 `json:"missed"`
}

func TestWatch(t *testing.T) {
	h := handler()
	path := serve(t, h)
	h.Events.Publish(testEvent(1)) // to nobody

	enough := errors.New("enough")
	var ports []uint16
	err := Watch(t.Context(), path, false, func(raw json.RawMessage) error {
		var l line
		if err := json.Unmarshal(raw, &l); err != nil {
			return err
		}
		if l.Missed != nil {
			if *l.Missed != 0 || ports != nil {
				return fmt.Errorf("missed %d", *l.Missed)
			}
			// From here on nothing is lost.
			for i := 2; i < 5; i++ {
				h.Events.Publish(testEvent(i))
			}
			return nil
		}
		if ports = append(ports, l.New.Port()); len(ports) == 3 {
			return enough
		}
		return nil
	})
	if err != enough { //nolint:errorlint // It comes unwrapped.
		t.Errorf("Watch: %v", err)
	}
	if diff := cmp.Diff([]uint16{2, 3, 4}, ports); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	waitFor(t, "the server to forget the client", func() bool { return h.Events.len() == 0 })
}

// TestWatchPromotions: a client that has not asked for promotions hears of none.
func TestWatchPromotions(t *testing.T) {
	h := handler()
	path := serve(t, h)
	progress := Progress{Time: testEvent(1).Time, Device: "wg0", Promotion: Promotion{Began: testEvent(1).Time, Peers: 3, Called: 2}}
	for wanted, want := range map[bool][]any{false: {testEvent(2)}, true: {progress, testEvent(2)}} {
		enough := errors.New("enough")
		var got []string
		err := Watch(t.Context(), path, wanted, func(raw json.RawMessage) error {
			if string(raw) == `{"missed":0}` {
				h.Events.Progress(progress)
				h.Events.Publish(testEvent(2))
				return nil
			}
			if got = append(got, string(raw)); len(got) == len(want) {
				return enough
			}
			return nil
		})
		if err != enough { //nolint:errorlint // It comes unwrapped.
			t.Errorf("Watch: %v", err)
		}
		for i, line := range want {
			if b, err := json.Marshal(line); err != nil || string(b) != got[i] {
				t.Errorf("promotions %v, line %d: got %s, want %s (%v)", wanted, i, got[i], b, err)
			}
		}
		waitFor(t, "the server to forget the client", func() bool { return h.Events.len() == 0 })
	}
}

func (h *Hub) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.readers)
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	timeout := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}

// TestSlowWatch: a client that does not read holds nobody up, and learns how
// much it has missed. Every event is either delivered, in order, or counted
// where it is missing.
func TestSlowWatch(t *testing.T) {
	h := handler()
	path := serve(t, h)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintln(c, `{"verb":"watch"}`)
	waitFor(t, "the client to be known", func() bool { return h.Events.len() == 1 })

	const events = 50000
	for i := range events { // The socket holds some 200 KB, and nobody reads.
		h.Events.Publish(testEvent(i))
	}
	h.Events.Publish(Event{Cause: "end"})

	next, missed := 0, 0
	r := bufio.NewScanner(c)
	for r.Scan() {
		var l line
		if err := json.Unmarshal(r.Bytes(), &l); err != nil {
			t.Fatal(err)
		}
		if l.Missed != nil {
			missed += int(*l.Missed)
			next += int(*l.Missed)
			if next >= events {
				break // The end is among the missed.
			}
			continue
		}
		if l.Cause == "end" {
			break
		}
		if int(l.New.Port()) != next%65536 {
			t.Fatalf("event %d after %d events, %d missed", l.New.Port(), next, missed)
		}
		next++
	}
	if next != events && next != events+1 {
		t.Errorf("delivered or counted %d of %d events: %v", next, events, r.Err())
	}
	if missed == 0 {
		t.Error("nothing was missed: the test does not test")
	}
}

// TestWatchConcurrently: publishers and clients of every kind at once, for the
// race detector.
func TestWatchConcurrently(t *testing.T) {
	h := handler()
	path := serve(t, h)
	ctx, cancel := context.WithCancel(t.Context())
	var clients, publishers sync.WaitGroup
	const each = 200
	for range 4 {
		clients.Go(func() {
			n := uint64(0)
			err := Watch(ctx, path, false, func(raw json.RawMessage) error {
				var l line
				if err := json.Unmarshal(raw, &l); err != nil {
					return err
				}
				if l.Missed != nil {
					n += *l.Missed
				} else {
					n++
				}
				if n == 4*each {
					return io.EOF
				}
				return nil
			})
			if !errors.Is(err, io.EOF) {
				t.Errorf("after %d events: %v", n, err)
			}
		})
	}
	waitFor(t, "4 clients", func() bool { return h.Events.len() == 4 })
	for range 4 {
		publishers.Go(func() {
			for i := range each {
				h.Events.Publish(testEvent(i))
			}
		})
		clients.Go(func() {
			var s Status
			if err := Get(ctx, path, VerbStatus, &s); err != nil {
				t.Error(err)
			}
		})
	}
	publishers.Wait()
	clients.Wait()
	cancel()
}

func TestRequests(t *testing.T) {
	path := serve(t, handler())
	for _, tt := range []struct{ name, request, want string }{
		{"no newline", `{"verb":"peers"}`, `{"schema":1,"peers":[`},
		{"spaces", ` { "verb" : "peers" } ` + "\r\n", `{"schema":1,"peers":[`},
		{"unknown verb", `{"verb":"roles"}` + "\n", `{"error":"this daemon does not know the verb \"roles\""}`},
		{"role", `{"verb":"role","device":"wg0","role":"active"}` + "\n", `{"schema":1,"node":`},
		{"role refused", `{"verb":"role","role":"king"}` + "\n", `{"error":"king of all"}`},
		{"role for another verb", `{"verb":"status","role":"active"}` + "\n", `{"error":"the verb \"status\" takes neither role nor device"}`},
		{"no verb", "{}\n", `{"error":"this daemon does not know the verb \"\""}`},
		{"unknown field", `{"verb":"status","dev":"wg0"}` + "\n", `{"error":"malformed request, want {\"verb\":\"status\"}: json: unknown field \"dev\""}`},
		{"not JSON", "status\n", `{"error":"malformed request, want`},
		{"empty line", "\n", `{"error":"malformed request, want`},
		{"nothing", "", `{"error":"no request: EOF"}`},
		{"two", `{"verb":"status"}{"verb":"peers"}` + "\n", `{"error":"malformed request: more than one JSON value on the line"}`},
		{"long", strings.Repeat(" ", maxRequest) + `{"verb":"status"}` + "\n", `{"error":"the request is longer than 4096 bytes"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, tt.request) // A long one may find the door shut.
			_ = c.(*net.UnixConn).CloseWrite()
			// After an answer to a long request comes ECONNRESET.
			got, _ := io.ReadAll(c)
			if !strings.HasPrefix(string(got), tt.want) {
				t.Errorf("the answer is %s, want %s", got, tt.want)
			}
		})
	}
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"verb":"status"}` + "\n"))
	f.Add([]byte(`{"verb":"watch"}`))
	f.Add([]byte(" {\"verb\":\"\\u0000\"}\t\n{"))
	f.Fuzz(func(t *testing.T, data []byte) {
		req, err := readRequest(strings.NewReader(string(data)))
		if err != nil {
			if req != (request{}) {
				t.Errorf("%+v with error %v", req, err)
			}
			return
		}
		line, _, _ := strings.Cut(string(data), "\n")
		var r request
		if err := json.Unmarshal([]byte(line), &r); err != nil || r != req {
			t.Errorf("%q is %+v for us, %+v for encoding/json (%v)", line, req, r, err)
		}
	})
}

func TestClientErrors(t *testing.T) {
	path := serve(t, handler())
	var out Status

	err := Get(t.Context(), path, "roles", &out)
	if want := `the daemon on ` + path + `, verb roles: this daemon does not know the verb "roles"`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if err := get(t.Context(), path, request{Verb: VerbStatus, Promotions: true}, &out); err == nil || !strings.Contains(err.Error(), "does not take promotions") {
		t.Errorf("got %v", err)
	}

	none := filepath.Join(t.TempDir(), "s")
	err = Get(t.Context(), none, VerbStatus, &out)
	want := "no daemon answers on " + none + ": start one with wgroam run, or pass --socket"
	if !errors.Is(err, ErrNoDaemon) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	leaveStale(t, none)
	if err := Get(t.Context(), none, VerbStatus, &out); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("the socket of a dead daemon: %v", err)
	}

	hanging := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", hanging)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	short, end := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer end()
	if err := Get(short, hanging, VerbStatus, &out); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), hanging+" does not answer") {
		t.Errorf("a daemon that hangs: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	err = Watch(ctx, path, false, func(json.RawMessage) error { cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Watch after cancel: %v", err)
	}
	if err := Get(ctx, path, VerbStatus, &out); !errors.Is(err, context.Canceled) {
		t.Errorf("Get after cancel: %v", err)
	}
}

func TestNotRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root")
		}
		t.Skip("this test needs root, to be somebody else")
	}
	// Not t.TempDir, which nobody else may enter.
	dir, err := os.MkdirTemp("", "wgroam")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "run", "s")
	s, err := Listen(path, handler())
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	if fi, err := os.Stat(path); err != nil || fi.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the socket has mode %v, %v", fi.Mode(), err)
	}
	if fi, err := os.Stat(filepath.Dir(path)); err != nil || fi.Mode() != fs.ModeDir|0o755 {
		t.Errorf("its directory has mode %v, %v", fi.Mode(), err)
	}

	got := make(chan error)
	go func() {
		// The thread is somebody else from here on, and ends with the
		// goroutine. Its file system identity is what connect goes by.
		runtime.LockOSThread()
		if err := unix.Setfsuid(65534); err != nil {
			got <- err
			return
		}
		got <- Get(context.Background(), path, VerbStatus, new(Status))
	}()
	if err := <-got; !errors.Is(err, fs.ErrPermission) || !strings.HasSuffix(err.Error(), "run as root") {
		t.Errorf("got %v", err)
	}
}

// leaveStale makes a socket on which nobody listens.
func leaveStale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	leaveStale(t, path)
	s, err := Listen(path, handler())
	if err != nil {
		t.Fatalf("in place of a dead daemon: %v", err)
	}
	stop := run(t, s)

	_, err = Listen(path, handler())
	want := fmt.Sprintf("control socket %s: socket in use: another wgroam runs on this socket (pid %d): stop it, or choose another path with [control] socket",
		path, os.Getpid())
	if !errors.Is(err, ErrInUse) || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if err := Get(t.Context(), path, VerbStatus, new(Status)); err != nil {
		t.Errorf("the first daemon does not answer any more: %v", err)
	}

	// A watching client is no reason to stay.
	h := make(chan error)
	watching := make(chan struct{})
	go func() {
		h <- Watch(t.Context(), path, false, func(json.RawMessage) error { close(watching); return nil })
	}()
	<-watching
	stop()
	if err := <-h; !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "the daemon on "+path+" has ended") {
		t.Errorf("Watch ends with %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}

	// And again, without Serve.
	s, err = Listen(path, handler())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestListenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(dir, "foreign")
	l, err := net.Listen("unix", foreign) // without a lock file
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, tt := range []struct{ name, path, want string }{
		{"file", file, "there is a file that is not a socket"},
		{"below a file", filepath.Join(file, "s"), "not a directory"},
		{"long", filepath.Join(dir, strings.Repeat("x", 108)), "longer than 107 bytes"},
		{"somebody else's", foreign, "another wgroam runs on this socket"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := Listen(tt.path, handler()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file now has %q, %v", b, err)
	}
}

// TestListenRace: of many daemons that start at the same moment over a stale
// socket, one wins, and it answers.
func TestListenRace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 50 {
		leaveStale(t, path)
		servers := make(chan *Server, 8)
		var starts sync.WaitGroup
		for range cap(servers) {
			starts.Go(func() {
				s, err := Listen(path, handler())
				if err == nil {
					servers <- s
				} else if !errors.Is(err, ErrInUse) {
					t.Error(err)
				}
			})
		}
		starts.Wait()
		close(servers)
		if len(servers) != 1 {
			t.Fatalf("%d daemons on one socket", len(servers))
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		(<-servers).Close()
	}
}

// TestManyPeers: an answer of many megabytes arrives whole.
func TestManyPeers(t *testing.T) {
	h := handler()
	h.Peers = func() []Peer {
		peers := make([]Peer, 50000)
		for i := range peers {
			peers[i] = testPeers()[1]
			peers[i].Peer[1], peers[i].Peer[2] = byte(i>>8), byte(i)
		}
		return peers
	}
	path := serve(t, h)
	var got Peers
	if err := Get(t.Context(), path, VerbPeers, &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Peers) != 50000 {
		t.Errorf("%d peers", len(got.Peers))
	}
}
