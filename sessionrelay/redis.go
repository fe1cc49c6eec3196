package sessionrelay

import (
	"context"
	"crypto/rand"
	"embed"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
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
	confirmed = 9e15             // the score of a place whose session exists
	placeTTL  = 30 * time.Second // of one whose session is being registered
	batch     = 500              // ids in one command or page
	parallel  = 16               // sessions asked for at once
)

// redisStore keeps each session in keys of one slot. Beside them stand three indexes,
// in slots of their own: of all sessions by the time of their last sign of life, of
// each user's, and of each node's. They are hints, written before a session is
// and cleared after it: whoever reads one looks at the session.
type redisStore struct {
	redisConfig
	rdb   redis.UniversalClient
	node  string
	names keyname.Namer
	hub   *hub.Hub
}

// NewRedisStore returns a Store of sessions in Redis 6.2 or later for node, which must
// be the only one of its name. It does no I/O. rdb stays the caller's, and must be
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
		if err != nil && !errors.Is(err, redis.Nil) {
			rediserr.Seen(ctx, r.rdb, err)
			return nil, err
		}
		n, err := conn.Wait(ctx, r.replicas, r.opTimeout*9/10).Result()
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

func (r *redisStore) Register(ctx context.Context, h Hello, conn string, limit int) (Info, Home, error) {
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
			_, _ = bounded(ctx, r.opTimeout, "give a place back", func(ctx context.Context) (int64, error) {
				return r.rdb.ZRem(ctx, r.index("user", h.User), h.Session).Result()
			})
		}
		return Info{}, Home{}, err
	}
	r.place(ctx, h)
	return Info{
		Session: h.Session, User: h.User, Lib: h.Lib, App: h.App, Version: h.Version,
		Created: when(words[1]), Live: when(words[2]), Home: Home{r.node, conn},
	}, Home{str(words[3]), str(words[4])}, nil
}

// reserve takes a place among the user's sessions, and enters the session into the
// index of all: before it exists, so that no session is there which nobody finds.
func (r *redisStore) reserve(ctx context.Context, h Hello, limit int) error {
	free := func() (bool, error) {
		v, err := r.run(ctx, "reserve", []string{r.index("user", h.User)}, h.Session, limit, placeTTL.Milliseconds())
		return v == int64(1), err
	}
	ok, err := free()
	if err == nil && !ok {
		if err = r.vacate(ctx, h); err == nil {
			ok, err = free()
		}
	}
	switch {
	case err != nil:
		return err
	case !ok:
		return r.entitled(ctx, h)
	}
	_, err = bounded(ctx, r.opTimeout, "enter", func(ctx context.Context) (int64, error) {
		return r.rdb.ZAddNX(ctx, r.index("all", ""), redis.Z{Score: float64(time.Now().UnixMilli()), Member: h.Session}).Result()
	})
	return err
}

// vacate frees the places of a user's sessions that do not exist any more.
func (r *redisStore) vacate(ctx context.Context, h Hello) error {
	places, err := bounded(ctx, r.opTimeout, "read places", func(ctx context.Context) ([]string, error) {
		return r.rdb.ZRangeByScore(ctx, r.index("user", h.User), &redis.ZRangeBy{Min: strconv.FormatFloat(confirmed, 'f', 0, 64), Max: "+inf"}).Result()
	})
	if err != nil {
		return err
	}
	var stale []any
	for _, session := range places {
		info, err := r.Lookup(ctx, session)
		switch {
		case errors.Is(err, ErrGone), err == nil && info.User != h.User:
			stale = append(stale, session)
		case err != nil:
			return err
		}
	}
	if len(stale) == 0 {
		return nil
	}
	_, err = bounded(ctx, r.opTimeout, "free places", func(ctx context.Context) (int64, error) {
		return r.rdb.ZRem(ctx, r.index("user", h.User), stale...).Result()
	})
	return err
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

// place enters a session that exists into the indexes. What fails is made good by the
// next sign of life.
func (r *redisStore) place(ctx context.Context, h Hello) {
	_, _ = bounded(ctx, r.opTimeout, "place", func(ctx context.Context) (struct{}, error) {
		_, err := r.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			p.ZAdd(ctx, r.index("user", h.User), redis.Z{Score: confirmed, Member: h.Session})
			p.SAdd(ctx, r.index("node", r.node), h.Session)
			return nil
		})
		return struct{}{}, err
	})
}

func (r *redisStore) Deregister(ctx context.Context, session, conn string) error {
	if _, err := r.run(ctx, "deregister", r.keys(session, "s", "was"), r.node, conn); err != nil {
		return err
	}
	_, _ = bounded(ctx, r.opTimeout, "leave", func(ctx context.Context) (int64, error) { // a hint that is left is found by Homed
		return r.rdb.SRem(ctx, r.index("node", r.node), session).Result()
	})
	return nil
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
// whatever. state is REMOVED, LIVE or NONE.
func (r *redisStore) remove(ctx context.Context, session string, idle time.Duration) (state string, live string, err error) {
	ms := int64(-1)
	if idle >= 0 {
		ms = idle.Milliseconds()
	}
	words, err := r.ask(ctx, "remove", r.keys(session, every...), rand.Text(), r.channel(session), ms)
	if err != nil {
		return "", "", err
	}
	switch state = str(words[0]); state {
	case "LIVE":
		return state, str(words[1]), nil
	case "REMOVED":
		r.forget(ctx, session, str(words[1]), str(words[2]))
	default:
		r.forget(ctx, session, "", "")
	}
	return state, "", nil
}

// forget takes a session that does not exist out of the indexes. What fails is left to
// Scavenge.
func (r *redisStore) forget(ctx context.Context, session, user, node string) {
	_, _ = bounded(ctx, r.opTimeout, "forget", func(ctx context.Context) (struct{}, error) {
		_, err := r.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			p.ZRem(ctx, r.index("all", ""), session)
			if user != "" {
				p.ZRem(ctx, r.index("user", user), session)
			}
			if node != "" {
				p.SRem(ctx, r.index("node", node), session)
			}
			return nil
		})
		return struct{}{}, err
	})
}

func (r *redisStore) List(ctx context.Context, f Filter, each func(Info) bool) error {
	if f.User != "" {
		sessions, err := bounded(ctx, r.opTimeout, "list", func(ctx context.Context) ([]string, error) {
			return r.rdb.ZRange(ctx, r.index("user", f.User), 0, -1).Result()
		})
		if err != nil {
			return err
		}
		_, err = r.show(ctx, sessions, f, each)
		return err
	}
	return r.pages(ctx, func(sessions []string) (bool, error) { return r.show(ctx, sessions, f, each) })
}

// pages calls f with all sessions there may be, some at a time, until it returns false.
func (r *redisStore) pages(ctx context.Context, f func(sessions []string) (bool, error)) error {
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
		var sessions []string
		for i := 0; i < len(p.members); i += 2 { // each with its score
			sessions = append(sessions, p.members[i])
		}
		if more, err := f(sessions); err != nil || !more || p.cursor == 0 {
			return err
		}
		cursor = p.cursor
	}
}

// show reads sessions and calls each with those that exist and f chooses. It reads them
// in one trip, replicas included.
func (r *redisStore) show(ctx context.Context, sessions []string, f Filter, each func(Info) bool) (more bool, err error) {
	for some := range slices.Chunk(sessions, batch) {
		found, err := bounded(ctx, r.opTimeout, "list", func(ctx context.Context) ([]redis.Cmder, error) {
			return r.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
				for _, session := range some {
					p.HGetAll(ctx, r.keys(session, "s")[0])
				}
				return nil
			})
		})
		if err != nil {
			return false, err
		}
		for _, cmd := range found {
			info, ok := infoOf(cmd.(*redis.MapStringStringCmd).Val())
			if ok && f.chooses(info) && !each(info) {
				return false, nil
			}
		}
	}
	return true, nil
}

// chooses reports whether f chooses the session.
func (f Filter) chooses(i Info) bool {
	return (!f.Connected || i.Home != Home{}) && (f.User == "" || f.User == i.User) &&
		(f.App == "" || f.App == i.App) && i.Version >= f.Since
}

// forEach calls f with each of sessions, some at once, and returns the first error.
func forEach(sessions []string, f func(session string) error) error {
	var mu sync.Mutex
	var first error
	var all sync.WaitGroup
	todo := make(chan string)
	for range min(parallel, len(sessions)) {
		all.Go(func() {
			for session := range todo {
				if err := f(session); err != nil {
					mu.Lock()
					first = errors.Join(first, err)
					mu.Unlock()
				}
			}
		})
	}
	for _, session := range sessions {
		mu.Lock()
		bad := first != nil
		mu.Unlock()
		if bad {
			break // the others would fail likewise, each after a timeout
		}
		todo <- session
	}
	close(todo)
	all.Wait()
	return first
}

func (r *redisStore) Alive(ctx context.Context, sessions []string) (unknown []string, err error) {
	var mu sync.Mutex
	users := map[string][]redis.Z{}
	live := make([]redis.Z, 0, len(sessions))
	err = forEach(sessions, func(session string) error {
		user, err := r.run(ctx, "alive", r.keys(session, "s"))
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if user == nil {
			unknown = append(unknown, session)
			return nil
		}
		live = append(live, redis.Z{Score: float64(time.Now().UnixMilli()), Member: session})
		users[str(user)] = append(users[str(user)], redis.Z{Score: confirmed, Member: session})
		return nil
	})
	if err != nil {
		return nil, err
	}
	for some := range slices.Chunk(live, batch) {
		if err := r.zadd(ctx, map[string][]redis.Z{r.index("all", ""): some}); err != nil {
			return nil, err
		}
	}
	for some := range slices.Chunk(slices.Sorted(maps.Keys(users)), batch) {
		places := map[string][]redis.Z{}
		for _, user := range some {
			places[r.index("user", user)] = users[user]
		}
		if err := r.zadd(ctx, places); err != nil {
			return nil, err
		}
	}
	return unknown, nil
}

func (r *redisStore) zadd(ctx context.Context, members map[string][]redis.Z) error {
	_, err := bounded(ctx, r.opTimeout, "vouch", func(ctx context.Context) ([]redis.Cmder, error) {
		return r.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			for key, zs := range members {
				p.ZAdd(ctx, key, zs...)
			}
			return nil
		})
	})
	return err
}

// Expire reads candidates from the index, whose times are this process's and only say
// where to look; the session's own time is the store's.
func (r *redisStore) Expire(ctx context.Context, idle time.Duration) (expired []string, err error) {
	var mu sync.Mutex
	for {
		before := strconv.FormatInt(time.Now().Add(-idle).UnixMilli(), 10)
		candidates, err := bounded(ctx, r.opTimeout, "expire", func(ctx context.Context) ([]string, error) {
			return r.rdb.ZRangeByScore(ctx, r.index("all", ""), &redis.ZRangeBy{Min: "-inf", Max: before, Count: batch}).Result()
		})
		if err != nil || len(candidates) == 0 {
			return expired, err
		}
		err = forEach(candidates, func(session string) error {
			state, live, err := r.remove(ctx, session, idle)
			switch {
			case err != nil:
				return err
			case state == "REMOVED":
				mu.Lock()
				expired = append(expired, session)
				mu.Unlock()
			case state == "LIVE":
				ms, _ := strconv.ParseFloat(live, 64)
				return r.zadd(ctx, map[string][]redis.Z{r.index("all", ""): {{Score: max(ms, float64(time.Now().Add(-idle/2).UnixMilli())), Member: session}}})
			}
			return nil
		})
		if err != nil {
			return expired, err
		}
	}
}

// Scavenge looks at the indexes: a session takes all else with it.
func (r *redisStore) Scavenge(ctx context.Context) (removed int, err error) {
	var mu sync.Mutex
	err = r.pages(ctx, func(sessions []string) (bool, error) {
		return true, forEach(sessions, func(session string) error {
			_, err := r.Lookup(ctx, session)
			if !errors.Is(err, ErrGone) {
				return err
			}
			r.forget(ctx, session, "", r.node)
			mu.Lock()
			defer mu.Unlock()
			removed++
			return nil
		})
	})
	return removed, err
}

func (r *redisStore) Homed(ctx context.Context) (homed []Info, err error) {
	sessions, err := bounded(ctx, r.opTimeout, "list", func(ctx context.Context) ([]string, error) {
		return r.rdb.SMembers(ctx, r.index("node", r.node)).Result()
	})
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	_, err = r.show(ctx, sessions, Filter{}, func(i Info) bool {
		if i.Home.Node == r.node {
			homed, found[i.Session] = append(homed, i), true
		}
		return true
	})
	var stale []any
	for _, session := range sessions {
		if !found[session] {
			stale = append(stale, session)
		}
	}
	if err == nil && len(stale) > 0 {
		_, _ = bounded(ctx, r.opTimeout, "leave", func(ctx context.Context) (int64, error) {
			return r.rdb.SRem(ctx, r.index("node", r.node), stale...).Result()
		})
	}
	return homed, err
}

func (r *redisStore) Accept(ctx context.Context, session, id, owner string, patience time.Duration) (Claim, error) {
	answer, err := r.store(ctx, "accept", r.keys(session, "s", "in"), id, owner, patience.Milliseconds())
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

func (r *redisStore) Complete(ctx context.Context, session, id, owner string, outcome []byte) error {
	kept := append([]byte{'+'}, outcome...)
	if outcome == nil {
		kept = []byte{'-'}
	}
	answer, err := r.store(ctx, "complete", r.keys(session, "s", "in"), id, owner, kept)
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
	for some := range slices.Chunk(ids, batch) {
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
	kind := byte('M')
	if m.Request {
		kind = 'R'
	}
	args := []any{m.ID, append([]byte{kind}, m.Payload...), r.channel(session)}
	if correlation != nil {
		args = append(args, correlation)
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
		found = append(found, Message{ID: str(some[0]), Request: body[0] == 'R', Attempts: tries, Payload: []byte(body[1:])})
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

func (r *redisStore) Take(ctx context.Context, session, id string) ([]byte, bool, error) {
	answer, err := r.run(ctx, "take", r.keys(session, "req", "taken"), id, rand.Text())
	if err != nil || answer == nil {
		return nil, false, err
	}
	return []byte(str(answer)), true, nil
}
