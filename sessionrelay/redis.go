package sessionrelay

import (
	"context"
	"crypto/rand"
	"embed"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/sessionlock/sessionlock/internal/bound"
	"github.com/sessionlock/sessionlock/internal/hub"
	"github.com/sessionlock/sessionlock/internal/keyname"
	"github.com/sessionlock/sessionlock/internal/rediserr"
)

//go:embed lua/*.lua
var sources embed.FS

// scripts are the files of lua/ by name, each behind common.lua.
var scripts = func() map[string]*redis.Script {
	read := func(name string) string {
		b, err := sources.ReadFile("lua/" + name)
		if err != nil {
			panic(err) // embedded
		}
		return string(b)
	}
	files, _ := sources.ReadDir("lua")
	all := map[string]*redis.Script{}
	for _, f := range files {
		name := strings.TrimSuffix(f.Name(), ".lua")
		all[name] = redis.NewScript(read("common.lua") + read(f.Name()))
	}
	delete(all, "common")
	return all
}()

const (
	confirmed = 9e15               // the score of a place whose session exists
	placeTTL  = 30 * time.Second   // of one whose session is being registered, at least
	nodeTTL   = 7 * 24 * time.Hour // of the index of a node that does not come back
	batch     = 500                // ids in one command or page
	parallel  = 16                 // sessions asked for at once
)

// redisStore keeps each session in keys of one slot. Beside them stand three indexes,
// in slots of their own: of all sessions, as pairs of user and session, by the time of
// their last sign of life; of each user's; and of each node's, as pairs of connection
// and session. They are hints, written before a session is and again after, and cleared
// after it: whoever reads one looks at the session.
type redisStore struct {
	redisConfig
	rdb   redis.UniversalClient
	node  string
	names keyname.Namer
	hub   *hub.Hub
}

// NewRedisStore returns a Store of sessions in Redis 6.2 or later for node, which must
// be the only one of its name at a time: a second one takes the first one's sessions for
// lost. A name that stays over restarts puts right what the process before has left. It
// does no I/O. rdb stays the caller's, and must be
// closed after the store's Node. [ErrInvalid] for what is wrong with the arguments, all
// at once.
func NewRedisStore(rdb redis.UniversalClient, node string, opts ...RedisOption) (Store, error) {
	cfg, err := configureRedis(rdb, node, opts)
	if err != nil {
		return nil, err
	}
	return &redisStore{
		redisConfig: cfg, rdb: rdb, node: node, hub: hub.New(rdb),
		names: keyname.Namer{Secret: cfg.keySecret, Namespace: cfg.namespace, Upstream: "sessionrelay"},
	}, nil
}

// every kind of key that a session has, "s" first and "rm" last, as remove.lua wants
// them.
var every = []string{"s", "was", "in", "out", "tries", "pend", "sent", "dead", "gone", "req", "taken", "rm"}

func (r *redisStore) keys(session string, kinds ...string) []string {
	tag := r.names.Tag("session " + session)
	keys := make([]string, len(kinds))
	for i, kind := range kinds {
		keys[i] = keyname.Of(tag, "r:"+kind)
	}
	return keys
}

func (r *redisStore) channel(session string) string {
	return keyname.Of(r.names.Tag("session "+session), "r:c")
}

// index names the index of all sessions, or that of a user's or a node's.
func (r *redisStore) index(kind, name string) string {
	return keyname.Of(r.names.Tag(kind+" "+name), "r:"+kind)
}

// pair is one string of two, of which no others are made.
func pair(a, b string) string { return strconv.Itoa(len(a)) + ":" + a + b }

func unpair(s string) (a, b string, ok bool) {
	size, both, _ := strings.Cut(s, ":")
	n, err := strconv.Atoi(size)
	if err != nil || n < 0 || n > len(both) {
		return "", "", false
	}
	return both[:n], both[n:], true
}

// Watch has changed called when there may be something for whoever is connected to
// session: a message, or another connection in its place.
func (r *redisStore) Watch(session string, changed func()) (stop func()) {
	if _, ring := r.rdb.(*redis.Ring); ring {
		return func() {}
	}
	return r.hub.Watch(r.channel(session), changed)
}

func (r *redisStore) Node() string { return r.node }

func (r *redisStore) Close() { r.hub.Close() }

// run runs a script, bounded by the op timeout.
func (r *redisStore) run(ctx context.Context, script string, keys []string, args ...any) (any, error) {
	return bounded(ctx, r.opTimeout, script, func(ctx context.Context) (any, error) {
		v, err := scripts[script].Run(ctx, r.rdb, keys, args...).Result()
		if errors.Is(err, redis.Nil) {
			return nil, nil
		}
		rediserr.Seen(ctx, r.rdb, err)
		return v, err
	})
}

// store is run for what must not be lost: it waits for the replicas that
// WithReplicas wants.
func (r *redisStore) store(ctx context.Context, script string, keys []string, args ...any) (any, error) {
	if r.replicas == 0 {
		return r.run(ctx, script, keys, args...)
	}
	return bounded(ctx, r.opTimeout, script, func(ctx context.Context) (any, error) {
		node, err := r.primary(ctx, keys[0])
		if err != nil {
			return nil, err
		}
		conn := node.Conn() // WAIT speaks of what its own connection wrote
		defer conn.Close()
		v, err := scripts[script].Run(ctx, conn, keys, args...).Result()
		if err != nil {
			if cluster, ok := r.rdb.(*redis.ClusterClient); ok {
				cluster.ReloadState(ctx) // conn follows no MOVED
			}
			return nil, err
		}
		n, err := conn.Wait(ctx, r.replicas, max(r.opTimeout*8/10, time.Millisecond)).Result() // 0 would be for ever
		if err != nil {
			return nil, err
		}
		if int(n) < r.replicas {
			return nil, fmt.Errorf("%d of %d replicas have it", n, r.replicas)
		}
		return v, nil
	})
}

func (r *redisStore) primary(ctx context.Context, key string) (*redis.Client, error) {
	switch rdb := r.rdb.(type) {
	case *redis.Client:
		return rdb, nil
	case *redis.ClusterClient:
		return rdb.MasterForKey(ctx, key)
	}
	return nil, fmt.Errorf("WithReplicas: not with a %T", r.rdb)
}

// bounded makes one call of Redis: ErrUnavailable for whatever it fails by, except the
// end of ctx.
func bounded[T any](ctx context.Context, d time.Duration, verb string, op func(context.Context) (T, error)) (T, error) {
	v, err := bound.Call(ctx, d, op, nil)
	switch {
	case err == nil:
		return v, nil
	case ctx.Err() != nil:
		return v, fmt.Errorf("sessionrelay: %s: %w", verb, context.Cause(ctx))
	}
	return v, fmt.Errorf("sessionrelay: %s: %w: %w", verb, ErrUnavailable, err)
}

// said turns the first word of a script's answer into an error.
func said(answer any) ([]any, error) {
	words, ok := answer.([]any)
	if !ok {
		words = []any{answer}
	}
	switch words[0] {
	case "GONE":
		return nil, ErrGone
	case "MOVED":
		return nil, ErrMoved
	case "TAKEN":
		return nil, ErrTaken
	case "WRONGUSER":
		return nil, ErrWrongUser
	}
	return words, nil
}

// ask runs a script that begins its answer with a word.
func (r *redisStore) ask(ctx context.Context, script string, keys []string, args ...any) ([]any, error) {
	answer, err := r.run(ctx, script, keys, args...)
	if err != nil {
		return nil, err
	}
	return said(answer)
}

// check finds what would be a session or a home that nobody could tell from none.
func (h Hello) check(conn string) error {
	var bad problems
	for what, value := range map[string]string{"session": h.Session, "user": h.User, "connection": conn} {
		if value == "" {
			bad.add("no %s", what)
		}
	}
	return errors.Join(bad...)
}

func (r *redisStore) Register(ctx context.Context, h Hello, conn string, limit int) (Info, Home, error) {
	if err := h.check(conn); err != nil {
		return Info{}, Home{}, err
	}
	if err := r.reserve(ctx, h, limit); err != nil {
		return Info{}, Home{}, err
	}
	answer, err := r.store(ctx, "register", r.keys(h.Session, "s", "was", "pend", "sent"),
		h.Session, h.User, h.Lib, h.App, h.Version, r.node, conn, r.channel(h.Session))
	if err != nil {
		return Info{}, Home{}, err // the place is free when its lease is over
	}
	words, err := said(answer)
	if err != nil {
		if errors.Is(err, ErrWrongUser) {
			_ = r.forget(ctx, h.User, h.Session) // what fails is left to Scavenge
		}
		return Info{}, Home{}, err
	}
	now := Info{
		Session: h.Session, User: h.User, Lib: h.Lib, App: h.App, Version: h.Version,
		Created: when(words[1]), Live: when(words[2]), Home: Home{r.node, conn},
	}
	_ = r.place(ctx, now) // what fails is made good by the next sign of life
	return now, Home{str(words[3]), str(words[4])}, nil
}

// reserve takes a place among the user's sessions, and enters the session into the
// index of all: before it exists, so that no session is there which nobody finds.
func (r *redisStore) reserve(ctx context.Context, h Hello, limit int) error {
	lease := max(placeTTL, 4*r.opTimeout) // it must not end before register has
	free := func() (bool, error) {
		v, err := r.run(ctx, "reserve", []string{r.index("user", h.User)}, h.Session, limit, lease.Milliseconds())
		return v == int64(1), err
	}
	ok, err := free()
	if err == nil && !ok {
		if err = r.vacate(ctx, h.User); err == nil {
			ok, err = free()
		}
	}
	if err == nil && !ok {
		err = r.entitled(ctx, h)
	}
	if err != nil {
		return err
	}
	_, err = bounded(ctx, r.opTimeout, "enter", func(ctx context.Context) (int64, error) {
		return r.rdb.ZAddNX(ctx, r.index("all", ""), redis.Z{Score: score(), Member: pair(h.User, h.Session)}).Result()
	})
	return err
}

// score is that of a session in the index of all which is alive now.
func score() float64 { return float64(time.Now().UnixMilli()) }

// vacate frees the places of a user's sessions that do not exist any more.
func (r *redisStore) vacate(ctx context.Context, user string) error {
	places, err := bounded(ctx, r.opTimeout, "read places", func(ctx context.Context) ([]string, error) {
		return r.rdb.ZRangeByScore(ctx, r.index("user", user), &redis.ZRangeBy{Min: strconv.FormatFloat(confirmed, 'f', 0, 64), Max: "+inf"}).Result()
	})
	if err != nil {
		return err
	}
	return forEach(places, func(session string) error {
		_, err := r.settle(ctx, user, session)
		return err
	})
}

// settle takes a session that does not exist, or is another user's, out of the indexes.
func (r *redisStore) settle(ctx context.Context, user, session string) (stale bool, err error) {
	info, err := r.Lookup(ctx, session)
	switch {
	case err == nil && info.User == user:
		return false, nil
	case err != nil && !errors.Is(err, ErrGone):
		return false, err
	}
	return true, r.forget(ctx, user, session)
}

// forget takes a session out of the indexes. Should there be one by now, or again, it
// is entered anew: another node may have done so just before.
func (r *redisStore) forget(ctx context.Context, user, session string) error {
	_, err := bounded(ctx, r.opTimeout, "forget", func(ctx context.Context) ([]redis.Cmder, error) {
		return r.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			p.ZRem(ctx, r.index("all", ""), pair(user, session))
			p.ZRem(ctx, r.index("user", user), session)
			return nil
		})
	})
	if err != nil {
		return err
	}
	info, err := r.Lookup(ctx, session)
	switch {
	case errors.Is(err, ErrGone), err == nil && info.User != user:
		return nil
	case err != nil:
		return err
	}
	return r.place(ctx, info)
}

// entitled lets a session that exists come back although its user is at the limit: an
// index that was lost may not know it.
func (r *redisStore) entitled(ctx context.Context, h Hello) error {
	info, err := r.Lookup(ctx, h.Session)
	switch {
	case errors.Is(err, ErrGone):
		return ErrCap
	case err != nil:
		return err
	case info.User != h.User:
		return ErrWrongUser
	}
	return nil
}

// place enters sessions that exist, and are alive, into the indexes.
func (r *redisStore) place(ctx context.Context, infos ...Info) error {
	for some := range slices.Chunk(infos, batch) {
		_, err := bounded(ctx, r.opTimeout, "place", func(ctx context.Context) ([]redis.Cmder, error) {
			return r.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
				var all []redis.Z
				var homed []any
				for _, i := range some {
					all = append(all, redis.Z{Score: score(), Member: pair(i.User, i.Session)})
					p.ZAdd(ctx, r.index("user", i.User), redis.Z{Score: confirmed, Member: i.Session})
					if i.Home.Node == r.node {
						homed = append(homed, pair(i.Home.Conn, i.Session))
					}
				}
				p.ZAdd(ctx, r.index("all", ""), all...)
				if len(homed) > 0 {
					p.SAdd(ctx, r.index("node", r.node), homed...)
					p.PExpire(ctx, r.index("node", r.node), nodeTTL)
				}
				return nil
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *redisStore) Deregister(ctx context.Context, session, conn string) error {
	if _, err := r.run(ctx, "deregister", r.keys(session, "s", "was"), r.node, conn); err != nil {
		return err
	}
	r.leave(ctx, r.node, pair(conn, session))
	return nil
}

// leave takes connections that are no homes any more out of a node's index. What fails
// is found by Homed.
func (r *redisStore) leave(ctx context.Context, node string, pairs ...any) {
	for some := range slices.Chunk(pairs, batch) {
		_, _ = bounded(ctx, r.opTimeout, "leave", func(ctx context.Context) (int64, error) {
			return r.rdb.SRem(ctx, r.index("node", node), some...).Result()
		})
	}
}

func (r *redisStore) Lookup(ctx context.Context, session string) (Info, error) {
	answer, err := r.run(ctx, "lookup", r.keys(session, "s"))
	if err != nil {
		return Info{}, err
	}
	info, ok := infoOf(answer)
	if !ok {
		return Info{}, ErrGone
	}
	return info, nil
}

// infoOf reads the fields of a session, as a list or, by RESP 3, as a map.
func infoOf(answer any) (Info, bool) {
	fields := map[string]string{}
	switch a := answer.(type) {
	case []any:
		for i := 0; i+1 < len(a); i += 2 {
			fields[str(a[i])] = str(a[i+1])
		}
	case map[any]any:
		for k, v := range a {
			fields[str(k)] = str(v)
		}
	case map[string]string:
		fields = a
	}
	return Info{
		Session: fields["id"], User: fields["user"], Lib: fields["lib"], App: fields["app"], Version: fields["version"],
		Created: when(fields["created"]), Live: when(fields["live"]), Home: Home{fields["node"], fields["conn"]},
	}, fields["user"] != ""
}

func str(v any) string {
	s, _ := v.(string)
	return s
}

func when(v any) time.Time {
	ms, err := strconv.ParseInt(str(v), 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

func (r *redisStore) Remove(ctx context.Context, session string) (bool, error) {
	state, _, err := r.remove(ctx, session, -1)
	return state == "REMOVED", err
}

// remove removes a session, if it was idle for longer; a negative idle removes it
// whatever. state is REMOVED, NONE, or LIVE with the milliseconds since the last sign
// of life.
func (r *redisStore) remove(ctx context.Context, session string, idle int64) (state string, age int64, err error) {
	words, err := r.ask(ctx, "remove", r.keys(session, every...), rand.Text(), r.channel(session), idle)
	if err != nil {
		return "", 0, err
	}
	switch state = str(words[0]); state {
	case "LIVE":
		age, _ = words[1].(int64)
	case "REMOVED":
		_ = r.forget(ctx, str(words[1]), session) // what fails is left to Scavenge
		r.leave(ctx, str(words[2]), pair(str(words[3]), session))
	}
	return state, age, nil
}

func (r *redisStore) List(ctx context.Context, f Filter, each func(Info) bool) error {
	show := func(found []entry) (more bool, err error) {
		infos, err := read(ctx, r, found, entry.of)
		for n, i := range infos {
			if i.User == found[n].user && i.User != "" && f.chooses(i) && !each(i) {
				return false, nil
			}
		}
		return true, err
	}
	if f.User == "" {
		return r.pages(ctx, show)
	}
	sessions, err := bounded(ctx, r.opTimeout, "list", func(ctx context.Context) ([]string, error) {
		return r.rdb.ZRange(ctx, r.index("user", f.User), 0, -1).Result()
	})
	if err != nil {
		return err
	}
	for some := range slices.Chunk(sessions, batch) {
		found := make([]entry, len(some))
		for i, session := range some {
			found[i] = entry{f.User, session}
		}
		if more, err := show(found); err != nil || !more {
			return err
		}
	}
	return nil
}

// entry is one of the index of all.
type entry struct{ user, session string }

func (e entry) of() string { return e.session }

// pages calls f with all sessions there may be, each once, some at a time, until it
// returns false.
func (r *redisStore) pages(ctx context.Context, f func([]entry) (bool, error)) error {
	seen := map[string]struct{}{} // a scan may repeat itself
	for cursor := uint64(0); ; {
		type page struct {
			members []string
			cursor  uint64
		}
		p, err := bounded(ctx, r.opTimeout, "list", func(ctx context.Context) (p page, err error) {
			p.members, p.cursor, err = r.rdb.ZScan(ctx, r.index("all", ""), cursor, "", batch).Result()
			return p, err
		})
		if err != nil {
			return err
		}
		var found []entry
		for i := 0; i < len(p.members); i += 2 { // each with its score
			user, session, ok := unpair(p.members[i])
			if _, again := seen[p.members[i]]; ok && !again {
				seen[p.members[i]] = struct{}{}
				found = append(found, entry{user, session})
			}
		}
		if more, err := f(found); err != nil || !more || p.cursor == 0 {
			return err
		}
		cursor = p.cursor
	}
}

// read returns the sessions of all in one trip, the zero Info for one that does not
// exist.
func read[T any](ctx context.Context, r *redisStore, all []T, session func(T) string) ([]Info, error) {
	answers, err := bounded(ctx, r.opTimeout, "list", func(ctx context.Context) ([]redis.Cmder, error) {
		return r.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			for _, one := range all {
				p.HGetAll(ctx, r.keys(session(one), "s")[0])
			}
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	infos := make([]Info, len(all))
	for n, cmd := range answers {
		infos[n], _ = infoOf(cmd.(*redis.MapStringStringCmd).Val())
	}
	return infos, nil
}

// chooses reports whether f chooses the session.
func (f Filter) chooses(i Info) bool {
	return (!f.Connected || i.Home != Home{}) && (f.User == "" || f.User == i.User) &&
		(f.App == "" || f.App == i.App) && i.Version >= f.Since
}

// forEach calls f with each of all, some at once, and returns their errors.
func forEach[T any](all []T, f func(T) error) error {
	var mu sync.Mutex
	var first error
	var running sync.WaitGroup
	todo := make(chan T)
	for range min(parallel, len(all)) {
		running.Go(func() {
			for one := range todo {
				if err := f(one); err != nil {
					mu.Lock()
					first = errors.Join(first, err)
					mu.Unlock()
				}
			}
		})
	}
	for _, one := range all {
		mu.Lock()
		bad := first != nil
		mu.Unlock()
		if bad {
			break // the others would fail likewise, each after a timeout
		}
		todo <- one
	}
	close(todo)
	running.Wait()
	return first
}

func (r *redisStore) Alive(ctx context.Context, sessions []string) (unknown []string, err error) {
	var mu sync.Mutex
	live := make([]Info, 0, len(sessions))
	err = forEach(sessions, func(session string) error {
		answer, err := r.run(ctx, "alive", r.keys(session, "s"))
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if is, ok := answer.([]any); ok {
			live = append(live, Info{Session: session, User: str(is[0]), Home: Home{str(is[1]), str(is[2])}})
		} else {
			unknown = append(unknown, session)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return unknown, r.place(ctx, live...)
}

// Expire reads candidates from the index, whose times are this process's and only say
// where to look; the session's own time is the store's.
func (r *redisStore) Expire(ctx context.Context, idle time.Duration) (expired []string, err error) {
	var mu sync.Mutex
	idle = max(idle, 0)
	for {
		before := strconv.FormatInt(time.Now().Add(-idle).UnixMilli(), 10)
		candidates, err := bounded(ctx, r.opTimeout, "expire", func(ctx context.Context) ([]string, error) {
			return r.rdb.ZRangeByScore(ctx, r.index("all", ""), &redis.ZRangeBy{Min: "-inf", Max: before, Count: batch}).Result()
		})
		if err != nil || len(candidates) == 0 {
			return expired, err
		}
		err = forEach(candidates, func(member string) error {
			removed, session, err := r.expire(ctx, member, idle)
			if removed {
				mu.Lock()
				defer mu.Unlock()
				expired = append(expired, session)
			}
			return err
		})
		if err != nil {
			return expired, err
		}
	}
}

// expire removes the session of a member of the index if it was idle for longer, and
// sees to it that the member is no candidate any more.
func (r *redisStore) expire(ctx context.Context, member string, idle time.Duration) (removed bool, session string, err error) {
	user, session, ok := unpair(member)
	if !ok {
		_, err = bounded(ctx, r.opTimeout, "expire", func(ctx context.Context) (int64, error) {
			return r.rdb.ZRem(ctx, r.index("all", ""), member).Result()
		})
		return false, "", err
	}
	state, age, err := r.remove(ctx, session, idle.Milliseconds())
	switch {
	case err != nil:
		return false, "", err
	case state == "NONE":
		return false, "", r.forget(ctx, user, session)
	case state == "LIVE":
		_, err = bounded(ctx, r.opTimeout, "expire", func(ctx context.Context) (int64, error) {
			later := score() - float64(age) + 1 // at the latest when it is due, by this process's clock
			return r.rdb.ZAddXX(ctx, r.index("all", ""), redis.Z{Score: later, Member: member}).Result()
		})
		return false, "", err
	}
	return true, session, nil
}

// Scavenge looks at the indexes: a session takes all else with it.
func (r *redisStore) Scavenge(ctx context.Context) (removed int, err error) {
	var missing []entry
	err = r.pages(ctx, func(found []entry) (bool, error) {
		infos, err := read(ctx, r, found, entry.of)
		for n, i := range infos {
			if i.User != found[n].user {
				missing = append(missing, found[n])
			}
		}
		return true, err
	})
	if err != nil {
		return 0, err
	}
	var n atomic.Int64
	err = forEach(missing, func(e entry) error {
		stale, err := r.settle(ctx, e.user, e.session) // what was read may be a replica's
		if stale && err == nil {
			n.Add(1)
		}
		return err
	})
	return int(n.Load()), err
}

func (r *redisStore) Homed(ctx context.Context) (homed []Info, err error) {
	pairs, err := bounded(ctx, r.opTimeout, "list", func(ctx context.Context) ([]string, error) {
		return r.rdb.SMembers(ctx, r.index("node", r.node)).Result()
	})
	if err != nil {
		return nil, err
	}
	var stale []any
	for some := range slices.Chunk(pairs, batch) {
		infos, err := read(ctx, r, some, func(p string) string { _, session, _ := unpair(p); return session })
		if err != nil {
			return nil, err
		}
		for n, i := range infos {
			if i.Home.Node == r.node && pair(i.Home.Conn, i.Session) == some[n] {
				homed = append(homed, i)
			} else {
				stale = append(stale, some[n])
			}
		}
	}
	r.leave(ctx, r.node, stale...)
	return homed, nil
}

func (r *redisStore) Accept(ctx context.Context, session, conn, id, owner string, patience time.Duration) (Claim, error) {
	answer, err := r.store(ctx, "accept", r.keys(session, "s", "in"), conn, id, owner, patience.Milliseconds())
	if err != nil {
		return Claim{}, err
	}
	words, err := said(answer)
	if err != nil {
		return Claim{}, err
	}
	switch {
	case words[0] == "ACCEPTED":
		return Claim{State: Accepted}, nil
	case words[0] == "BUSY":
		return Claim{State: InProgress}, nil
	case len(words) > 1:
		return Claim{Done, []byte(str(words[1]))}, nil
	}
	return Claim{State: Done}, nil
}

func (r *redisStore) Complete(ctx context.Context, session, id, owner string, outcome []byte, answered ...string) error {
	kept := append([]byte{'+'}, outcome...)
	if outcome == nil {
		kept = []byte{'-'}
	}
	args := []any{id, owner, kept}
	for _, request := range answered {
		args = append(args, request)
	}
	answer, err := r.store(ctx, "complete", r.keys(session, "s", "in", "taken"), args...)
	if err == nil {
		_, err = said(answer)
	}
	return err
}

func (r *redisStore) Release(ctx context.Context, session, id, owner string) error {
	_, err := r.run(ctx, "release", r.keys(session, "in"), id, owner)
	return err
}

func (r *redisStore) Forget(ctx context.Context, session string, ids ...string) error {
	for some := range slices.Chunk(slices.Clone(ids), batch) {
		_, err := bounded(ctx, r.opTimeout, "forget", func(ctx context.Context) (int64, error) {
			n, err := r.rdb.HDel(ctx, r.keys(session, "in")[0], some...).Result()
			rediserr.Seen(ctx, r.rdb, err)
			return n, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *redisStore) Put(ctx context.Context, session string, m Message, correlation []byte) (Home, error) {
	kind := "mMrR"[:2]
	if m.Request {
		kind = "mMrR"[2:]
	}
	body := []byte{kind[0]}
	if m.Payload != nil {
		body = append([]byte{kind[1]}, m.Payload...)
	}
	args := []any{m.ID, body, r.channel(session)}
	if correlation != nil {
		args = append(args, slices.Clone(correlation)) // a call that is left behind reads it later
	}
	answer, err := r.store(ctx, "put", r.keys(session, "s", "out", "pend", "gone", "req"), args...)
	if err != nil {
		return Home{}, err
	}
	words, err := said(answer)
	if err != nil {
		return Home{}, err
	}
	return Home{str(words[1]), str(words[2])}, nil
}

func (r *redisStore) Fetch(ctx context.Context, session, conn string, most int) ([]Message, error) {
	words, err := r.ask(ctx, "fetch", r.keys(session, "s", "out", "tries", "pend"), conn, min(most, batch))
	if err != nil {
		return nil, err
	}
	return messages(words[1:]), nil
}

// messages reads id, message and tries of each.
func messages(words []any) []Message {
	found := make([]Message, 0, len(words)/3)
	for some := range slices.Chunk(words, 3) {
		body := str(some[1])
		if body == "" {
			continue // none that we put
		}
		tries, _ := strconv.Atoi(str(some[2]))
		m := Message{ID: str(some[0]), Request: body[0] == 'R' || body[0] == 'r', Attempts: tries}
		if body[0] == 'M' || body[0] == 'R' {
			m.Payload = []byte(body[1:])
		}
		found = append(found, m)
	}
	return found
}

// inBatches runs a script for ids, as many at a time as Lua can unpack.
func (r *redisStore) inBatches(ctx context.Context, script string, keys []string, first []any, ids []string) error {
	for some := range slices.Chunk(ids, batch) {
		args := slices.Clone(first)
		for _, id := range some {
			args = append(args, id)
		}
		if _, err := r.ask(ctx, script, keys, args...); err != nil {
			return err
		}
	}
	return nil
}

func (r *redisStore) Attempted(ctx context.Context, session, conn string, ids ...string) error {
	return r.inBatches(ctx, "attempted", r.keys(session, "s", "tries", "pend", "sent"), []any{conn}, ids)
}

func (r *redisStore) Delivered(ctx context.Context, session string, ids ...string) error {
	return r.inBatches(ctx, "delivered", r.keys(session, "out", "tries", "pend", "sent", "dead", "gone"), nil, ids)
}

func (r *redisStore) Bury(ctx context.Context, session, conn string, ids ...string) error {
	return r.inBatches(ctx, "bury", r.keys(session, "s", "pend", "sent", "dead"), []any{conn}, ids)
}

func (r *redisStore) Buried(ctx context.Context, session string) ([]Message, error) {
	words, err := r.ask(ctx, "buried", r.keys(session, "s", "out", "tries", "dead"))
	if err != nil {
		return nil, err
	}
	return messages(words[1:]), nil
}

func (r *redisStore) Revive(ctx context.Context, session string, ids ...string) error {
	return r.inBatches(ctx, "revive", r.keys(session, "s", "tries", "pend", "dead"), []any{r.channel(session)}, ids)
}

func (r *redisStore) Take(ctx context.Context, session, id, answer string) ([]byte, bool, error) {
	correlation, err := r.run(ctx, "take", r.keys(session, "req", "taken"), id, answer)
	if err != nil || correlation == nil {
		return nil, false, err
	}
	return []byte(str(correlation)), true, nil
}
