package redistest

import (
	"bytes"
	"net"
	"sync"
	"testing"
	"time"
)

// Proxy is a TCP proxy in this process whose way to its target can be broken
// and healed. One fault is in force at a time: setting another replaces it, at
// once, for open connections as for new ones. Safe for concurrent use.
type Proxy struct {
	target string
	ln     net.Listener
	wg     sync.WaitGroup

	mu    sync.Mutex
	fault fault
	delay time.Duration
	links map[*link]struct{}
}

type fault uint8

const (
	healthy fault = iota
	cut
	blackHole
	dropReplies
)

// NewProxy starts a proxy to target that lives until the test ends.
func NewProxy(tb testing.TB, target string) *Proxy {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // returns at once
	if err != nil {
		tb.Fatalf("redistest: start proxy: %v", err)
	}
	p := &Proxy{target: target, ln: ln, links: map[*link]struct{}{}}
	p.wg.Go(p.accept)
	tb.Cleanup(func() {
		_ = ln.Close()
		p.Cut() // what is accepted from here on is closed at once
		p.wg.Wait()
	})
	return p
}

// Addr returns host:port.
func (p *Proxy) Addr() string { return p.ln.Addr().String() }

// Cut closes every connection and each new one right after it was accepted.
// New ones are not refused outright, because giving up the port could lose it;
// for that, stop the [Server].
func (p *Proxy) Cut() { p.set(cut, 0, func(*link) bool { return true }) }

// BlackHole accepts connections and swallows what is sent either way, the end
// of a connection included.
func (p *Proxy) BlackHole() { p.set(blackHole, 0, nil) }

// DropReplies lets requests pass and swallows what comes back, so commands are
// executed and their senders never know.
func (p *Proxy) DropReplies() { p.set(dropReplies, 0, nil) }

// Delay holds everything back for d in each direction, in order.
func (p *Proxy) Delay(d time.Duration) { p.set(healthy, d, nil) }

// Heal ends all faults. Connections from which something was swallowed are
// closed, as a byte stream cannot go on with a hole in it; others live on.
func (p *Proxy) Heal() { p.set(healthy, 0, func(l *link) bool { return l.holed }) }

func (p *Proxy) set(f fault, d time.Duration, doomed func(*link) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault, p.delay = f, d
	for l := range p.links {
		if doomed != nil && doomed(l) {
			l.close()
		}
	}
}

// link is one connection through the proxy.
type link struct {
	client, server net.Conn
	holed          bool // something was swallowed; guarded by Proxy.mu
	once           sync.Once
	done           chan struct{}
}

func (l *link) close() {
	l.once.Do(func() {
		close(l.done)
		_ = l.client.Close()
		_ = l.server.Close()
	})
}

func (p *Proxy) accept() {
	for {
		client, err := p.ln.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.connect(client) })
	}
}

func (p *Proxy) connect(client net.Conn) {
	server, err := net.DialTimeout("tcp", p.target, time.Second) //nolint:noctx // bounded
	if err != nil {
		_ = client.Close()
		return
	}
	l := &link{client: client, server: server, done: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == cut {
		l.close()
		return
	}
	p.links[l] = struct{}{}
	p.wg.Go(func() { p.pump(l, server, client, false) })
	p.wg.Go(func() { p.pump(l, client, server, true) })
	p.wg.Go(func() {
		<-l.done
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.links, l)
	})
}

// parcel is what one read brought, and when it may go on.
type parcel struct {
	data []byte
	due  time.Time
}

// pump carries one direction of l. Reading and delivering are apart, so that a
// delay is a latency and does not slow the stream down.
func (p *Proxy) pump(l *link, dst, src net.Conn, replies bool) {
	parcels := make(chan parcel, 1024)
	p.wg.Go(func() { deliver(l, dst, parcels) })
	defer close(parcels)
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		pass, delay := p.judge(l, replies)
		if n > 0 && pass {
			select {
			case parcels <- parcel{bytes.Clone(buf[:n]), time.Now().Add(delay)}:
			case <-l.done:
				return
			}
		}
		if err != nil && !pass {
			<-l.done // the other side must not see this one's end
		}
		if err != nil {
			return
		}
	}
}

// deliver writes parcels when they are due and closes l after the last one.
func deliver(l *link, dst net.Conn, parcels <-chan parcel) {
	defer l.close()
	for pc := range parcels {
		select {
		case <-time.After(time.Until(pc.due)):
		case <-l.done:
			return
		}
		if _, err := dst.Write(pc.data); err != nil {
			return
		}
	}
}

// judge decides about what was just read in one direction of l.
func (p *Proxy) judge(l *link, replies bool) (pass bool, delay time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == blackHole || p.fault == dropReplies && replies {
		l.holed = true
		return false, 0
	}
	return true, p.delay
}
