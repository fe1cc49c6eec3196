package lua_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/internal/lua"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

const limit = 16

func swap(t *testing.T, rdb redis.Scripter, old, next string) any {
	t.Helper()
	got, err := lua.Swap.Run(t.Context(), rdb, []string{"k"}, old, next, 60_000, "k", limit).Result()
	require.NoError(t, err)
	return got
}

func TestSwap(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		ctx := t.Context()
		pushes := rdb.Subscribe(ctx, "k")
		t.Cleanup(func() { _ = pushes.Close() })
		_, err := pushes.Receive(ctx) // subscribed
		require.NoError(t, err)
		pushed := func() bool {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			// A message of our own behind it tells that there was none.
			require.NoError(t, rdb.Publish(ctx, "k", "end").Err())
			n := 0
			for {
				m, err := pushes.ReceiveMessage(ctx)
				require.NoError(t, err)
				if m.Payload == "end" {
					require.LessOrEqual(t, n, 1)
					return n == 1
				}
				assert.Empty(t, m.Payload, "a push carries nothing")
				n++
			}
		}

		assert.Empty(t, swap(t, rdb, "one", "two"), "nothing is there")
		assert.False(t, pushed())
		assert.Equal(t, int64(1), swap(t, rdb, "", "one"))
		assert.True(t, pushed())
		assert.InDelta(t, 60, rdb.PTTL(ctx, "k").Val().Seconds(), 5)
		assert.Equal(t, "one", swap(t, rdb, "", "two"))
		assert.Equal(t, "one", swap(t, rdb, "on", "two"), "a prefix is another value")
		assert.Equal(t, "one", swap(t, rdb, "one ", "two"))
		assert.False(t, pushed())

		assert.Equal(t, int64(1), swap(t, rdb, "one", "two"))
		assert.True(t, pushed())
		assert.Equal(t, int64(1), swap(t, rdb, "one", "two"), "run twice, it finds its own value")
		assert.False(t, pushed(), "the first run has woken everybody")
		assert.Equal(t, int64(1), swap(t, rdb, "two", "three"))
		assert.Equal(t, "three", swap(t, rdb, "one", "two"), "run again after it was overtaken")
		assert.Equal(t, "three", rdb.Get(ctx, "k").Val())
	})
}

func TestSwapOfAnOversizedValueReturnsOneByteMoreThanTheLimit(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		for _, size := range []int{limit, limit + 1, limit + 2, 1 << 20} {
			require.NoError(t, rdb.Set(t.Context(), "k", strings.Repeat("x", size), 0).Err())
			want := strings.Repeat("x", min(size, limit+1))
			assert.Equal(t, want, swap(t, rdb, "other", "next"))
			assert.EqualValues(t, size, rdb.StrLen(t.Context(), "k").Val(), "nothing changed")
			assert.Equal(t, int64(1), swap(t, rdb, want, "next"), "what was read can be replaced")
			assert.Equal(t, "next", rdb.Get(t.Context(), "k").Val())
		}
	})
}

func TestSwapOfAnyBytes(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		old := ""
		for _, v := range []string{"\x00", "\xff\xfe", "\r\n", "1e15", "007", "nil", "-0", "a\x00b", "false"} {
			assert.Equal(t, int64(1), swap(t, rdb, old, v))
			assert.Equal(t, v, rdb.Get(t.Context(), "k").Val())
			old = v
		}
	})
}

func TestSwapOfAnotherTypeIsAnErrorAndChangesNothing(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		require.NoError(t, rdb.RPush(t.Context(), "k", "x").Err())
		err := lua.Swap.Run(t.Context(), rdb, []string{"k"}, "", "next", 1000, "k", limit).Err()
		assert.ErrorContains(t, err, "WRONGTYPE")
		assert.Equal(t, []string{"x"}, rdb.LRange(t.Context(), "k", 0, -1).Val())
	})
}

// Scripts are sent again to a server that has forgotten them.
func TestScriptsSurviveAFlush(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		assert.Equal(t, int64(1), swap(t, rdb, "", "one"))
		require.NoError(t, rdb.ScriptFlush(t.Context()).Err())
		assert.Equal(t, int64(1), swap(t, rdb, "one", "two"))
	})
}

func TestHeal(t *testing.T) {
	const life = time.Second
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		for _, tt := range []struct {
			name   string
			left   time.Duration // 0: for ever; -1: no lock
			healed int
		}{
			{"no lock", -1, 0},
			{"no life", 0, 1},
			{"a life as it should be", life, 0},
			{"almost run out", life / 4, 0},
			{"one of a member with a longer life", 3 * life / 2, 0},
			{"absurd", 3 * life, 1},
			{"of a clock set back", 1000 * time.Hour, 1},
		} {
			t.Run(tt.name, func(t *testing.T) {
				ctx := t.Context()
				key := fmt.Sprint("lock ", tt.name)
				if tt.left >= 0 {
					require.NoError(t, rdb.Set(ctx, key, "holder", tt.left).Err())
				}
				heal := func() int {
					n, err := lua.Heal.Run(ctx, rdb, []string{key}, life.Milliseconds()).Int()
					require.NoError(t, err)
					return n
				}
				assert.Equal(t, tt.healed, heal())
				assert.Zero(t, heal(), "run twice, it finds nothing to heal")
				if tt.left < 0 {
					assert.Zero(t, rdb.Exists(ctx, key).Val())
					return
				}
				assert.Equal(t, "holder", rdb.Get(ctx, key).Val(), "who holds it is not touched")
				want := tt.left
				if tt.healed == 1 {
					want = life
				}
				ttl := rdb.PTTL(ctx, key).Val()
				assert.Positive(t, ttl)
				assert.LessOrEqual(t, ttl, want)
			})
		}
	})
}

// FuzzSwap: the script never fails, whatever bytes it is given, and changes
// nothing unless old is what is stored.
func FuzzSwap(f *testing.F) {
	f.Add("", "one", "two", "two")
	f.Add("one", "one", "two", "\x00")
	f.Add("\xff", "1e309", "nan", "inf")
	m, client := redistest.Bubble(f)
	rdb := client()
	f.Fuzz(func(t *testing.T, stored, old, next, key string) {
		ctx := t.Context()
		m.FlushAll()
		if stored != "" {
			require.NoError(t, rdb.Set(ctx, key, stored, 0).Err())
		}
		got, err := lua.Swap.Run(ctx, rdb, []string{key}, old, next, 1000, key, 1<<20).Result()
		require.NoError(t, err)
		want, left := any(int64(1)), next
		if stored != old && stored != next {
			want, left = stored, stored
		}
		require.Equal(t, want, got)
		if left != "" {
			require.Equal(t, left, rdb.Get(ctx, key).Val())
		}
	})
}
