// SPDX-License-Identifier: MIT

package lab

import (
	"context"
	"fmt"
	"net"
	"time"
)

// Stream is UDP traffic through the tunnel from a client to a gateway.
type Stream struct {
	tx net.Conn
	rx *net.UDPConn
}

// streamWindow is how many batches of datagrams are under way at most: so few that
// none is dropped, and so many that the processors are busy with those that
// count.
const (
	streamBatch  = 8
	streamWindow = 8
)

// streamWait bounds the wait for a batch of datagrams.
const streamWait = 30 * time.Second

// NewStream opens a stream from a client to a gateway. The caller closes it.
func NewStream(ctx context.Context, from *Client, to *Gateway) (*Stream, error) {
	s := &Stream{}
	err := to.Do(func() (err error) {
		s.rx, err = net.ListenUDP("udp4", nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("gateway %s: %w", to.Name, err)
	}
	// For the whole window, whatever its size.
	if err = s.rx.SetReadBuffer(1 << 20); err == nil {
		s.tx, err = from.Dial(ctx, "udp4", s.rx.LocalAddr().(*net.UDPAddr).Port)
	}
	if err != nil {
		s.rx.Close()
		return nil, err
	}
	return s, nil
}

// Close ends the stream.
func (s *Stream) Close() {
	s.tx.Close()
	s.rx.Close()
}

// Push sends n datagrams of size bytes and returns how long that took until the
// last was received.
func (s *Stream) Push(n, size int) (time.Duration, error) {
	free := make(chan struct{}, streamWindow)
	sent, stop := make(chan error, 1), make(chan struct{})
	defer close(stop)
	start := time.Now()
	go func() {
		buf := make([]byte, size)
		for i := range n {
			if i%streamBatch == 0 {
				select {
				case free <- struct{}{}:
				case <-stop:
					return
				}
			}
			if _, err := s.tx.Write(buf); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	buf := make([]byte, size)
	for i := range n {
		if i%streamBatch == 0 {
			if err := s.rx.SetReadDeadline(time.Now().Add(streamWait)); err != nil {
				return 0, err
			}
		}
		if _, _, err := s.rx.ReadFrom(buf); err != nil {
			return 0, fmt.Errorf("datagram %d of %d: %w", i, n, err)
		}
		if i%streamBatch == streamBatch-1 {
			<-free
		}
	}
	took := time.Since(start)
	return took, <-sent
}
