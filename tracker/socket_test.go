// SPDX-License-Identifier: MIT

package tracker

import (
	"bytes"
	"fmt"
	"net"
	"testing"
)

const (
	udpTable = `   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  241: 00000000:CA6C 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 29135 2 0000000000000000 0
  242: 0100007F:CA6D 0200007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 29136 2 0000000000000000 0
`
	udp6Table = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  241: 00000000000000000000000000000000:CA6E 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 29138 2 0000000000000000 0
`
)

func TestListed(t *testing.T) {
	for _, test := range []struct {
		table string
		port  uint16
		want  bool
	}{
		{udpTable, 51820, true},
		{udpTable, 51821, false}, // connected: a client of something
		{udpTable, 0, false},
		{udp6Table, 51822, true},
		{udp6Table, 51820, false},
		{"", 51820, false},
	} {
		if got := listed([]byte(test.table), test.port); got != test.want {
			t.Errorf("port %d: %v, want %v", test.port, got, test.want)
		}
	}
}

func TestBound(t *testing.T) {
	for network, address := range map[string]string{"udp4": "127.0.0.1:0", "udp6": "[::1]:0"} {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		port := uint16(c.LocalAddr().(*net.UDPAddr).Port)
		if ok, err := bound(nil, port); !ok || err != nil {
			t.Errorf("%s: %v, %v", network, ok, err)
		}
		c.Close()
		if ok, err := bound(nil, port); ok || err != nil {
			t.Errorf("%s, closed: %v, %v", network, ok, err)
		}
	}
}

// TestBoundEither: one look may miss a socket.
func TestBoundEither(t *testing.T) {
	for _, test := range []struct {
		looks []bool
		want  bool
	}{{[]bool{true}, true}, {[]bool{false, true}, true}, {[]bool{false, false}, false}} {
		n := 0
		got, err := either(func() (bool, error) { n++; return test.looks[n-1], nil })
		if got != test.want || err != nil || n != len(test.looks) {
			t.Errorf("%v: %v, %v after %d looks", test.looks, got, err, n)
		}
	}
}

func FuzzListed(f *testing.F) {
	f.Add([]byte(udpTable), uint16(51820))
	f.Add([]byte(udp6Table), uint16(51822))
	f.Fuzz(func(t *testing.T, table []byte, port uint16) {
		if listed(table, port) && !bytes.Contains(bytes.ToUpper(table), fmt.Appendf(nil, "%X", port)) {
			t.Errorf("finds port %d in %q", port, table)
		}
	})
}
