package redistest

import (
	"net"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// Dial is m.Dial with the send buffer of a real socket: Write never waits for
// the other side.
//
// On the bare pipe of m.Dial, go-redis' PubSub can lock up: it holds a mutex
// while it writes, the server is not reading because it is writing itself, and
// whoever should be reading waits for the mutex. Outside a bubble the write
// timeout ends that; inside, a goroutine waiting for a mutex stops the clock,
// and the test hangs.
func Dial(m *miniredis.Miniredis) (net.Conn, error) {
	c, err := m.Dial()
	if err != nil {
		return nil, err
	}
	s := &socket{Conn: c, more: make(chan struct{}, 1), done: make(chan struct{})}
	go s.flush()
	return s, nil
}

type socket struct {
	net.Conn
	more chan struct{} // something is in buf; capacity 1
	done chan struct{}
	once sync.Once

	mu  sync.Mutex
	buf []byte
	err error // of an earlier write
}

func (s *socket) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	s.buf = append(s.buf, b...)
	select {
	case s.more <- struct{}{}:
	default:
	}
	return len(b), nil
}

func (s *socket) flush() {
	for {
		select {
		case <-s.more:
		case <-s.done:
			return
		}
		s.mu.Lock()
		b := s.buf
		s.buf = nil
		s.mu.Unlock()
		if _, err := s.Conn.Write(b); err != nil {
			s.fail(err)
			return
		}
	}
}

func (s *socket) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// Close drops what is not yet sent.
func (s *socket) Close() error {
	s.fail(net.ErrClosed)
	s.once.Do(func() { close(s.done) })
	return s.Conn.Close()
}

// SetWriteDeadline does nothing: no write waits.
func (s *socket) SetWriteDeadline(time.Time) error { return nil }

func (s *socket) SetDeadline(t time.Time) error { return s.SetReadDeadline(t) }
