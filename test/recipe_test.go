// SPDX-License-Identifier: MIT

//go:build !vm

package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/wgroam/wgroam/internal/events"
	"github.com/wgroam/wgroam/internal/lab"
)

// TestRecipe does with the nats command line tool what doc/events.md says: a stream
// of JetStream keeps the events, and a consumer reads them once.
func TestRecipe(t *testing.T) {
	if _, err := exec.LookPath("nats"); err != nil {
		t.Fatalf("run make deps, and the tests with make: %v", err)
	}
	var commands []string
	for _, found := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(read(t, "doc/events.md"), -1) {
		commands = append(commands, found[1])
	}
	if len(commands) != 3 {
		t.Fatalf("doc/events.md has %d commands, want those that make a stream, make a consumer and read", len(commands))
	}

	l := newLab(t, lab.Config{Gateways: []string{"a"}})
	a, c := l.Gateways[0], l.Clients[0]
	store, home := t.TempDir(), t.TempDir()
	url, nc, stop := runBus(t, a, func(o *server.Options) { o.JetStream, o.StoreDir = true, store })
	defer stop()
	run := func(command string) []byte {
		t.Helper()
		cmd := exec.Command("sh", "-ec", command)
		// Not the contexts of whoever runs the tests.
		cmd.Env = append(os.Environ(), "NATS_URL="+url, "HOME="+home, "XDG_CONFIG_HOME="+home)
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := a.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%s: %v\n%s%s", command, err, &out, &errs)
		}
		return out.Bytes()
	}
	run(commands[0])
	run(commands[1])

	dir := t.TempDir()
	n := startNode(t, a, dir, withEvents(a, dir, url, ""))
	n.says("publishing roams for other programs")
	ping(t, c)
	// Where it goes on before that is proven, it has roamed once less.
	n.awaitRecord(c.Key(), c.Endpoint())
	want := []netip.AddrPort{c.Endpoint()}
	for i := range 2 {
		ep := roam(t, c, i)
		n.awaitRecord(c.Key(), ep)
		want = append(want, ep)
	}
	await(t, "three roams are published", func() (bool, string) {
		s := n.eventsStatus()
		return s.Sent == 3, fmt.Sprintf("%+v", s)
	})

	contract := jsonschema.NewCompiler()
	contract.AssertFormat()
	schema, err := contract.Compile("../doc/events.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	out := run(commands[2])
	got := json.NewDecoder(bytes.NewReader(out))
	for i := range 3 {
		var raw json.RawMessage
		var e events.Event
		if err := got.Decode(&raw); err != nil {
			t.Fatalf("event %d: %v in\n%s", i, err, out)
		}
		if err := json.Unmarshal(raw, &e); err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
		if err == nil {
			err = schema.Validate(doc)
		}
		if err != nil || e.New != want[i].String() || e.Peer != c.Key() {
			t.Errorf("event %d is %s, want a roam of %v to %v: %v", i, raw, c.Key(), want[i], err)
		}
	}

	js, err := nc.JetStream(nats.MaxWait(patience))
	if err != nil {
		t.Fatal(err)
	}
	await(t, "all are acknowledged", func() (bool, string) {
		info, err := js.ConsumerInfo("ROAMS", "archive")
		return err == nil && info.NumPending == 0 && info.NumAckPending == 0, fmt.Sprintf("%+v, %v", info, err)
	})
	// The same event again is not kept.
	m, err := js.GetMsg("ROAMS", 3)
	if err != nil {
		t.Fatal(err)
	}
	ack, err := js.PublishMsg(&nats.Msg{Subject: m.Subject, Header: nats.Header{nats.MsgIdHdr: {m.Header.Get(nats.MsgIdHdr)}}, Data: m.Data})
	if err != nil || !ack.Duplicate {
		t.Errorf("an event twice: %+v, %v", ack, err)
	}
	info, err := js.StreamInfo("ROAMS")
	if err != nil || info.Config.MaxAge != 30*24*time.Hour || info.State.Msgs != 3 {
		t.Errorf("the stream: %+v, %v", info, err)
	}
}
