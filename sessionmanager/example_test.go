package sessionmanager_test

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/exampletest"
	"github.com/sessionlock/sessionlock/sessionmanager"
)

// Printer is a worker: what it can do, and how it ends.
type Printer struct {
	id     string
	broken error
	Events *sessionmanager.Fanout[string]
}

func StartPrinter(_ context.Context, id string) (*Printer, error) {
	events, err := sessionmanager.NewFanout[string](100, 10)
	return &Printer{id: id, Events: events}, err
}

func (p *Printer) Print(_ context.Context, page string) (jobs int, err error) {
	p.Events.Publish("printed " + page)
	return 1, nil
}

func (p *Printer) Shutdown(context.Context) error {
	p.Events.Close(nil)
	return nil
}

func (p *Printer) Kill(reason string) error {
	if reason != sessionmanager.ReasonNotOpen { // nobody has seen it
		p.Events.Close(errors.New("killed"))
	}
	return nil
}

func (p *Printer) Err() error { return p.broken }

// Courier is a worker that may die by itself, as a process does.
type Courier struct {
	Printer
	died chan struct{}
}

func (c *Courier) Done() <-chan struct{} { return c.died }

func ExampleMortal() {
	var _ sessionmanager.Mortal = (*Courier)(nil) // or a method of another form would go unnoticed
	ctx := context.Background()
	manager, err := sessionmanager.New[*Courier]()
	if err != nil {
		panic(err)
	}
	courier := &Courier{died: make(chan struct{})}
	start := func(context.Context, string) (_ *Courier, err error) {
		courier.Events, err = sessionmanager.NewFanout[string](1, 0)
		return courier, err
	}
	session, err := manager.Open(ctx, sessionmanager.Spec{ID: "7"}, start)
	if err != nil {
		panic(err)
	}
	_, err = manager.Open(ctx, sessionmanager.Spec{ID: "7"}, start)
	fmt.Println(errors.Is(err, sessionmanager.ErrTaken))

	close(courier.died) // nobody calls it just now
	for session.State() == sessionmanager.StateReady {
		time.Sleep(time.Millisecond)
	}
	fmt.Println(errors.Is(session.Err(), sessionmanager.ErrFaulted))
	// Output:
	// true
	// true
}

func printers(opts ...sessionmanager.Option) *sessionmanager.Manager[*Printer] {
	m, err := sessionmanager.New[*Printer](opts...)
	if err != nil {
		panic(err)
	}
	return m
}

func mustOpen(m *sessionmanager.Manager[*Printer], spec sessionmanager.Spec) *sessionmanager.Session[*Printer] {
	s, err := m.Open(context.Background(), spec, StartPrinter)
	if err != nil {
		panic(err)
	}
	return s
}

// A gateway: one request opens a session, later ones use it.
func Example() {
	manager, err := sessionmanager.New[*Printer](
		sessionmanager.WithMax(200),
		sessionmanager.WithLease(15*time.Minute),
		sessionmanager.WithCallTimeout(time.Minute),
	)
	if err != nil {
		panic(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	go manager.Run(ctx) //nolint:errcheck // it says why it ended

	session, err := manager.Open(ctx, sessionmanager.Spec{Owner: "ann", Name: "laptop"}, StartPrinter)
	fmt.Println(session.State(), err)
	id := session.ID() // goes to the client

	session, err = manager.Get(id, "ann") // the owner as this request authenticated
	fmt.Println(session.Owner(), err)
	jobs, err := sessionmanager.Call(ctx, session, func(ctx context.Context, p *Printer) (int, error) {
		return p.Print(ctx, "page 1")
	})
	fmt.Println(jobs, err)

	stop()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	fmt.Println(manager.Shutdown(ctx), session.State())
	// Output:
	// ready <nil>
	// ann <nil>
	// 1 <nil>
	// <nil> closed
}

func ExampleManager_Open() {
	ctx := context.Background()
	manager := printers(sessionmanager.WithMax(1), sessionmanager.WithStartTimeout(5*time.Second))
	defer manager.Shutdown(ctx) //nolint:errcheck // nothing is open

	_, err := manager.Open(ctx, sessionmanager.Spec{}, func(context.Context, string) (*Printer, error) {
		return nil, errors.New("no paper")
	})
	fmt.Println(errors.Is(err, sessionmanager.ErrOpen), manager.Stats().Sessions)

	session, err := manager.Open(ctx, sessionmanager.Spec{
		ID:      "printer-7", // named by somebody else
		Timeout: 2 * time.Minute,
	}, StartPrinter)
	fmt.Println(session.ID(), session.Name() == "client-"+manager.LogID("printer-7"), err)

	_, err = manager.Open(ctx, sessionmanager.Spec{}, StartPrinter)
	fmt.Println(errors.Is(err, sessionmanager.ErrLimit), err != nil)
	// Output:
	// true 0
	// printer-7 true <nil>
	// true true
}

func ExampleSession_Do() {
	ctx := context.Background()
	manager := printers(sessionmanager.WithPending(1))
	defer manager.Shutdown(ctx) //nolint:errcheck // nothing is open
	session := mustOpen(manager, sessionmanager.Spec{})
	jammed := errors.New("paper jam")
	err := session.Do(ctx, func(ctx context.Context, p *Printer) error {
		busy := session.Do(ctx, func(context.Context, *Printer) error { return nil })
		fmt.Println(errors.Is(busy, sessionmanager.ErrBusy))
		return jammed
	})
	fmt.Println(err, session.State()) // as it is: the printer lives

	err = session.Do(ctx, func(context.Context, *Printer) error { panic("on fire") })
	var panicked *sessionmanager.PanicError
	fmt.Println(errors.Is(err, sessionmanager.ErrFaulted), errors.As(err, &panicked), session.State())
	fmt.Println(errors.Is(session.Err(), sessionmanager.ErrFaulted))
	// Output:
	// true
	// paper jam ready
	// true true faulted
	// true
}

// pipe is a worker in a process of its own, reached over a socket that is its alone.
type pipe struct {
	conn   net.Conn
	broken atomic.Pointer[error]
}

// startPipe starts a process and waits for it on a socket that no other process and
// no other session has. The nonce shows that it is the one that was started.
func startPipe(ctx context.Context, dir, id string) (*pipe, error) {
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce)
	path := filepath.Join(dir, fmt.Sprintf("%d-%s", os.Getpid(), id[len(id)-8:]))
	listener, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	defer listener.Close() // one client will do
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	go process(path, nonce) // stands for exec.Command, which gets both on its standard input
	conn, err := listener.Accept()
	if err != nil {
		return nil, err
	}
	got := make([]byte, len(nonce))
	_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.ReadFull(conn, got); err != nil || subtle.ConstantTimeCompare(got, nonce) != 1 {
		return nil, errors.Join(errors.New("a stranger"), err, conn.Close())
	}
	_ = conn.SetReadDeadline(time.Time{})
	return &pipe{conn: conn}, nil
}

// process shows its nonce, and repeats what it is told.
func process(path string, nonce []byte) {
	conn, err := net.Dial("unix", path) //nolint:noctx // a process of its own
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = conn.Write(nonce)
	_, _ = io.Copy(conn, conn)
}

func (p *pipe) Ask(ctx context.Context, word string) (string, error) {
	defer context.AfterFunc(ctx, func() { p.conn.Close() })() // after it the pipe is of no use
	answer := make([]byte, len(word))
	_, err := p.conn.Write([]byte(word))
	if err == nil {
		_, err = io.ReadFull(p.conn, answer)
	}
	if err != nil {
		p.broken.Store(&err) // the next one is not lent it
	}
	return string(answer), err
}

func (p *pipe) Shutdown(context.Context) error { return p.conn.Close() }
func (p *pipe) Kill(string) error              { _ = p.conn.Close(); return nil }

func (p *pipe) Err() error {
	if err := p.broken.Load(); err != nil {
		return *err
	}
	return nil
}

// A worker is a process, reached over a socket whose name holds this process's id and
// the session's.
func Example_workerProcess() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "gw")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	manager, err := sessionmanager.New[*pipe]()
	if err != nil {
		panic(err)
	}
	session, err := manager.Open(ctx, sessionmanager.Spec{}, func(ctx context.Context, id string) (*pipe, error) {
		return startPipe(ctx, dir, id)
	})
	if err != nil {
		panic(err)
	}
	ask := func(ctx context.Context, p *pipe) (string, error) { return p.Ask(ctx, "hello") }
	fmt.Println(sessionmanager.Call(ctx, session, ask))

	_ = session.Do(ctx, func(ctx context.Context, p *pipe) error {
		_ = p.conn.Close() // the process crashes
		_, err := ask(ctx, p)
		return err
	})
	fmt.Println(session.State(), session.Close(ctx))
	// Output:
	// hello <nil>
	// faulted <nil>
}

// Somebody listens to what the worker tells, for as long as he likes.
func ExampleSession_Attach() {
	ctx := context.Background()
	manager := printers(sessionmanager.WithListeners(2), sessionmanager.WithGrace(time.Minute))
	session := mustOpen(manager, sessionmanager.Spec{})

	printer, detach, err := session.Attach()
	if err != nil {
		panic(err) // the session is not ready, or has two listeners
	}
	defer detach()
	events := printer.Events.Subscribe(ctx)
	go func() {
		_ = session.Do(ctx, func(ctx context.Context, p *Printer) error {
			_, err := p.Print(ctx, "page 1")
			return err
		})
		_ = session.Close(ctx)
	}()
	for event, err := range events {
		if err != nil {
			break // cut off, killed, or ctx is over
		}
		fmt.Println(event)
	}
	<-session.Done()
	fmt.Println(session.State())
	// Output:
	// printed page 1
	// closed
}

func ExampleFanout() {
	ctx := context.Background()
	events, err := sessionmanager.NewFanout[string](2, 1) // two may wait, one is repeated for who comes later
	if err != nil {
		panic(err)
	}
	slow := events.Subscribe(ctx)
	for _, e := range []string{"one", "two", "three"} {
		events.Publish(e)
	}
	late := events.Subscribe(ctx)
	events.Close(nil)
	for e, err := range slow {
		fmt.Println("slow:", e, errors.Is(err, sessionmanager.ErrLagged))
	}
	for e, err := range late {
		fmt.Println("late:", e, err)
	}
	// Output:
	// slow: one false
	// slow: two false
	// slow:  true
	// late: three <nil>
}

func ExampleSession_Close() {
	ctx := context.Background()
	manager := printers(sessionmanager.WithShutdownTimeout(10*time.Second), sessionmanager.WithKillTimeout(time.Second))
	session := mustOpen(manager, sessionmanager.Spec{})
	fmt.Println(session.Close(ctx), session.Close(ctx))
	_, err := manager.Get(session.ID(), session.Owner())
	fmt.Println(errors.Is(err, sessionmanager.ErrNotFound))
	err = session.Do(ctx, func(context.Context, *Printer) error { return nil })
	fmt.Println(errors.Is(err, sessionmanager.ErrNotReady))
	// Output:
	// <nil> <nil>
	// true
	// true
}

// An operator's page: all sessions, whoever owns them, and a way to end one.
func ExampleManager_All() {
	ctx := context.Background()
	manager := printers()
	mustOpen(manager, sessionmanager.Spec{ID: "a", Owner: "ann"})
	mustOpen(manager, sessionmanager.Spec{ID: "b", Owner: "bob"})
	for session := range manager.All() {
		info := session.Info()
		fmt.Println(session.ID(), session.Owner(), info.State, info.Calls, "calls,", time.Until(info.Ends).Round(time.Minute), "left")
		if session.Owner() == "bob" {
			fmt.Println(session.Kill(ctx, "by order of the admin"))
		}
	}
	st := manager.Stats()
	fmt.Println(st.Open, "open,", st.Closed, "closed")
	// Output:
	// a ann ready 0 calls, 30m0s left
	// b bob ready 0 calls, 30m0s left
	// <nil>
	// 1 open, 1 closed
}

// Without Run: a ticker, or a cron, of one's own.
func ExampleManager_Sweep() {
	ctx := context.Background()
	manager := printers(sessionmanager.WithLease(time.Minute), sessionmanager.WithSweepInterval(10*time.Second), sessionmanager.WithParallel(8))
	mustOpen(manager, sessionmanager.Spec{})
	fmt.Println(manager.Sweep(ctx, time.Now()))
	fmt.Println(manager.Sweep(ctx, time.Now().Add(time.Minute)))
	// Output:
	// 0 <nil>
	// 1 <nil>
}

// The upstream lets an account have two sessions, and there are many processes.
func ExampleWithFleetMax() {
	ctx, server := context.Background(), miniredis.NewMiniRedis()
	if err := server.Start(); err != nil {
		panic(err)
	}
	defer server.Close()
	rdb := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer rdb.Close()

	slots := []sessionmanager.Option{
		sessionmanager.WithFleetMax(rdb, "svc@acme.test", 2),
		sessionmanager.WithSlotTTL(30 * time.Second), sessionmanager.WithOpTimeout(time.Second),
		sessionmanager.WithNamespace("production"), sessionmanager.WithKeySecret([]byte("the same in all processes")),
	}
	one, two := printers(slots...), printers(slots...) // each wants its Run
	mustOpen(one, sessionmanager.Spec{})
	session := mustOpen(two, sessionmanager.Spec{})
	_, err := two.Open(ctx, sessionmanager.Spec{}, StartPrinter)
	fmt.Println(errors.Is(err, sessionmanager.ErrLimit), errors.Is(err, sessionmanager.ErrUnavailable))
	_ = session.Close(ctx)
	_, err = one.Open(ctx, sessionmanager.Spec{}, StartPrinter)
	fmt.Println(err)
	// Output:
	// true false
	// <nil>
}

// counters is an observer as a metrics library has it.
type counters struct {
	mu sync.Mutex // sessions end in goroutines of their own
	of map[string]int
}

func (c *counters) Observe(_ context.Context, e sessionmanager.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch e.Kind {
	case sessionmanager.EventOpened:
		c.of["open"]++
		c.of[e.Kind]++
	case sessionmanager.EventClosed:
		c.of["open"]-- // not e.Open: events may overtake one another
		c.of[e.Kind+" "+e.Reason]++
	case sessionmanager.EventFaulted, sessionmanager.EventRefused, sessionmanager.EventDegraded:
		c.of[e.Kind+" "+string(e.Code)]++
	}
}

func ExampleObserver() {
	ctx, counts := context.Background(), &counters{of: map[string]int{}}
	var observer sessionmanager.Observer = counts
	manager := printers(sessionmanager.WithObserver(observer), sessionmanager.WithLogger(slog.New(slog.DiscardHandler)), sessionmanager.WithMax(1))
	session := mustOpen(manager, sessionmanager.Spec{})
	_, _ = manager.Open(ctx, sessionmanager.Spec{}, StartPrinter)
	_ = session.Close(ctx)
	fmt.Println(counts.of)
	// Output: map[closed client-close:1 open:0 opened:1 refused limit:1]
}

// What to answer, by the code of an error.
func ExampleError() {
	status := map[sessionmanager.Code]int{
		sessionmanager.CodeLimit: 503, sessionmanager.CodeBusy: 429, sessionmanager.CodeNotFound: 404,
		sessionmanager.CodeNotReady: 410, sessionmanager.CodeOpenFailed: 502, sessionmanager.CodeCloseFailed: 500,
		sessionmanager.CodeFaulted: 502, sessionmanager.CodeClosed: 503, sessionmanager.CodeUnavailable: 503,
	}
	answer := func(err error) int {
		var e *sessionmanager.Error
		switch {
		case errors.As(err, &e):
			return status[e.Code]
		case errors.Is(err, sessionmanager.ErrInvalid):
			return 400
		}
		return 500
	}
	ctx := context.Background()
	manager := printers()
	session := mustOpen(manager, sessionmanager.Spec{})
	fmt.Println(answer(session.Kill(ctx, "")))
	fmt.Println(answer(manager.Shutdown(ctx)) == 500, errors.Is(session.Close(ctx), sessionmanager.ErrClose))
	_, err := manager.Open(ctx, sessionmanager.Spec{}, StartPrinter)
	fmt.Println(answer(err), errors.Is(err, sessionmanager.ErrClosed))
	// Output:
	// 400
	// true false
	// 503 true
}

// Which ends are as they should be, and which want somebody to look.
func ExampleEvent() {
	normal := map[string]bool{
		sessionmanager.ReasonClient:   true,
		sessionmanager.ReasonLease:    true,
		sessionmanager.ReasonDetached: true,
		sessionmanager.ReasonShutdown: true,
		sessionmanager.ReasonFaulted:  false,
	}
	manager := printers(sessionmanager.WithObserver(watching(func(e sessionmanager.Event) {
		if e.Kind == sessionmanager.EventClosed {
			fmt.Println(e.Reason, normal[e.Reason])
		}
	})))
	ctx := context.Background()
	fmt.Println(mustOpen(manager, sessionmanager.Spec{}).Close(ctx))
	fmt.Println(mustOpen(manager, sessionmanager.Spec{}).Kill(ctx, "it printed money")) // what Printer.Kill is told, too
	mustOpen(manager, sessionmanager.Spec{})
	fmt.Println(manager.Shutdown(ctx))
	// Output:
	// client-close true
	// <nil>
	// it printed money false
	// <nil>
	// manager-shutdown true
	// <nil>
}

type watching func(sessionmanager.Event)

func (f watching) Observe(_ context.Context, e sessionmanager.Event) { f(e) }

// What a client that asks for its session is told.
func ExampleState() {
	var _ sessionmanager.Worker = (*Printer)(nil)
	status := func(s sessionmanager.State) int {
		switch s {
		case sessionmanager.StateCreating, sessionmanager.StateStarting:
			return 202 // it waits for its slot, or its worker starts
		case sessionmanager.StateReady:
			return 200
		case sessionmanager.StateClosing, sessionmanager.StateClosed, sessionmanager.StateFaulted:
			return 410 // open another one
		}
		return 500
	}
	manager := printers()
	session := mustOpen(manager, sessionmanager.Spec{})
	fmt.Println(status(session.State()))
	fmt.Println(session.Close(context.Background()), status(session.State()))
	// Output:
	// 200
	// <nil> 410
}

func TestExamplesShowEveryExportedName(t *testing.T) {
	exampletest.ReachAll(t, regexp.MustCompile(`^(String|Error|Unwrap)$`))
}
