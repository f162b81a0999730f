// SPDX-License-Identifier: MIT

// Package events publishes the roams that this node has seen as JSON, for other
// programs. doc/events.md is its contract.
//
// It has a connection of its own, and what happens to that has no part in what the
// nodes tell each other: an event that cannot be published is dropped and counted.
package events

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/wgroam/wgroam/internal/control"
	"github.com/wgroam/wgroam/internal/feed"
)

// Schema is the version of Event. Fields may be added under the same number; none
// is renamed, removed or given another meaning.
const Schema = 1

// Event is what is published of a roam: the line of the verb watch, and where it
// comes from.
type Event struct {
	V     int    `json:"v"`     // Schema
	Node  string `json:"node"`  // the name of the node that saw it
	Group string `json:"group"` // as in the subject
	control.Event
	// Old and New are the endpoints, or what stands for them: see Redacted.
	Old string `json:"old"`
	New string `json:"new"`
}

// Subject returns where the events of a device are published:
// wgroam.events.<group>.<device>. Of a device's name, all but letters, digits, - and
// _ are written as % and two hexadecimal digits for each byte: a dot would end a
// token of the subject, and * and > are wildcards.
func Subject(group, device string) string {
	var b strings.Builder
	b.WriteString("wgroam.events." + group + ".")
	for _, c := range []byte(device) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// Redacted returns ~, 16 hexadecimal digits that stand for the address in the group,
// a colon and the port; "" for no endpoint.
func Redacted(keys feed.Keys, ep netip.AddrPort) string {
	if !ep.IsValid() {
		return ""
	}
	return fmt.Sprintf("~%s:%d", keys.Alias(ep.Addr()), ep.Port())
}

// item is an event that waits.
type item struct {
	keys  feed.Keys
	event control.Event
	seq   uint64
}

// message makes the message for an event.
func (p *Publisher) message(i item) (*nats.Msg, error) {
	e := Event{V: Schema, Node: p.cfg.Node, Group: i.keys.Group(), Event: i.event}
	if p.cfg.Redact {
		e.Old, e.New = Redacted(i.keys, i.event.Old), Redacted(i.keys, i.event.New)
	} else {
		e.Old, e.New = plain(i.event.Old), plain(i.event.New)
	}
	data, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	m := nats.NewMsg(Subject(e.Group, e.Device))
	m.Header.Set(nats.MsgIdHdr, fmt.Sprintf("%s-%d", p.life, i.seq))
	m.Data = data
	return m, nil
}

// plain returns an endpoint as the verb watch prints it.
func plain(ep netip.AddrPort) string {
	if !ep.IsValid() {
		return ""
	}
	return ep.String()
}
