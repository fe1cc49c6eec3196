package guardtest_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/sessionlock/sessionlock/sessionguard"
	"github.com/sessionlock/sessionlock/sessionguard/guardtest"
)

func TestMemoryStore(t *testing.T) {
	suite := guardtest.StoreTest{
		New: func(*testing.T) sessionguard.Store { return new(sessionguard.MemoryStore) },
		TTL: 50 * time.Millisecond,
	}
	t.Run("real time", suite.Run)
	suite.In = synctest.Test
	t.Run("bubble", suite.Run)
}

var errDown = errors.New("down")

type (
	registration = sessionguard.Registration
	registerFunc = func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error)
	readFunc     = func(ctx context.Context, session string) (registration, error)
	renewFunc    = func(ctx context.Context, session string, ttl time.Duration) (registration, error)
)

// faulty is a right store until one of its funcs, each of which stands for a mistake,
// is set.
type faulty struct {
	mu       sync.Mutex
	right    *sessionguard.MemoryStore
	down     atomic.Bool
	register registerFunc
	current  readFunc
	renew    renewFunc
	watch    func(session string, changed func()) func()
}

func (f *faulty) Register(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
	switch {
	case f.register != nil:
		return f.register(ctx, session, token, floor, ttl)
	case f.down.Load():
		return 0, errDown
	}
	return f.store().Register(ctx, session, token, floor, ttl)
}

func (f *faulty) Current(ctx context.Context, session string) (registration, error) {
	switch {
	case f.current != nil:
		return f.current(ctx, session)
	case f.down.Load():
		return registration{}, errDown
	}
	return f.store().Current(ctx, session)
}

func (f *faulty) Renew(ctx context.Context, session string, ttl time.Duration) (registration, error) {
	switch {
	case f.renew != nil:
		return f.renew(ctx, session, ttl)
	case f.down.Load():
		return registration{}, errDown
	}
	return f.store().Renew(ctx, session, ttl)
}

func (f *faulty) Watch(session string, changed func()) (stop func()) {
	if f.watch != nil {
		return f.watch(session, changed)
	}
	return f.store().Watch(session, changed)
}

func (f *faulty) store() *sessionguard.MemoryStore {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.right
}

func suiteOf(fault func(t *testing.T, f *faulty)) guardtest.StoreTest {
	return guardtest.StoreTest{
		New: func(t *testing.T) sessionguard.Store {
			f := &faulty{right: new(sessionguard.MemoryStore)}
			fault(t, f)
			return f
		},
		Outage: func(_ *testing.T, s sessionguard.Store) { s.(*faulty).down.Store(true) },
		Forget: func(_ *testing.T, s sessionguard.Store) {
			f := s.(*faulty)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.right = new(sessionguard.MemoryStore)
		},
		In: synctest.Test,
	}
}

func TestStoreWithEveryFacePasses(t *testing.T) {
	suiteOf(func(*testing.T, *faulty) {}).Run(t)
}

// blind has no wake-ups.
type blind struct{ sessionguard.Store }

func TestStoreWithoutWakeUpsPasses(t *testing.T) {
	guardtest.StoreTest{
		New: func(*testing.T) sessionguard.Store { return blind{new(sessionguard.MemoryStore)} },
		In:  synctest.Test,
	}.Run(t)
}

func TestStoreTestUsesItsHooks(t *testing.T) {
	var made, second, slept, outages, forgot int
	suite := suiteOf(func(*testing.T, *faulty) { made++ })
	cases := len(guardtest.Cases(suite))
	suite.Second = func(_ *testing.T, s sessionguard.Store) sessionguard.Store { second++; return s }
	suite.Sleep = func(d time.Duration) { slept++; time.Sleep(d) }
	outage, forget := suite.Outage, suite.Forget
	suite.Outage = func(t *testing.T, s sessionguard.Store) { outages++; outage(t, s) }
	suite.Forget = func(t *testing.T, s sessionguard.Store) { forgot++; forget(t, s) }
	suite.Run(t)
	assert.Equal(t, cases, made)
	assert.Equal(t, cases, second)
	assert.Positive(t, slept)
	assert.Equal(t, 2, outages)
	assert.Equal(t, 1, forgot)
	suite.Outage, suite.Forget = nil, nil
	assert.Len(t, guardtest.Cases(suite), cases-2)
}

// Run is seen failing from outside, in a process of its own.
func TestRunFailsItsTest(t *testing.T) {
	const env = "GUARDTEST_BROKEN"
	if os.Getenv(env) != "" {
		suiteOf(func(_ *testing.T, f *faulty) {
			f.current = func(context.Context, string) (registration, error) { return registration{}, nil }
		}).Run(t)
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRunFailsItsTest$", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), env+"=1")
	out, err := cmd.CombinedOutput()
	assert.Error(t, err)
	assert.Contains(t, string(out), "--- FAIL: TestRunFailsItsTest/Outage")
	assert.Contains(t, string(out), "rule: a store that cannot be reached is an error, never nobody")
	assert.NotContains(t, string(out), "--- FAIL: TestRunFailsItsTest/Nobody")
}

// slowly makes the first n registrations take longer than one lives.
func slowly(n int64) func(*testing.T, *faulty) {
	return func(_ *testing.T, f *faulty) {
		var registrations atomic.Int64
		f.register = func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
			if f.down.Load() {
				return 0, errDown
			}
			if registrations.Add(1) <= n {
				time.Sleep(300 * time.Millisecond)
			}
			return f.store().Register(ctx, session, token, floor, ttl)
		}
	}
}

func TestStoreTestForgivesABusyMachine(t *testing.T) {
	suiteOf(slowly(5)).Run(t)
	assert.Contains(t, guardtest.Broken(t, suiteOf(slowly(1000))), "Expiry", "what TTL is too short for")
}

func TestStoreTestCatches(t *testing.T) {
	// registers, reads and renews change what right calls are asked, or answer; an
	// outage stays one.
	registers := func(change func(f *faulty, right registerFunc) registerFunc) func(*testing.T, *faulty) {
		return func(_ *testing.T, f *faulty) {
			changed := change(f, func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				return f.store().Register(ctx, session, token, floor, ttl)
			})
			f.register = func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				if f.down.Load() {
					return 0, errDown
				}
				return changed(ctx, session, token, floor, ttl)
			}
		}
	}
	reads := func(change func(f *faulty, r registration) (registration, error)) func(*testing.T, *faulty) {
		return func(_ *testing.T, f *faulty) {
			f.current = func(ctx context.Context, session string) (registration, error) {
				if f.down.Load() {
					return registration{}, errDown
				}
				r, _ := f.store().Current(ctx, session)
				return change(f, r)
			}
		}
	}
	renews := func(renew func(f *faulty, ctx context.Context, session string, ttl time.Duration) (registration, error)) func(*testing.T, *faulty) {
		return func(_ *testing.T, f *faulty) {
			f.renew = func(ctx context.Context, session string, ttl time.Duration) (registration, error) {
				if f.down.Load() {
					return registration{}, errDown
				}
				return renew(f, ctx, session, ttl)
			}
		}
	}
	// numbered is a store that numbers by next and otherwise does what it is told.
	type numbered struct {
		registration
		expires time.Time
	}
	numbering := func(next func(last registration, known map[string]uint64, session string, floor uint64) uint64) func(*testing.T, *faulty) {
		return func(_ *testing.T, f *faulty) {
			var mu sync.Mutex
			last, known, at := map[string]numbered{}, map[string]uint64{}, f.right
			read := func(session string) registration {
				if f.store() != at { // it has lost its data
					clear(last)
					clear(known)
					at = f.store()
				}
				if r := last[session]; time.Now().Before(r.expires) {
					return r.registration
				}
				return registration{}
			}
			f.register = func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				mu.Lock()
				defer mu.Unlock()
				if f.down.Load() {
					return 0, errDown
				}
				r := read(session)
				if r.Token != token {
					r = registration{Epoch: next(r, known, session, floor), Token: token}
				}
				known[session] = r.Epoch
				last[session] = numbered{r, time.Now().Add(ttl)}
				_, err := f.store().Register(ctx, session, token, floor, ttl) // wakes
				return r.Epoch, err
			}
			f.current = func(_ context.Context, session string) (registration, error) {
				mu.Lock()
				defer mu.Unlock()
				if f.down.Load() {
					return registration{}, errDown
				}
				return read(session), nil
			}
			f.renew = func(_ context.Context, session string, ttl time.Duration) (registration, error) {
				mu.Lock()
				defer mu.Unlock()
				if f.down.Load() {
					return registration{}, errDown
				}
				r := read(session)
				if r != (registration{}) {
					last[session] = numbered{r, time.Now().Add(ttl)}
				}
				return r, nil
			}
		}
	}
	named := func(fold func(string) string) func(*testing.T, *faulty) {
		return func(t *testing.T, f *faulty) {
			registers(func(_ *faulty, right registerFunc) registerFunc {
				return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
					return right(ctx, fold(session), token, floor, ttl)
				}
			})(t, f)
			f.current = func(ctx context.Context, session string) (registration, error) {
				if f.down.Load() {
					return registration{}, errDown
				}
				return f.store().Current(ctx, fold(session))
			}
			f.renew = func(ctx context.Context, session string, ttl time.Duration) (registration, error) {
				if f.down.Load() {
					return registration{}, errDown
				}
				return f.store().Renew(ctx, fold(session), ttl)
			}
		}
	}
	// tokened is a store that takes tokens for one that same does.
	tokened := func(same func(a, b string) bool) func(*testing.T, *faulty) {
		return registers(func(f *faulty, right registerFunc) registerFunc {
			return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				if r, _ := f.store().Current(ctx, session); r.Token != "" && same(r.Token, token) {
					token = r.Token
				}
				return right(ctx, session, token, floor, ttl)
			}
		})
	}
	lives := func(life func(before bool, ttl time.Duration) time.Duration) func(*testing.T, *faulty) {
		return registers(func(f *faulty, right registerFunc) registerFunc {
			return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				r, _ := f.store().Current(ctx, session)
				return right(ctx, session, token, floor, life(r.Token != "", ttl))
			}
		})
	}

	idle := guardtest.Cases(suiteOf(nil)) // cases that have caught nothing
	for name, tt := range map[string]struct {
		fault func(t *testing.T, f *faulty)
		by    string
	}{
		"nobody reported as an error": {reads(func(_ *faulty, r registration) (registration, error) {
			if r == (registration{}) {
				return r, errors.New("no rows in result set")
			}
			return r, nil
		}), "Nobody"},
		"nobody reported with an epoch": {reads(func(_ *faulty, r registration) (registration, error) {
			r.Epoch = max(r.Epoch, 1)
			return r, nil
		}), "Nobody"},
		"a token that is not kept": {reads(func(_ *faulty, r registration) (registration, error) {
			r.Token = ""
			return r, nil
		}), "Register"},
		"a replica that is behind": {func() func(*testing.T, *faulty) {
			return func(t *testing.T, f *faulty) {
				behind := new(sync.Map)
				reads(func(_ *faulty, r registration) (registration, error) { return r, nil })(t, f)
				right := f.current
				f.current = func(ctx context.Context, session string) (registration, error) {
					r, err := right(ctx, session)
					before, _ := behind.Swap(session, r)
					if old, ok := before.(registration); ok && err == nil {
						return old, nil
					}
					return r, err
				}
			}
		}(), "Register"},
		"one epoch for everybody": {numbering(func(_ registration, _ map[string]uint64, _ string, floor uint64) uint64 { return floor + 1 }), "Epochs"},
		"epochs that begin at 0": {numbering(func(_ registration, known map[string]uint64, s string, _ uint64) uint64 {
			known[s]++
			return known[s] - 1
		}), "Epochs"},
		"epochs in nanoseconds": {numbering(func(last registration, _ map[string]uint64, _ string, floor uint64) uint64 {
			return max(uint64(time.Now().UnixNano()), last.Epoch+1, floor+1)
		}), "Epochs"},
		"epochs of the clock alone": {numbering(func(_ registration, _ map[string]uint64, _ string, floor uint64) uint64 {
			return max(uint64(time.Now().UnixMicro()), floor+1)
		}), "Epochs"},
		"a floor that is not looked at": {numbering(func(last registration, _ map[string]uint64, _ string, _ uint64) uint64 {
			return max(uint64(time.Now().UnixMicro()), last.Epoch+1)
		}), "Floor"},
		"a floor that is reached and not passed": {numbering(func(last registration, _ map[string]uint64, _ string, floor uint64) uint64 {
			return max(uint64(time.Now().UnixMicro()), last.Epoch+1, floor)
		}), "Floor"},
		"a counter that expires with the registration": {numbering(func(last registration, _ map[string]uint64, _ string, floor uint64) uint64 {
			return max(last.Epoch, floor) + 1
		}), "AfterExpiry"},
		"a counter that is lost with the data": {numbering(func(_ registration, known map[string]uint64, s string, floor uint64) uint64 {
			return max(known[s], floor) + 1
		}), "Forgotten"},
		"a repeated registration that is a new one": {registers(func(f *faulty, right registerFunc) registerFunc {
			return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				if r, _ := f.store().Current(ctx, session); r.Token == token {
					_, _ = right(ctx, session, "\x00other", floor, ttl)
				}
				return right(ctx, session, token, floor, ttl)
			}
		}), "Repeated"},
		"a repeated registration that does not live on": {registers(func(f *faulty, right registerFunc) registerFunc {
			return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				if r, _ := f.store().Current(ctx, session); r.Token == token {
					return r.Epoch, nil
				}
				return right(ctx, session, token, floor, ttl)
			}
		}), "Repeated"},
		"a token that is known for ever": {registers(func(_ *faulty, right registerFunc) registerFunc {
			var mu sync.Mutex
			known := map[string]uint64{}
			return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				mu.Lock()
				defer mu.Unlock()
				if epoch, ok := known[session+token]; ok {
					return epoch, nil
				}
				epoch, err := right(ctx, session, token, floor, ttl)
				known[session+token] = epoch
				return epoch, err
			}
		}), "Overtaken"},
		"tokens in a folding collation":   {tokened(strings.EqualFold), "Tokens"},
		"tokens compared as prefixes":     {tokened(strings.HasPrefix), "Tokens"},
		"tokens that are padded":          {tokened(func(a, b string) bool { return strings.TrimSpace(a) == strings.TrimSpace(b) }), "Tokens"},
		"sessions in a folding collation": {named(strings.ToUpper), "Sessions"},
		"sessions cut at 63 bytes":        {named(func(s string) string { return s[:min(len(s), 63)] }), "Sessions"},
		"sessions by their hash tag": {named(func(s string) string {
			if i := strings.Index(s, "}"); i > 0 {
				return s[:i]
			}
			return s
		}), "Sessions"},
		"registrations that never expire": {lives(func(bool, time.Duration) time.Duration { return 1000 * time.Hour }), "Expiry"},
		"registrations that live longer where others were": {lives(func(before bool, ttl time.Duration) time.Duration {
			if before {
				return time.Hour
			}
			return ttl
		}), "Replaced"},
		"a renewal that keeps nothing alive": {renews(func(f *faulty, ctx context.Context, session string, _ time.Duration) (registration, error) {
			return f.store().Current(ctx, session)
		}), "Renew"},
		"a renewal that only lengthens": {renews(func(f *faulty, ctx context.Context, session string, _ time.Duration) (registration, error) {
			return f.store().Renew(ctx, session, time.Hour)
		}), "Renew"},
		"a renewal that tells nothing": {renews(func(f *faulty, ctx context.Context, session string, ttl time.Duration) (registration, error) {
			_, err := f.store().Renew(ctx, session, ttl)
			return registration{}, err
		}), "Renew"},
		"a renewal that registers": {renews(func(f *faulty, ctx context.Context, session string, ttl time.Duration) (registration, error) {
			r, err := f.store().Renew(ctx, session, ttl)
			if r == (registration{}) {
				_, err = f.store().Register(ctx, session, "renewed", 0, ttl)
			}
			return r, err
		}), "RenewNobody"},
		"a renewal of the dead": {func(t *testing.T, f *faulty) {
			var mu sync.Mutex
			known := map[string]string{}
			registers(func(_ *faulty, right registerFunc) registerFunc {
				return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
					mu.Lock()
					defer mu.Unlock()
					known[session] = token
					return right(ctx, session, token, floor, ttl)
				}
			})(t, f)
			renews(func(f *faulty, ctx context.Context, session string, ttl time.Duration) (registration, error) {
				mu.Lock()
				defer mu.Unlock()
				r, err := f.store().Renew(ctx, session, ttl)
				if token, ok := known[session]; ok && r == (registration{}) {
					_, err = f.store().Register(ctx, session, token, 0, ttl)
				}
				return r, err
			})(t, f)
		}, "Expiry"},
		"a registration in two steps": {func(t *testing.T, f *faulty) {
			registers(func(f *faulty, right registerFunc) registerFunc {
				return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
					r, _ := f.store().Current(ctx, session)
					time.Sleep(time.Millisecond)
					if r.Token == token {
						return r.Epoch, nil
					}
					_, err := right(ctx, session, token, floor, ttl)
					return max(r.Epoch, floor) + 1, err
				}
			})(t, f)
		}, "OneLast"},
		"a cancelled registration reported as done": {registers(func(_ *faulty, right registerFunc) registerFunc {
			return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				if ctx.Err() != nil {
					return 1 << 52, nil
				}
				return right(ctx, session, token, floor, ttl)
			}
		}), "Cancelled"},
		"a cancelled read reported as nobody": {func(_ *testing.T, f *faulty) {
			f.current = func(ctx context.Context, session string) (registration, error) {
				if ctx.Err() != nil {
					return registration{}, nil
				}
				if f.down.Load() {
					return registration{}, errDown
				}
				return f.store().Current(ctx, session)
			}
		}, "Cancelled"},
		"a cancelled read that never returns": {func(t *testing.T, f *faulty) {
			over := make(chan struct{})
			t.Cleanup(func() { close(over) })
			f.current = func(ctx context.Context, session string) (registration, error) {
				if ctx.Err() != nil {
					<-over
				}
				if f.down.Load() {
					return registration{}, errDown
				}
				return f.store().Current(ctx, session)
			}
		}, "Cancelled"},
		"a watch that hears nothing": {func(_ *testing.T, f *faulty) {
			f.watch = func(string, func()) func() { return func() {} }
		}, "Watch"},
		"a watch that hears the first registration only": {func(_ *testing.T, f *faulty) {
			f.watch = func(session string, changed func()) func() {
				var once sync.Once
				return f.store().Watch(session, func() { once.Do(changed) })
			}
		}, "Watch"},
		"a watch that hears every session": {func(t *testing.T, f *faulty) {
			var mu sync.Mutex
			var all []func()
			f.watch = func(_ string, changed func()) func() {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, changed)
				return func() {}
			}
			registers(func(_ *faulty, right registerFunc) registerFunc {
				return func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
					mu.Lock()
					defer mu.Unlock()
					for _, changed := range all {
						defer changed()
					}
					return right(ctx, session, token, floor, ttl)
				}
			})(t, f)
		}, "Watch"},
		"a watch that cannot be stopped": {func(_ *testing.T, f *faulty) {
			f.watch = func(session string, changed func()) func() {
				f.store().Watch(session, changed)
				return func() {}
			}
		}, "Watch"},
		"a watch that waits for a connection": {func(_ *testing.T, f *faulty) {
			f.watch = func(session string, changed func()) func() {
				if f.down.Load() {
					time.Sleep(500 * time.Millisecond)
				}
				return f.store().Watch(session, changed)
			}
		}, "WatchReturns"},
		"an outage reported as nobody": {func(_ *testing.T, f *faulty) {
			f.current = func(ctx context.Context, session string) (registration, error) {
				if f.down.Load() {
					return registration{}, nil
				}
				return f.store().Current(ctx, session)
			}
		}, "Outage"},
		"a renewal in an outage that goes well": {func(_ *testing.T, f *faulty) {
			f.renew = func(ctx context.Context, session string, ttl time.Duration) (registration, error) {
				return f.store().Renew(ctx, session, ttl)
			}
		}, "Outage"},
		"a registration in an outage that goes well": {func(_ *testing.T, f *faulty) {
			f.register = func(ctx context.Context, session, token string, floor uint64, ttl time.Duration) (uint64, error) {
				return f.store().Register(ctx, session, token, floor, ttl)
			}
		}, "Outage"},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Contains(t, guardtest.Broken(t, suiteOf(tt.fault)), tt.by)
		})
		idle = slices.DeleteFunc(idle, func(name string) bool { return name == tt.by })
	}
	assert.Empty(t, idle, "nothing here shows that these cases can fail")
}
