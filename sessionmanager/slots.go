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
	stop chan struct{} // ends the renewals when it is closed; nil: nothing is held
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
func (f *slots) take(ctx context.Context) (string, Code, error) {
	if f == nil {
		return "", "", nil
	}
	slot := rand.Text()
	free := func() { f.release(context.WithoutCancel(ctx), slot) }
	refused, err := f.run(ctx, "take a slot", slotTake, f.fleetMax, free, slot)
	if err != nil {
		go free() // beside the caller: the store that did not answer him may not answer this
		return "", CodeUnavailable, err
	}
	if len(refused) != 0 {
		return "", CodeLimit, &ownError{text: fmt.Sprintf("%d in the fleet", f.fleetMax)}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.held[slot] = true
	if f.stop == nil {
		f.stop = make(chan struct{})
		go f.renew(f.stop) //nolint:contextcheck,gosec // for whoever holds one
	}
	return slot, "", nil
}

// release gives a slot back. It may be one that is not held.
func (f *slots) release(ctx context.Context, slot string) {
	if f == nil || slot == "" {
		return
	}
	f.mu.Lock()
	delete(f.held, slot)
	if len(f.held) == 0 && f.stop != nil {
		close(f.stop)
		f.stop = nil
	}
	f.mu.Unlock()
	_, err := bound.Call(ctx, f.opTimeout, func(ctx context.Context) (int64, error) {
		return f.rdb.ZRem(ctx, f.key, slot).Result()
	}, nil)
	if err != nil {
		f.tell(ctx, f.failed(ctx, "release a slot", err))
	}
}

// renew renews what is held, every third of its life, until nothing is: from the
// first take to the last release, so that nobody has to remember it.
func (f *slots) renew(stop <-chan struct{}) {
	ctx, tick := context.Background(), time.Tick(f.slotTTL/3)
	for {
		select {
		case <-stop:
			return
		case <-tick:
		}
		f.mu.Lock()
		held := slices.Collect(maps.Keys(f.held))
		f.mu.Unlock()
		for some := range slices.Chunk(held, 500) {
			if err := f.renewSome(ctx, some); err != nil {
				f.tell(ctx, err)
				break // the next tick tries again
			}
		}
	}
}

// renewSome renews slots, and takes those again that were lost.
func (f *slots) renewSome(ctx context.Context, some []string) error {
	lost, err := f.run(ctx, "renew slots", slotRenew, unlimited, nil, some...)
	lost, _ = f.still(lost) // the others were given back meanwhile
	if err != nil || len(lost) == 0 {
		return err
	}
	f.tell(ctx, &ownError{text: fmt.Sprintf("renew slots: %d were lost, and are taken again", len(lost))})
	_, err = f.run(ctx, "renew slots", slotTake, unlimited, nil, lost...)
	_, gone := f.still(lost)
	for _, slot := range gone {
		f.release(ctx, slot)
	}
	return err
}

// still says which of some are held now, and which are not.
func (f *slots) still(some []string) (held, gone []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, slot := range some {
		if f.held[slot] {
			held = append(held, slot)
		} else {
			gone = append(gone, slot)
		}
	}
	return held, gone
}

// run runs a script for some slots and returns those it could do nothing for. late,
// unless nil, is called when it has run after nobody waited for it any more.
func (f *slots) run(ctx context.Context, op string, script *redis.Script, limit int, late func(), some ...string) ([]string, error) {
	args := []any{f.slotTTL.Milliseconds(), limit}
	for _, slot := range some {
		args = append(args, slot)
	}
	got, err := bound.Call(ctx, f.opTimeout, func(ctx context.Context) ([]string, error) {
		return script.Run(ctx, f.rdb, []string{f.key}, args...).StringSlice()
	}, func([]string) {
		if late != nil {
			late()
		}
	})
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
