// SPDX-License-Identifier: MIT

package lab

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// RouteVIP makes the lab one with anycast: all gateways have the virtual IP, on their
// loopback, and the source of what they send is that; the router has a route to the
// one that is given. MoveVIP does not take it back.
func (l *Lab) RouteVIP(to *Gateway) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, g := range l.Gateways {
		// A route goes with the last link that has the source which it prefers, so the
		// loopback comes first.
		err := errors.Join(g.ns.addAddr("lo", host(VIP4)), g.ns.addAddr("lo", host(VIP6)))
		if err == nil {
			err = errors.Join(
				g.ns.delAddr(lanDev, host(VIP4)),
				g.ns.delAddr(lanDev, host(VIP6)),
				g.prefer(VIP4, VIP6),
			)
		}
		if err != nil {
			return fmt.Errorf("give the virtual IP to gateway %s: %w", g.Name, err)
		}
	}
	return errors.Join(
		l.router.nl.RouteReplace(&netlink.Route{Dst: ipNet(host(VIP4)), Gw: to.Addr4.AsSlice()}),
		l.router.nl.RouteReplace(&netlink.Route{Dst: ipNet(host(VIP6)), Gw: to.Addr6.AsSlice()}),
	)
}

// Remote reads where the client's device has the gateway.
func (c *Client) Remote() (netip.AddrPort, error) {
	d, err := c.lab.clients.wg.Device(c.dev.name)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("client %d: read %s: %w", c.n, c.dev.name, err)
	}
	at := d.Peers[0].Endpoint.AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port()), nil
}
