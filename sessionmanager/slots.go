package sessionmanager

import (
	"context"
	"crypto/rand"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/bound"
	"github.com/sessionlock/sessionlock/internal/keyname"
	"github.com/sessionlock/sessionlock/internal/rediserr"
)

//go:embed slottake.lua
var slotTakeLua string

//go:embed slotrenew.lua
var slotRenewLua string

var (
	slotTake  = redis.NewScript(slotTakeLua)
	slotRenew = redis.NewScript(slotRenewLua)
)

// slots are this process's part of the slots that an account has in the whole
// fleet: members of a sorted set in Redis, whose scores are when they are free
// again, by Redis' clock. A nil one has slots for everybody.
type slots struct {
	*config
	key string

	mu   sync.Mutex
	held map[string]bool
	tell func(ctx context.Context, err error)
}

func newSlots(c *config, names keyname.Namer, tell func(context.Context, error)) *slots {
	names.Upstream = "sessionmanager slots"
	return &slots{config: c, key: "sl:{" + names.Tag(c.account) + "}:s", held: map[string]bool{}, tell: tell}
}

// unlimited takes a slot that is lost, whatever the others have.
const unlimited = 0

// take takes a slot. One whose reply was lost is given back, or free when its lease
// is over.
func (f *slots) take(ctx context.Context) (slot string, code Code, err error) {
	if f == nil {
		return "", "", nil
	}
	slot = rand.Text()
	refused, err := f.run(ctx, "take a slot", slotTake, f.fleetMax, slot)
	if err != nil {
		f.release(context.WithoutCancel(ctx), slot)
		return "", CodeUnavailable, err
	}
	if len(refused) != 0 {
		return "", CodeLimit, &ownError{text: fmt.Sprintf("%d in the fleet", f.fleetMax)}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held[slot] = true
	return slot, "", nil
}

// release gives a slot back. It may be one that is not held.
func (f *slots) release(ctx context.Context, slot string) {
	if f == nil || slot == "" {
		return
	}
	f.mu.Lock()
	delete(f.held, slot)
	f.mu.Unlock()
	_, err := bound.Call(ctx, f.opTimeout, func(ctx context.Context) (int64, error) {
		return f.rdb.ZRem(ctx, f.key, slot).Result()
	}, nil)
	if err != nil {
		f.tell(ctx, f.failed(ctx, "release a slot", err))
	}
}

// renew renews what is held, every third of its life, until ctx ends.
func (f *slots) renew(ctx context.Context) {
	tick := time.Tick(f.slotTTL / 3)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
		f.mu.Lock()
		held := slices.Collect(maps.Keys(f.held))
		f.mu.Unlock()
		for some := range slices.Chunk(held, 500) {
			if err := f.renewSome(ctx, some); err != nil && ctx.Err() == nil {
				f.tell(ctx, err)
				break // the next tick tries again
			}
		}
	}
}

// renewSome renews slots, and takes those again that were lost.
func (f *slots) renewSome(ctx context.Context, some []string) error {
	lost, err := f.run(ctx, "renew slots", slotRenew, unlimited, some...)
	if err != nil || len(lost) == 0 {
		return err
	}
	f.mu.Lock()
	lost = slices.DeleteFunc(lost, func(slot string) bool { return !f.held[slot] })
	f.mu.Unlock()
	if len(lost) == 0 {
		return nil // given back meanwhile
	}
	f.tell(ctx, &ownError{text: fmt.Sprintf("renew slots: %d were lost, and are taken again", len(lost))})
	_, err = f.run(ctx, "renew slots", slotTake, unlimited, lost...)
	return err
}

// run runs a script for some slots and returns those it could do nothing for.
func (f *slots) run(ctx context.Context, op string, script *redis.Script, limit int, some ...string) ([]string, error) {
	args := []any{f.slotTTL.Milliseconds(), limit}
	for _, slot := range some {
		args = append(args, slot)
	}
	got, err := bound.Call(ctx, f.opTimeout, func(ctx context.Context) ([]string, error) {
		return script.Run(ctx, f.rdb, []string{f.key}, args...).StringSlice()
	}, nil)
	if err != nil {
		return nil, f.failed(ctx, op, err)
	}
	return got, nil
}

// failed says what failed without quoting a reply.
func (f *slots) failed(ctx context.Context, op string, err error) error {
	rediserr.Seen(ctx, f.rdb, err)
	text := fmt.Sprintf("%s: failed (%T)", op, err)
	if errors.Is(err, bound.ErrTimeout) || rediserr.Answered(err) {
		text = op + ": " + err.Error()
	}
	return &ownError{text, err}
}
