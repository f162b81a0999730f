// SPDX-License-Identifier: MIT

package failover

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/wgroam/wgroam/internal/wg"
)

// gate is an nftables table that says what may pass the UDP port of a device, and
// the device itself. It stays as it is when the daemon ends, however it ends.
type gate struct {
	space  *wg.Space
	device string
	table  *nftables.Table
}

func newGate(space *wg.Space, device string) *gate {
	return &gate{space, device, &nftables.Table{Name: "wgroam-" + device, Family: nftables.TableFamilyINet}}
}

// standby begins what a gate says that is shut.
const standby = "wgroam: standby"

// shut returns what the gate says while it lets nothing of WireGuard in or out.
func shut(ports ...int) string {
	return fmt.Sprintf("%s, port %s and the tunnel are shut", standby, strings.Trim(fmt.Sprint(ports), "[]"))
}

// from returns what the gate says while all that WireGuard sends bears one of the
// addresses.
func from(vips []netip.Addr, port int) string {
	says := fmt.Sprintf("wgroam: active, port %d sends from %s", port, strings.Trim(fmt.Sprint(vips), "[]"))
	if len(says) > mostComment {
		says = fmt.Sprintf("wgroam: active, port %d sends from %d addresses, %x", port, len(vips), sha256.Sum256([]byte(says)))
	}
	return says
}

// mostComment is how long a comment can be, which is kept with its type, its length and a
// zero (nf_tables.h, NFT_USERDATA_MAXLEN is 256).
const mostComment = 253

// opened is what a gate says that was shut, and has been opened in haste.
const opened = "wgroam: active, being tidied up"

// says returns what the gate says; empty if there is none.
func (g *gate) says() string {
	if rules := g.rules("out"); len(rules) > 0 {
		return comment(rules[0])
	}
	return ""
}

// rules returns those of a chain; none without the table.
func (g *gate) rules(chain string) (rules []*nftables.Rule) {
	_ = g.space.Do(func() error {
		conn, err := nftables.New()
		if err == nil {
			rules, err = conn.GetRules(g.table, &nftables.Chain{Name: chain})
		}
		return err
	})
	return rules
}

// comment returns what a rule says.
func comment(r *nftables.Rule) string {
	says, _ := userdata.GetString(r.UserData, userdata.TypeComment)
	return says
}

// change replaces the table, at one stroke, by one with what add adds.
func (g *gate) change(add func(*nftables.Conn)) error {
	return g.batch(func(conn *nftables.Conn) {
		conn.AddTable(g.table) // so that it can be deleted
		conn.DelTable(g.table)
		if add != nil {
			conn.AddTable(g.table)
			add(conn)
		}
	})
}

// batch changes the rules at one stroke.
func (g *gate) batch(change func(*nftables.Conn)) error {
	return g.space.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
		// Without nf_tables, or while it is being loaded, the kernel answers a batch
		// once (nfnetlink.c, nfnetlink_rcv_batch), and the library waits for an answer
		// to each message.
		if _, err := conn.ListTablesOfFamily(g.table.Family); err != nil {
			return fmt.Errorf("no nftables: load nf_tables, and let wgroam have CAP_NET_ADMIN: %w", err)
		}
		change(conn)
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
		return nil
	})
}

// watch calls wake after rules of whatever table have changed, as when another tool
// loads a ruleset, and once at the start, until ctx ends.
func (g *gate) watch(ctx context.Context, wake func()) error {
	monitor := nftables.NewMonitor(nftables.WithMonitorEventBuffer(16))
	var changes <-chan *nftables.MonitorEvents
	err := g.space.Do(func() error {
		conn, err := nftables.New()
		if err == nil {
			changes, err = conn.AddGenerationalMonitor(monitor)
		}
		return err
	})
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = monitor.Close() })
	defer stop()
	wake()
	for c := range changes { // closed after an error as well
		err = errors.Join(err, c.GeneratedBy.Error)
		wake()
	}
	return err
}

// remove takes the gate away.
func (g *gate) remove() error { return g.change(nil) }

// shut lets nothing of WireGuard in or out, nor anything into the tunnel: that would
// begin a handshake, in vain, and WireGuard begins no other with the peer for the
// next 5 seconds (send.c, wg_packet_send_handshake_initiation: REKEY_TIMEOUT).
func (g *gate) shut(ports ...int) error {
	return g.change(func(conn *nftables.Conn) {
		for _, way := range []struct {
			name   string
			hook   *nftables.ChainHook
			offset uint32 // of the port in the UDP header
		}{{"out", nftables.ChainHookOutput, 0}, {"in", nftables.ChainHookInput, 2}} {
			chain := g.chain(conn, way.name, way.hook)
			for _, port := range ports {
				if way.name == "in" {
					g.count(conn, chain, port)
				}
				conn.AddRule(&nftables.Rule{
					Table: g.table, Chain: chain,
					Exprs:    append(udpPort(way.offset, port), &expr.Verdict{Kind: expr.VerdictDrop}),
					UserData: userdata.AppendString(nil, userdata.TypeComment, shut(ports...)),
				})
			}
		}
		// What is forwarded as well as what is sent here.
		conn.AddRule(&nftables.Rule{
			Table: g.table, Chain: g.chain(conn, "tunnel", nftables.ChainHookPostrouting),
			Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte(g.device), 0)},
				&expr.Verdict{Kind: expr.VerdictDrop},
			},
		})
	})
}

// talk marks the rules that count what peers say to a port that is shut.
const talk = "wgroam: what peers say here"

// count counts what looks like a handshake's beginning or like data, and comes in
// (messages.h, MESSAGE_HANDSHAKE_INITIATION and MESSAGE_DATA).
func (g *gate) count(conn *nftables.Conn, chain *nftables.Chain, port int) {
	for _, kind := range []byte{1, 4} {
		conn.AddRule(&nftables.Rule{
			Table: g.table, Chain: chain,
			Exprs: append(udpPort(2, port),
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 8, Len: 4},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{kind, 0, 0, 0}},
				&expr.Counter{}),
			UserData: userdata.AppendString(nil, userdata.TypeComment, talk),
		})
	}
}

// heard returns how many such packets have come since the gate was shut.
func (g *gate) heard() (packets uint64) {
	for _, r := range g.rules("in") {
		if comment(r) != talk {
			continue
		}
		for _, e := range r.Exprs {
			if c, ok := e.(*expr.Counter); ok {
				packets += c.Packets
			}
		}
	}
	return packets
}

// from gives all that WireGuard sends one of the addresses as its source, whatever
// the routes say: the first of its family, unless it has another of them. An
// endpoint that was set by netlink has no source, and one that a handshake was
// retried for loses it (timers.c, wg_expired_retransmit_handshake).
func (g *gate) from(vips []netip.Addr, port int) error {
	return g.change(func(conn *nftables.Conn) {
		chain := g.chain(conn, "out", nftables.ChainHookOutput)
		for _, exprs := range rewrites(vips, port) {
			conn.AddRule(&nftables.Rule{
				Table: g.table, Chain: chain, Exprs: exprs,
				UserData: userdata.AppendString(nil, userdata.TypeComment, from(vips, port)),
			})
		}
	})
}

// open makes a gate that is shut pass what from does, or all, where there are no vips.
// It is for the moment in which clients wait: from and remove take something out of the
// kernel's rules, which waits until no processor can be using it (synchronize_rcu, 10 ms and
// more), and this does not. One of them has to follow.
func (g *gate) open(vips []netip.Addr, port int) error {
	return g.batch(func(conn *nftables.Conn) {
		says := userdata.AppendString(nil, userdata.TypeComment, opened)
		for _, way := range []struct {
			name  string
			rules [][]expr.Any
		}{
			{"out", append(rewrites(vips, port), udpPort(0, port))},
			{"in", [][]expr.Any{udpPort(2, port)}},
			{"tunnel", [][]expr.Any{nil}},
		} {
			chain := &nftables.Chain{Name: way.name, Table: g.table}
			last := len(way.rules) - 1
			way.rules[last] = append(way.rules[last], &expr.Verdict{Kind: expr.VerdictAccept})
			for _, exprs := range slices.Backward(way.rules) { // each comes before all others
				conn.InsertRule(&nftables.Rule{Table: g.table, Chain: chain, Exprs: exprs, UserData: says})
			}
		}
	})
}

// rewrites are the rules that write the source of what leaves a port.
func rewrites(vips []netip.Addr, port int) (out [][]expr.Any) {
	for _, family := range []struct {
		is          func(netip.Addr) bool
		proto       byte
		offset, len uint32 // of the source in the IP header
		sum         uint32 // of the checksum there
	}{
		{netip.Addr.Is4, unix.NFPROTO_IPV4, 12, 4, 10},
		// There is none, but the library does not ask for the one of UDP then. So
		// it is the source itself, which is written last (nft_payload.c,
		// nft_payload_set_eval).
		{netip.Addr.Is6, unix.NFPROTO_IPV6, 8, 16, 8},
	} {
		exprs := append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family.proto}},
		}, udpPort(0, port)...)
		source := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: family.offset, Len: family.len}
		var first []byte
		for _, vip := range vips {
			if family.is(vip) {
				exprs = append(exprs, source, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: vip.AsSlice()})
				if first == nil {
					first = vip.AsSlice()
				}
			}
		}
		if first == nil {
			continue
		}
		out = append(out, append(exprs,
			&expr.Immediate{Register: 1, Data: first},
			&expr.Payload{
				OperationType: expr.PayloadWrite, SourceRegister: 1, Base: source.Base, Offset: source.Offset, Len: source.Len,
				// And that of UDP, which covers the address.
				CsumType: expr.CsumTypeInet, CsumOffset: family.sum, CsumFlags: unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR,
			}))
	}
	return out
}

// chain is at a hook before connection tracking, which then sees the address that answers
// go to.
func (g *gate) chain(conn *nftables.Conn, name string, hook *nftables.ChainHook) *nftables.Chain {
	return conn.AddChain(&nftables.Chain{
		Name: name, Table: g.table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRaw,
	})
}

// udpPort matches a port at an offset of the UDP header.
func udpPort(offset uint32, port int) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, uint16(port))},
	}
}
