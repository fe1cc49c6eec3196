package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sessionlock/sessionlock/examples/postgres/pgserver"
	"github.com/sessionlock/sessionlock/internal/redistest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == nodeArg { // started by startNodes
		main()
	}
	os.Exit(m.Run())
}

// mustStart skips the test without a PostgreSQL, or fails it when
// SESSIONLOCK_REQUIRE_REDIS=1.
func mustStart(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, pgserver.ErrMissing) && os.Getenv("SESSIONLOCK_REQUIRE_REDIS") != "1" {
		t.Skipf("%v; THIS TEST DID NOT RUN", err)
	}
	require.NoError(t, err)
}

func TestExampleSeesWhatItExpects(t *testing.T) {
	var table bytes.Buffer
	file := filepath.Join(t.TempDir(), "picture.svg")
	err := run(t.Context(), settings{svg: file}, io.MultiWriter(&table, t.Output()))
	mustStart(t, err)
	titles := regexp.MustCompile(`(?m)^\d\. `).FindAllString(table.String(), -1)
	assert.Len(t, titles, len(acts())+1)
	assert.NotContains(t, table.String(), "WRONG")
	picture, err := os.ReadFile(file)
	require.NoError(t, err)
	assertPicture(t, picture)
}

func TestLastRequestGoesOn(t *testing.T) {
	redistest.Each(t, func(t *testing.T, rdb *redis.Client) {
		s, err := setUp(context.WithoutCancel(t.Context()), rdb.Options().Addr) // its processes outlive the test's body
		t.Cleanup(func() { assert.NoError(t, s.clear(), "no node has failed or seen a data race") })
		mustStart(t, err)

		statuses, took, err := s.often(t.Context())
		require.NoError(t, err)
		assert.Equal(t, map[string]int{"200, 409": times}, statuses, "of the newer and the older")
		require.Len(t, took, times, "each older request is told")
		slices.Sort(took)
		assert.Less(t, took[times/2], 5*10*time.Millisecond)

		for path, check := range map[string]func(*testing.T, story){
			"unguarded": assertLost, "polite": assertInterrupted, "rude": assertRefused, "stuck": assertRefused,
		} {
			t.Run(path, func(t *testing.T) {
				st, err := s.play(t.Context(), path)
				require.NoError(t, err)
				assert.Equal(t, []string{"200", "200"}, []string{st.status(2), st.status(3)}, "of the newer requests")
				waited, ok := st.between(3, answered, 1, answered)
				assert.True(t, ok && (path == "polite" || waited > 0), "the first one is late")
				check(t, st)
			})
		}
	})
}

// Without the guard the update is lost.
func assertLost(t *testing.T, st story) {
	e, _ := st.find(3, updated)
	assert.Equal(t, []string{"lamp", "book"}, e.Items, "the book was in the cart, and its request answered")
	assert.Equal(t, "1 row", st.update())
	assert.Equal(t, "lamp", st.cart)
	assert.Equal(t, "200", st.status(1), "the old request says that all is well")
}

func assertInterrupted(t *testing.T, st story) {
	assertTold(t, st)
	assert.Less(t, st.worked(), patience+promptly)
	_, ok := st.find(1, sent)
	assert.False(t, ok, "it writes nothing")
	assert.Equal(t, "lamp, book", st.cart)
}

// Who does not listen is refused by the epoch in the statement.
func assertRefused(t *testing.T, st story) {
	assertTold(t, st)
	assert.GreaterOrEqual(t, st.worked(), slow)
	assert.Equal(t, superseded, st.commit())
	assert.Equal(t, "0 rows", st.update(), "it does try, when the book is in the cart")
	assert.Equal(t, "lamp, book", st.cart)
}

func assertTold(t *testing.T, st story) {
	after, ok := st.told()
	assert.True(t, ok && after <= promptly, "told: %v, after %v", ok, after)
	assert.Equal(t, "409", st.status(1))
}

// made is what an act would be if all went well.
func made(a act) story {
	zero := time.Unix(1e9, 0)
	st := story{start: zero, cart: a.want.cart}
	add := func(ms int, e event) {
		e.At = zero.Add(time.Duration(ms) * time.Millisecond)
		st.events = append(st.events, e)
	}
	request := func(n, from, to int, items ...string) {
		add(from, event{Request: n, What: asked})
		add(from+1, event{Request: n, What: arrived})
		add(from+2, event{Request: n, What: registered})
		if items != nil {
			add(to-4, event{Request: n, What: sent})
			add(to-3, event{Request: n, What: updated, Rows: 1, Items: items})
			add(to-2, event{Request: n, What: left})
			add(to-1, event{Request: n, What: answered, Status: "200"})
		}
	}
	request(1, 0, 0)
	request(2, 600, 800, "lamp")
	if a.want.told {
		add(603, event{Request: 1, What: told})
	}
	end := 603
	request(3, 1050, 1250, "lamp", "book")
	if !a.want.stops {
		end = 2002
		add(end, event{Request: 1, What: sent})
		late := event{Request: 1, What: updated, Items: []string{"lamp"}}
		if a.want.cart == loses {
			late.Rows = 1
		}
		add(end, late)
	}
	if a.want.commit != "" {
		add(end, event{Request: 1, What: committed, Err: a.want.commit})
	}
	add(end, event{Request: 1, What: left})
	add(end+1, event{Request: 1, What: answered, Status: a.want.status})
	return st
}

func TestStoryWhoseTimesWereNotKeptIsToldAgain(t *testing.T) {
	assert.True(t, made(acts()[2]).inTime())
	for _, busy := range []struct {
		request int
		what    string
	}{{1, registered}, {3, answered}} {
		st := made(acts()[2])
		for i := range st.events {
			if e := &st.events[i]; e.Request == busy.request && e.What == busy.what {
				e.At = e.At.Add(time.Second)
			}
		}
		assert.False(t, st.inTime(), busy.what)
	}
}

// The example would show nothing if it could not fail.
func TestEveryWrongNumberIsTold(t *testing.T) {
	unguarded, polite, rude := acts()[0], acts()[1], acts()[2]
	change := func(request int, what string, to func(*event)) func(*story) {
		return func(st *story) {
			for i := range st.events {
				if e := &st.events[i]; e.Request == request && e.What == what {
					to(e)
				}
			}
		}
	}
	none := func(request int, what string) func(*story) {
		return change(request, what, func(e *event) { e.What = "" })
	}
	later := func(d time.Duration) func(*event) { return func(e *event) { e.At = e.At.Add(d) } }
	status := func(s string) func(*event) { return func(e *event) { e.Status = s } }
	for _, tc := range []struct {
		name  string
		act   act
		wrong func(*story)
		want  string
	}{
		{"the retry fails", polite, change(2, answered, status("500")), "is answered 500, want 200"},
		{"nobody tells", rude, none(1, told), "never, want 1.00 s"},
		{"told late", rude, change(1, told, later(1200*time.Millisecond)), "1.20 s, want 1.00 s"},
		{"told without a guard", unguarded, func(st *story) {
			st.events = append(st.events, event{Request: 1, What: told, At: st.start.Add(time.Second)})
		}, "want never"},
		{"works on", polite, change(1, left, later(1200*time.Millisecond)), "1.80 s, want 1.60 s"},
		{"gives up", rude, change(1, left, later(-time.Second)), "1.00 s, want 2.00 s"},
		{"commits", rude, change(1, committed, func(e *event) { e.Err = "" }), "Commit returns nil, want superseded"},
		{"does not commit", rude, none(1, committed), "Commit returns , want superseded"},
		{"writes", rude, change(1, updated, func(e *event) { e.Rows = 1 }), "changes 1 row, want 0 rows"},
		{"writes nothing", unguarded, change(1, updated, func(e *event) { e.Rows = 0 }), "changes 0 rows, want 1 row"},
		{"does not try", rude, none(1, updated), "changes none is sent, want 0 rows"},
		{"tries too early", rude, change(1, sent, later(-time.Second)), "before the book came, want 0 rows"},
		{"no conflict", polite, change(1, answered, status("200")), "200, want 409"},
		{"lost all the same", polite, func(st *story) { st.cart = loses }, "lamp, want lamp, book"},
		{"nothing lost", unguarded, func(st *story) { st.cart = both }, "lamp, book, want lamp"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			st := made(tc.act)
			require.NoError(t, tell(io.Discard, tc.act.name, judge(tc.act.want, st)))
			tc.wrong(&st)
			err := tell(io.Discard, tc.act.name, judge(tc.act.want, st))
			require.Error(t, err)
			assert.Contains(t, err.Error(), tc.want)
			assert.NotContains(t, err.Error(), "\n", "one thing is wrong")
		})
	}
}

func TestEveryWrongFigureIsTold(t *testing.T) {
	all := func(d time.Duration) []time.Duration { return slices.Repeat([]time.Duration{d}, times) }
	good := map[string]int{"200, 409": times}
	require.NoError(t, tell(io.Discard, "", judgeOften(good, all(median))))
	for want, lines := range map[string][]line{
		"50.1 ms":               judgeOften(good, all(median+100*time.Microsecond)),
		"is told 20, want 21":   judgeOften(good, all(median)[1:]),
		"is told 0, want 21":    judgeOften(good, nil),
		"older 409 20, want 21": judgeOften(map[string]int{"200, 409": times - 1, "200, 500": 1}, all(median)),
	} {
		assert.ErrorContains(t, tell(io.Discard, "", lines), want)
	}
}

func assertPicture(t *testing.T, picture []byte) {
	t.Helper()
	require.NoError(t, xml.Unmarshal(picture, new(struct{})))
	for _, text := range []string{"1 row, the book is lost", "0 rows, the book stays", "told to stop", "200, too late", "409, too late", "prefers-color-scheme: dark"} {
		assert.True(t, bytes.Contains(picture, []byte(text)), text)
	}
}

// The picture in the docs is what this program draws, with the times of another run.
func TestPictureInTheDocsIsOfThisProgram(t *testing.T) {
	const howTo = "go -C examples/cart run . -svg ../../docs/last-request.svg"
	docs, err := os.ReadFile("../../docs/last-request.svg")
	require.NoError(t, err)
	drawn := draw(made(acts()[0]), made(acts()[2]))
	assertPicture(t, drawn)
	assertPicture(t, docs)
	number := regexp.MustCompile(`[0-9]+(\.[0-9]+)?`)
	shape := func(b []byte) []string { return strings.Split(number.ReplaceAllString(string(b), "N"), "\n") }
	want, got := shape(drawn), shape(docs)
	require.Len(t, got, len(want), howTo)
	for i := range want {
		require.Equal(t, want[i], got[i], howTo)
	}
}
