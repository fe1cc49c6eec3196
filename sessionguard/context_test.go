package sessionguard_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/sessionguard"
)

type key struct{}

func TestGuardedContextIsAChildOfTheCallers(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	gone := errors.New("gone")
	parent, cancel := context.WithCancelCause(context.WithValue(t.Context(), key{}, "value"))
	deadline := time.Now().Add(time.Hour)
	parent, cancel2 := context.WithDeadline(parent, deadline)
	defer cancel2()
	ctx, g, err := m.Register(parent, "s")
	require.NoError(t, err)
	defer g.End()
	assert.Equal(t, "value", ctx.Value(key{}))
	got, ok := ctx.Deadline()
	assert.True(t, ok)
	assert.Equal(t, deadline, got)
	cancel(gone)
	assert.Equal(t, gone, cause(t, ctx))
	require.NoError(t, g.Commit(t.Context(), applied), "the guard is not its context")
}

func TestFromContext(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	var none context.Context
	assert.Nil(t, sessionguard.FromContext(none))
	assert.Nil(t, sessionguard.FromContext(t.Context()))

	ctx1, g1 := register(t, m, "one")
	assert.Same(t, g1, sessionguard.FromContext(ctx1))
	child, cancel := context.WithCancel(context.WithValue(ctx1, key{}, 1))
	defer cancel()
	assert.Same(t, g1, sessionguard.FromContext(child))
	assert.Same(t, g1, sessionguard.FromContext(context.WithoutCancel(child)))

	ctx2, g2, err := m.Register(child, "two")
	require.NoError(t, err)
	defer g2.End()
	assert.Same(t, g2, sessionguard.FromContext(ctx2), "the last one")
	assert.Same(t, g1, sessionguard.FromContext(ctx1))
	g1.End()
	assert.Same(t, g1, sessionguard.FromContext(ctx1), "also when it has ended")
}

func TestNestedRegistrationIsTheSameRequest(t *testing.T) {
	s := &spy{Store: new(sessionguard.MemoryStore)}
	m := on(t, s)
	ctx, g := register(t, m, "s")
	side, other, err := m.Register(ctx, "another")
	require.NoError(t, err)
	defer other.End()
	for _, outer := range []context.Context{ctx, side} { // the nearest guard is another's
		inside, inner, err := m.Register(outer, "s")
		require.NoError(t, err)
		assert.Equal(t, outer, inside)
		assert.Equal(t, g.Epoch(), inner.Epoch())
		assert.Equal(t, g.Key("k"), inner.Key("k"))
		require.NoError(t, inner.Check(inside))
		require.NoError(t, inner.Commit(inside, func(_ context.Context, epoch uint64) (bool, error) {
			assert.Equal(t, g.Epoch(), epoch)
			return true, nil
		}))
		inner.End()
		inner.End()
		goesOn(t, ctx, g)
		require.NoError(t, inner.Check(inside), "its end ended nothing, itself included")

		_, innermost, err := m.Register(inside, "s")
		require.NoError(t, err)
		innermost.End()
	}
	assert.Equal(t, 2, s.count("register"))
	goesOn(t, side, other)

	_, inner, err := m.Register(ctx, "s")
	require.NoError(t, err)
	g.End()
	assert.ErrorIs(t, inner.Check(t.Context()), sessionguard.ErrInvalid, "the request is over")
}

func TestNestedRegistrationUnderASupersededContext(t *testing.T) {
	m := on(t, mute(new(sessionguard.MemoryStore)))
	ctx, g := register(t, m, "s")
	_, newer := register(t, m, "s")
	for _, c := range []context.Context{ctx, context.WithoutCancel(ctx)} {
		back, inner, err := m.Register(c, "s")
		supersededBy(t, err, g, newer)
		assert.Nil(t, inner)
		assert.Equal(t, c, back)
	}
	_, _, err := m.Register(ctx, "another")
	supersededBy(t, err, g, newer) // the context has ended, and says why
	_, free, err := m.Register(context.WithoutCancel(ctx), "another")
	require.NoError(t, err, "another session is not concerned")
	free.End()
}

func TestRegisterAfterTheEndIsANewRequest(t *testing.T) {
	s := &spy{Store: new(sessionguard.MemoryStore)}
	m := on(t, s)
	ctx, g := register(t, m, "s")
	g.End()
	_, _, err := m.Register(ctx, "s")
	require.ErrorIs(t, err, context.Canceled, "its context has ended")
	again, g2, err := m.Register(context.WithoutCancel(ctx), "s")
	require.NoError(t, err)
	defer g2.End()
	assert.Greater(t, g2.Epoch(), g.Epoch())
	assert.Same(t, g2, sessionguard.FromContext(again))
	goesOn(t, again, g2)
	_, inner, err := m.Register(again, "s")
	require.NoError(t, err)
	assert.Equal(t, g2.Epoch(), inner.Epoch(), "the one that lives, not the one further out")
	assert.Equal(t, 2, s.count("register"))
}

// A guard of one monitor says nothing to another.
func TestMonitorsDoNotShareGuards(t *testing.T) {
	store := new(sessionguard.MemoryStore)
	a, b := on(t, store), on(t, store)
	ctx, g := register(t, a, "s")
	inside, g2, err := b.Register(ctx, "s")
	require.NoError(t, err)
	defer g2.End()
	assert.Greater(t, g2.Epoch(), g.Epoch())
	require.ErrorIs(t, cause(t, ctx), sessionguard.ErrSuperseded)
	require.ErrorIs(t, context.Cause(inside), sessionguard.ErrSuperseded)
}

func TestSiblingsAreIndependent(t *testing.T) {
	m := on(t, mute(new(sessionguard.MemoryStore)))
	parent, cancel := context.WithCancel(t.Context())
	defer cancel()
	ctx1, g1, err := m.Register(parent, "one")
	require.NoError(t, err)
	ctx2, g2, err := m.Register(parent, "two")
	require.NoError(t, err)
	defer g2.End()
	g1.End()
	assert.Error(t, ctx1.Err())
	goesOn(t, ctx2, g2)
	_, _ = register(t, m, "one")
	goesOn(t, ctx2, g2)
	cancel()
	assert.ErrorIs(t, cause(t, ctx2), context.Canceled)
	assert.NoError(t, g2.Check(t.Context()))
}

func TestCommit(t *testing.T) {
	bad := errors.New("bad")
	for name, c := range map[string]struct {
		applied bool
		err     error
		newer   bool // one registers while it writes
		want    []error
		not     []error
	}{
		"applied":                           {applied: true},
		"not applied":                       {want: []error{sessionguard.ErrSuperseded}},
		"failed":                            {err: bad, want: []error{bad}, not: []error{sessionguard.ErrSuperseded, sessionguard.ErrUnavailable}},
		"failed, and applied":               {applied: true, err: bad, want: []error{bad}, not: []error{sessionguard.ErrSuperseded}},
		"applied while a newer registers":   {applied: true, newer: true},
		"not applied because of a newer":    {newer: true, want: []error{sessionguard.ErrSuperseded}},
		"failed because a newer interrupts": {err: bad, newer: true, want: []error{bad, sessionguard.ErrSuperseded}},
	} {
		t.Run(name, func(t *testing.T) {
			m := on(t, mute(new(sessionguard.MemoryStore)))
			ctx, g := register(t, m, "s")
			var newer *sessionguard.Guard
			err := g.Commit(ctx, func(inside context.Context, epoch uint64) (bool, error) {
				assert.Equal(t, ctx, inside)
				assert.Equal(t, g.Epoch(), epoch)
				if c.newer {
					_, newer = register(t, m, "s")
				}
				return c.applied, c.err
			})
			if len(c.want) == 0 {
				require.NoError(t, err)
			}
			for _, want := range c.want {
				assert.ErrorIs(t, err, want)
			}
			for _, not := range c.not {
				assert.NotErrorIs(t, err, not)
			}
			if errors.Is(err, sessionguard.ErrSuperseded) {
				assert.ErrorIs(t, context.Cause(ctx), sessionguard.ErrSuperseded)
				assert.ErrorIs(t, g.Check(t.Context()), sessionguard.ErrSuperseded, "for ever")
			} else if !c.newer {
				goesOn(t, ctx, g)
			}
			if newer != nil {
				assert.NoError(t, newer.Commit(t.Context(), applied))
			}
		})
	}
}

// Only the application's store knows by whom.
func TestRefusalOfTheApplicationsStore(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	_, g := register(t, m, "s")
	err := g.Commit(t.Context(), func(context.Context, uint64) (bool, error) { return false, nil })
	var s *sessionguard.SupersededError
	require.ErrorAs(t, err, &s)
	assert.Equal(t, g.Epoch(), s.Epoch)
	assert.Zero(t, s.By)
	assert.ErrorContains(t, err, "superseded by a newer one")
	assert.NotContains(t, err.Error(), "by 0")
}

func TestPanicOfACommitPassesThrough(t *testing.T) {
	m := on(t, new(sessionguard.MemoryStore))
	ctx, g := register(t, m, "s")
	assert.PanicsWithValue(t, "boom", func() {
		_ = g.Commit(ctx, func(context.Context, uint64) (bool, error) { panic("boom") })
	})
	goesOn(t, ctx, g)
}

// An application's row decides between a request that was the last one when it was
// checked and a newer one that wrote meanwhile.
func TestEpochInTheRowRefusesWhoWasOvertaken(t *testing.T) {
	m := on(t, mute(new(sessionguard.MemoryStore)))
	var row uint64
	write := func(_ context.Context, epoch uint64) (bool, error) { // UPDATE … WHERE epoch <= $epoch
		if row > epoch {
			return false, nil
		}
		row = epoch
		return true, nil
	}
	_, old := register(t, m, "s")
	err := old.Commit(t.Context(), func(ctx context.Context, epoch uint64) (bool, error) {
		_, newer := register(t, m, "s") // after the check
		require.NoError(t, newer.Commit(ctx, write))
		return write(ctx, epoch)
	})
	require.ErrorIs(t, err, sessionguard.ErrSuperseded)
	assert.Greater(t, row, old.Epoch())
}
