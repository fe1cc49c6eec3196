package linearizable_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/redistest"
)

// fault is what happens to a script on its way.
type fault int

const (
	none        fault = iota
	requestLost       // it is never run
	replyLost         // it is run, and the sender does not know
	requestLate       // the sender is told that it is lost, and some time later it is run
)

// way leads to Redis. Of every so many scripts one meets a fault, in turns: how many do
// is a matter of how many are sent, not of luck.
type way struct {
	every    int64
	sent     atomic.Int64
	met      [requestLate + 1]atomic.Int64
	underway sync.WaitGroup
}

// client returns a client that takes the way, and sends a command again after a fault
// as often as retries says; -1 is never.
func (w *way) client(server *redistest.Server, retries int) *redis.Client {
	return server.Client(func(o *redis.Options) {
		o.MaxRetries, o.MinRetryBackoff, o.MaxRetryBackoff = retries, -1, -1
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			return &wire{Conn: c, way: w}, err
		}
	})
}

// wire is a connection on the way. Its client sends a request when the last one was
// answered.
type wire struct {
	net.Conn
	way   *way
	fault fault // that the request under way meets
}

func (w *wire) Write(b []byte) (int, error) {
	w.fault = none
	if !bytes.Contains(b, []byte("\r\neval")) {
		return w.Conn.Write(b)
	}
	if n := w.way.sent.Add(1); n%w.way.every == 0 {
		w.fault = fault(1 + n/w.way.every%int64(requestLate))
	}
	w.way.met[w.fault].Add(1)
	if w.fault == requestLate {
		late := bytes.Clone(b)
		w.way.underway.Go(func() { w.deliver(late) })
	}
	if w.fault == requestLost || w.fault == requestLate {
		return 0, io.EOF
	}
	return w.Conn.Write(b)
}

// deliver sends a request after others have overtaken it, if there are any.
func (w *wire) deliver(b []byte) {
	defer w.Conn.Close()
	n := w.way.sent.Load() + w.way.every
	for start := time.Now(); w.way.sent.Load() < n && time.Since(start) < 10*time.Millisecond; {
		time.Sleep(100 * time.Microsecond)
	}
	_ = w.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := w.Conn.Write(b); err == nil {
		_, _ = w.Conn.Read(make([]byte, 1))
	}
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err == nil && w.fault == replyLost {
		_ = w.Conn.Close()
		return 0, io.EOF
	}
	return n, err
}

func (w *wire) Close() error {
	if w.fault == requestLate {
		return nil // the request is still under way
	}
	return w.Conn.Close()
}
