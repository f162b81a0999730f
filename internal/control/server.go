// SPDX-License-Identifier: MIT

// Package control is the unix socket between the daemon and the verbs that ask
// it something, or tell it: status, peers, watch, role and handover.
//
// A client sends one line, {"verb":"status"}. The answer to status, and to elect, which
// keepalived's script asks, is a Status, to peers a Peers: one JSON document on one line, after which the
// server closes. {"verb":"role","role":"active"} gives the verb's word on the role
// of all devices that listen to it, or of {"device":"wg0"} alone, and the answer is
// the Status after that; the role auto takes the word back. The answer to
// {"verb":"handover"}, which may name a device, and with "to" a node, is a line per
// HandoverStep; the last one is done or failed. The answer to watch is a line per Event until either side
// closes, and with "promotions":true one per Progress as well; a Missed stands where the client was too slow, and a Missed of 0
// comes first, to say that the client hears of everything from then on. An
// answer {"error":"..."} says why there is no other.
//
// The socket has mode 0600. Whoever can connect to it may ask everything.
package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The verbs.
const (
	VerbStatus = "status"
	VerbPeers  = "peers"
	VerbCheck  = "check"
	VerbWatch  = "watch"
	VerbRole   = "role"
	VerbElect  = "elect"

	VerbHandover = "handover"
)

const (
	maxRequest     = 4096            // bytes, with the newline
	requestTimeout = 5 * time.Second // for the request to arrive
	answerTimeout  = 30 * time.Second
)

// ErrInUse is what Listen wraps when another process listens on the socket.
var ErrInUse = errors.New("socket in use")

// Handler answers the clients. All its fields are required; the functions are
// called concurrently.
type Handler struct {
	Status func() Status
	// Elect is Status for keepalived's script, which asks for a device, or for all if that
	// is empty.
	Elect func(device string) Status
	Peers func() []Peer
	// Check may take seconds; it ends early with ctx.
	Check  func(ctx context.Context) []Finding
	Events *Hub
	// SetRole gives the verb's word: active, standby, or auto to take it back. The
	// device is empty for all whose role is not fixed.
	SetRole func(device, role string) error
	// Handover hands the role of a device over to a node, each empty where there is
	// only one, and tells each step, to the last. The error is of a request that makes
	// no sense.
	Handover func(ctx context.Context, device, to string, tell func(HandoverStep)) error
}

// Server is a control socket.
type Server struct {
	listener *net.UnixListener
	lock     *os.File
	handler  Handler
}

// Listen creates the socket at path, with mode 0600, and its directory, with
// mode 0755, if that is missing. The socket of a dead daemon is replaced; the
// error wraps ErrInUse when a process listens on it.
//
// Beside the socket stays an empty file, path.lock: it decides between two
// daemons that start at the same moment.
func Listen(path string, h Handler) (_ *Server, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("control socket %s: %w", path, err)
		}
	}()
	// sun_path has 108 bytes, one of which is the terminating zero.
	if len(path) > 107 {
		return nil, errors.New("the path is longer than 107 bytes: choose a shorter one with [control] socket")
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	locked := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	stale, err := probe(path)
	switch {
	case err != nil:
		return nil, err
	case locked != nil:
		return nil, fmt.Errorf("%w: another wgroam is starting or stopping here", ErrInUse)
	case stale:
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		// A bound socket takes the mode of its inode, less the umask
		// (net/unix/af_unix.c, unix_bind_bsd), so that there is no moment at
		// which somebody else can connect.
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return &Server{listener: l.(*net.UnixListener), lock: lock, handler: h}, nil
}

// probe reports whether there is a socket at path on which nobody listens. It
// returns an error if somebody does, or might.
func probe(path string) (stale bool, err error) {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return false, errors.New("there is a file that is not a socket: remove it, or choose another path with [control] socket")
	}
	c, err := net.Dial("unix", path)
	switch {
	case err == nil:
		defer c.Close()
		return false, fmt.Errorf("%w: another wgroam runs on this socket (pid %s): stop it, or choose another path with [control] socket",
			ErrInUse, listenerPID(c.(*net.UnixConn)))
	case errors.Is(err, unix.ECONNREFUSED):
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, nil // It was being closed.
	}
	return false, err // A full backlog, for one, is a listener.
}

// listenerPID returns the process id of the other side. A connecting client
// gets the credentials of whoever called listen (net/unix/af_unix.c,
// unix_listen).
func listenerPID(c *net.UnixConn) string {
	pid := "unknown"
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && cred.Pid > 0 {
				pid = fmt.Sprint(cred.Pid)
			}
		})
	}
	return pid
}

// Close removes the socket. It is for a Server that never came to serve: Serve
// closes when it returns.
func (s *Server) Close() error {
	// In this order: who gets the lock finds no socket that is about to vanish.
	return errors.Join(s.listener.Close(), s.lock.Close())
}

// Serve answers clients until ctx is done, then disconnects them, removes the
// socket and returns nil.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer s.Close()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { s.listener.Close() })
	defer stop()
	for {
		c, err := s.listener.Accept()
		switch {
		case err == nil:
			clients.Go(func() { s.answer(ctx, c) })
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOBUFS),
			errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ECONNABORTED):
			select { // The shortage may pass; do not spin until it does.
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		default:
			return fmt.Errorf("control socket: %w", err)
		}
	}
}

// answer serves one client. Errors in talking to it end the conversation, and
// are of no interest to anybody else.
func (s *Server) answer(ctx context.Context, c net.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()

	_ = c.SetDeadline(time.Now().Add(requestTimeout))
	req, err := readRequest(c)
	_ = c.SetDeadline(time.Now().Add(answerTimeout))
	switch {
	case err != nil:
		_ = encode(c, failure{err.Error()})
	case req.Verb != VerbWatch && req.Promotions:
		_ = encode(c, failure{fmt.Sprintf("the verb %q does not take promotions", req.Verb)})
	case req.Verb != VerbHandover && req.To != "":
		_ = encode(c, failure{fmt.Sprintf("the verb %q does not take to", req.Verb)})
	case req.Verb == VerbHandover && req.Role == "":
		_ = c.SetDeadline(time.Time{}) // it takes as long as the virtual IP does
		s.handover(ctx, c, req)
	case req.Verb == VerbElect && req.Role == "":
		_ = encode(c, s.handler.Elect(req.Device).settle())
	case req.Verb != VerbRole && (req.Role != "" || req.Device != ""):
		_ = encode(c, failure{fmt.Sprintf("the verb %q takes neither role nor device", req.Verb)})
	case req.Verb == VerbRole:
		if err := s.handler.SetRole(req.Device, req.Role); err != nil {
			_ = encode(c, failure{err.Error()})
			return
		}
		_ = encode(c, s.handler.Status().settle())
	case req.Verb == VerbStatus:
		_ = encode(c, s.handler.Status().settle())
	case req.Verb == VerbPeers:
		_ = encode(c, settlePeers(s.handler.Peers()))
	case req.Verb == VerbCheck:
		_ = encode(c, NewCheck(s.handler.Check(ctx)))
	case req.Verb == VerbWatch:
		// A client may stop reading for as long as it likes (a pager does):
		// its queue is bounded, and nobody waits for it.
		_ = c.SetDeadline(time.Time{})
		s.watch(ctx, c, req.Promotions)
	default:
		_ = encode(c, failure{fmt.Sprintf("this daemon does not know the verb %q", req.Verb)})
	}
}

type request struct {
	Verb   string `json:"verb"`
	Role   string `json:"role,omitempty"`
	Device string `json:"device,omitempty"`
	To     string `json:"to,omitempty"`
	// Promotions: a client that knows nothing but events takes no other lines.
	Promotions bool `json:"promotions,omitempty"`
}

type failure struct {
	Error string `json:"error"`
}

// readRequest reads one line.
func readRequest(r io.Reader) (request, error) {
	line, err := bufio.NewReaderSize(r, maxRequest).ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return request{}, fmt.Errorf("the request is longer than %d bytes", maxRequest)
	case errors.Is(err, io.EOF) && len(line) > 0:
		// A last line needs no newline.
	case err != nil:
		return request{}, fmt.Errorf("no request: %w", err)
	}
	var req request
	// What this daemon does not understand it must not ignore.
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&req); err != nil {
		return request{}, fmt.Errorf(`malformed request, want {"verb":"status"}: %w`, err)
	}
	if d.InputOffset() != int64(len(bytes.TrimRight(line, " \t\r\n"))) {
		return request{}, errors.New("malformed request: more than one JSON value on the line")
	}
	return req, nil
}

// handover goes on also where the client does not hear of it any more.
func (s *Server) handover(ctx context.Context, c net.Conn, req request) {
	var (
		mu    sync.Mutex
		ended bool
	)
	tell := func(h HandoverStep) {
		mu.Lock()
		defer mu.Unlock()
		if !ended {
			_ = encode(c, h)
		}
	}
	if err := s.handler.Handover(ctx, req.Device, req.To, tell); err != nil {
		mu.Lock()
		defer mu.Unlock()
		_ = encode(c, failure{err.Error()})
		return
	}
	mu.Lock()
	defer mu.Unlock()
	ended = true
}

func (s *Server) watch(ctx context.Context, c net.Conn, promotions bool) {
	r := s.handler.Events.subscribe(promotions)
	defer s.handler.Events.unsubscribe(r)

	// The client has nothing more to say: whatever comes, its end or words, is
	// the end of the conversation.
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = c.Read(make([]byte, 1))
		c.Close() // frees a writer that waits for the client to read
	}()
	defer func() {
		c.Close()
		<-gone
	}()

	w := bufio.NewWriter(c)
	_ = encode(w, Missed{0})
	for {
		if w.Flush() != nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-gone:
			return
		case <-r.ready:
		}
		lines, missed := r.take()
		for _, line := range lines {
			if encode(w, line) != nil {
				return
			}
		}
		if missed > 0 && encode(w, Missed{missed}) != nil {
			return
		}
	}
}

// encode writes v and a newline.
func encode(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false) // errors quote <, > and &
	return e.Encode(v)
}
