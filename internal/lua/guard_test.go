package lua_test

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/epoch"
	"github.com/sessionlock/sessionlock/internal/lua"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

// register runs register.lua for session "k", with a life of a minute and no wake-up.
func register(t *testing.T, rdb redis.Scripter, token string, floor uint64) uint64 {
	t.Helper()
	text, err := lua.Register.Run(t.Context(), rdb, []string{"k"}, token, floor, 60_000, "").Text()
	require.NoError(t, err)
	n, err := strconv.ParseUint(text, 10, 64)
	require.NoError(t, err, text)
	return n
}

func TestRegisterGivesOutTheTime(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		before := rdb.Time(t.Context()).Val().UnixMicro()
		got := register(t, rdb, "a", 0)
		after := rdb.Time(t.Context()).Val().UnixMicro()
		assert.LessOrEqual(t, uint64(before), got)
		assert.GreaterOrEqual(t, uint64(after), got)
		assert.Equal(t, fmt.Sprint(got, " a"), rdb.Get(t.Context(), "k").Val())
		assert.InDelta(t, 60, rdb.PTTL(t.Context(), "k").Val().Seconds(), 5)
	})
}

func TestRegisterIsAboveWhatWasAndTheFloor(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		last := uint64(0)
		for i := range 100 {
			got := register(t, rdb, fmt.Sprint(i), 0)
			require.Greater(t, got, last)
			last = got
		}
		ahead := last + uint64(time.Hour.Microseconds())
		assert.Equal(t, ahead+1, register(t, rdb, "floor", ahead), "the next above it")
		assert.Equal(t, ahead+2, register(t, rdb, "next", 0), "the clock is behind")
		assert.Equal(t, ahead+3, register(t, rdb, "again", ahead-5))
		assert.Equal(t, ahead+4, register(t, rdb, "equal", ahead+3))
	})
}

// Exact up to the last number that a script can count to, and an error beyond it.
func TestRegisterOfTheHighestEpochs(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		assert.Equal(t, uint64(epoch.Max-2), register(t, rdb, "a", epoch.Max-3))
		assert.Equal(t, uint64(epoch.Max-1), register(t, rdb, "b", 0))
		assert.Equal(t, uint64(epoch.Max), register(t, rdb, "c", 0))
		assert.Equal(t, uint64(epoch.Max), register(t, rdb, "c", 0), "repeated")
		for _, floor := range []uint64{epoch.Max, epoch.Max + 1} {
			err := lua.Register.Run(t.Context(), rdb, []string{"k"}, "d", floor, 60_000, "").Err()
			require.ErrorContains(t, err, "impossible epoch")
		}
		assert.Equal(t, fmt.Sprint(uint64(epoch.Max), " c"), rdb.Get(t.Context(), "k").Val(), "nothing changed")
		err := lua.Register.Run(t.Context(), rdb, []string{"fresh"}, "d", uint64(epoch.Max), 60_000, "").Err()
		require.ErrorContains(t, err, "impossible epoch")
		assert.Zero(t, rdb.Exists(t.Context(), "fresh").Val())
	})
}

func TestRegisterRunTwice(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		first := register(t, rdb, "a", 0)
		require.NoError(t, rdb.PExpire(t.Context(), "k", time.Second).Err())
		assert.Equal(t, first, register(t, rdb, "a", first+1000), "it finds its own")
		assert.Equal(t, fmt.Sprint(first, " a"), rdb.Get(t.Context(), "k").Val())
		assert.InDelta(t, 60, rdb.PTTL(t.Context(), "k").Val().Seconds(), 5, "and its life begins anew")

		second := register(t, rdb, "b", 0)
		third := register(t, rdb, "a", 0)
		assert.Greater(t, second, first)
		assert.Greater(t, third, second, "with another in between it is a new one")
		assert.Equal(t, fmt.Sprint(third, " a"), rdb.Get(t.Context(), "k").Val())
		assert.Greater(t, register(t, rdb, "b", 0), third)
	})
}

func TestRegisterComparesWholeTokens(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		tokens := []string{"token", "toke", "token ", " token", "Token", "tok", "token token", "1 token", "\x00", "a\x00b", "a\nb", ".*", "%a+", ""}
		for _, stored := range tokens {
			for _, token := range tokens {
				require.NoError(t, rdb.Set(t.Context(), "k", "42 "+stored, 0).Err())
				got := register(t, rdb, token, 0)
				if token == stored {
					assert.EqualValues(t, 42, got, "%q", token)
				} else {
					assert.Greater(t, got, uint64(42), "%q is not %q", token, stored)
				}
			}
		}
	})
}

func TestRegisterPublishesOnce(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		sub := rdb.Subscribe(ctx, "channel", "k")
		t.Cleanup(func() { _ = sub.Close() })
		for range 2 {
			_, err := sub.Receive(ctx)
			require.NoError(t, err)
		}
		run := func(token, channel string) {
			t.Helper()
			require.NoError(t, lua.Register.Run(ctx, rdb, []string{"k"}, token, 0, 60_000, channel).Err())
		}
		run("a", "channel")
		run("a", "channel") // has woken everybody the first time
		run("b", "")        // wakes nobody
		run("c", "channel")
		require.NoError(t, rdb.Publish(ctx, "channel", "end").Err())
		var got []string
		for len(got) == 0 || got[len(got)-1] != "channel end" {
			m, err := sub.ReceiveMessage(ctx)
			require.NoError(t, err)
			got = append(got, m.Channel+" "+m.Payload)
		}
		assert.Equal(t, []string{"channel ", "channel ", "channel end"}, got, "and a message carries nothing")
	})
}

func TestRegisterReplacesWhatIsNoRegistration(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		for _, v := range []string{"", " ", "garbage", "12", " a", "-1 a", "1.5 a", "1e15 a", "0x1 a", "nan a", "\x00 a", "1\n a", "\xff", strings.Repeat("x", 1<<16)} {
			require.NoError(t, rdb.Set(t.Context(), "k", v, 0).Err())
			got := register(t, rdb, "a", 0)
			assert.Equal(t, fmt.Sprint(got, " a"), rdb.Get(t.Context(), "k").Val(), "%.20q", v)
			assert.InDelta(t, 60, rdb.PTTL(t.Context(), "k").Val().Seconds(), 5)
			assert.Less(t, got, uint64(epoch.Max)/2, "%.20q", v)
		}
		// Numbers that no store of ours gives out would use up all others.
		for _, v := range []string{fmt.Sprint(uint64(math.MaxUint64), " a"), strings.Repeat("9", 400) + " a", fmt.Sprint(uint64(epoch.Max), " a")} {
			require.NoError(t, rdb.Set(t.Context(), "k", v, 0).Err())
			got := register(t, rdb, "b", 0)
			assert.Equal(t, fmt.Sprint(got, " b"), rdb.Get(t.Context(), "k").Val(), "%.20q", v)
			assert.Less(t, got, uint64(epoch.Max)/2, "%.20q", v)
		}
	})
}

func TestRegisterOnAnotherTypeChangesNothing(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		require.NoError(t, rdb.RPush(t.Context(), "k", "x").Err())
		err := lua.Register.Run(t.Context(), rdb, []string{"k"}, "a", 0, 60_000, "k").Err()
		assert.ErrorContains(t, err, "WRONGTYPE")
		assert.Equal(t, []string{"x"}, rdb.LRange(t.Context(), "k", 0, -1).Val())
	})
}

// guardedBy runs src behind guarded.lua, with "k" and registration in front of its own.
func guardedBy(t *testing.T, rdb redis.Scripter, registration, src string, keys []string, args ...any) (any, error) {
	t.Helper()
	return lua.Guarded(src).Run(t.Context(), rdb, append([]string{"k"}, keys...), append([]any{registration}, args...)...).Result()
}

func TestGuardedRunsForTheLastOneOnly(t *testing.T) {
	const write = `return redis.call('SET', KEYS[1], ARGV[1])`
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		refused := func(registration, want string) {
			t.Helper()
			_, err := guardedBy(t, rdb, registration, write, []string{"out"}, "v")
			var said redis.Error
			require.ErrorAs(t, err, &said)
			assert.Equal(t, want, strings.TrimRight(said.Error(), " "))
			assert.Zero(t, rdb.Exists(t.Context(), "out").Val())
		}
		refused("7 token", "SESSIONGUARD_SUPERSEDED")
		refused("", "SESSIONGUARD_SUPERSEDED")
		require.NoError(t, rdb.Set(t.Context(), "k", "7 token", 0).Err())
		for _, other := range []string{"", "7", "7 ", "7 toke", "7 token ", "7 token\x00", " 7 token", "07 token", "7.0 token", "8 token", "6 token", "7 Token"} {
			refused(other, "SESSIONGUARD_SUPERSEDED 7 token")
		}
		v, err := guardedBy(t, rdb, "7 token", write, []string{"out"}, "v")
		require.NoError(t, err)
		assert.Equal(t, "OK", v)
		assert.Equal(t, "v", rdb.Get(t.Context(), "out").Val())
		assert.Equal(t, "7 token", rdb.Get(t.Context(), "k").Val(), "the registration is not touched")
		assert.EqualValues(t, -1, rdb.TTL(t.Context(), "k").Val())
	})
}

func TestGuardedHandsOverItsOwnKeysAndArguments(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		require.NoError(t, rdb.Set(t.Context(), "k", "7 token", 0).Err())
		const all = `return {#KEYS, #ARGV, KEYS[1] or 'none', ARGV[1] or 'none', unpack(ARGV)}`
		v, err := guardedBy(t, rdb, "7 token", all, nil)
		require.NoError(t, err)
		assert.Equal(t, []any{int64(0), int64(0), "none", "none"}, v)
		v, err = guardedBy(t, rdb, "7 token", all, []string{"a", "b"}, "x", 2, "\x00")
		require.NoError(t, err)
		assert.Equal(t, []any{int64(2), int64(3), "a", "x", "x", "2", "\x00"}, v)
		for src, want := range map[string]any{"": nil, "-- nothing": nil, "local now = 1 return now": int64(1), "do return 2 end": int64(2)} {
			v, err := guardedBy(t, rdb, "7 token", src, nil)
			if want == nil {
				require.ErrorIs(t, err, redis.Nil, src)
				continue
			}
			require.NoError(t, err, src)
			assert.Equal(t, want, v, src)
		}
	})
}

func TestGuardedOnAnotherTypeDoesNotRun(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		require.NoError(t, rdb.RPush(t.Context(), "k", "x").Err())
		_, err := guardedBy(t, rdb, "7 token", `return redis.call('SET', KEYS[1], 1)`, []string{"out"})
		assert.ErrorContains(t, err, "WRONGTYPE")
		assert.Zero(t, rdb.Exists(t.Context(), "out").Val())
	})
}

// What is stored may be anything: the answer is one error all the same, and cannot be
// taken for another reply.
func TestGuardedTellsForeignValuesInOneLine(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		for _, v := range []string{"\r\n+OK", "a\nb", "\x00", "\xff", strings.Repeat("x", 1<<16)} {
			require.NoError(t, rdb.Set(t.Context(), "k", v, 0).Err())
			_, err := guardedBy(t, rdb, "7 token", "return 1", nil)
			require.ErrorContains(t, err, "SESSIONGUARD_SUPERSEDED", "%.20q", v)
			assert.Equal(t, "PONG", rdb.Ping(t.Context()).Val(), "%.20q", v)
		}
	})
}

// FuzzRegister: whatever is stored and whatever the token, the script ends in an epoch
// that is above the floor and stored, or in an error that changes nothing.
func FuzzRegister(f *testing.F) {
	f.Add("", "token", uint64(0))
	f.Add("12 token", "token", uint64(13))
	f.Add("9007199254740991 a", "b", uint64(0))
	f.Add("1e309 a", "nan", uint64(1<<53))
	f.Add("12 \n", "\n", uint64(1))
	m, client := redistest.Bubble(f)
	rdb := client()
	f.Fuzz(func(t *testing.T, stored, token string, floor uint64) {
		ctx := t.Context()
		m.FlushAll()
		require.NoError(t, rdb.Set(ctx, "k", stored, 0).Err())
		text, err := lua.Register.Run(ctx, rdb, []string{"k"}, token, floor, 1000, "").Text()
		if err != nil {
			require.Equal(t, stored, rdb.Get(ctx, "k").Val())
			return
		}
		got, err := strconv.ParseUint(text, 10, 64)
		require.NoError(t, err)
		now := rdb.Get(ctx, "k").Val()
		require.Equal(t, text+" "+token, now)
		if now != stored {
			require.Greater(t, got, floor)
			require.LessOrEqual(t, got, uint64(epoch.Max))
		}
	})
}
