package linearizable_test

import (
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/assert"

	"github.com/sessionlock/sessionlock/sessionrelay"
)

// call is one of a history of one session. It took effect at some moment between begin
// and end; if it was lost, at any later one or never.
type call struct {
	begin, end int64 // ticks of one counter
	op         op
	user       string            // who registers
	home       sessionrelay.Home // that registers, or is given up
	bit        uint64            // that stands for home among those of the session
	saw        sessionrelay.Home // the home before, or the one looked up
	whose      string            // the session that was looked up
	err        error
}

type op string

const (
	register   op = "register"
	deregister op = "deregister"
	lookup     op = "lookup"
	refused    op = "refused" // a register that met ErrMoved
)

func (c call) String() string {
	return fmt.Sprintf("%3d-%3d %s %s %v: %v of %q, %v", c.begin, c.end, c.op, c.user, c.home, c.saw, c.whose, c.err)
}

func (c call) lost() bool { return errors.Is(c.err, sessionrelay.ErrUnavailable) }

// registry is what a session is after some calls; without a user there is none.
type registry struct {
	user         string
	home, before sessionrelay.Home // before is the one that home has replaced
	bit, over    uint64            // of home; of all that are none any more
}

// after returns the registry after c, and whether c could have seen what it saw.
func (r registry) after(c call) (registry, bool) {
	another := r.user != "" && r.user != c.user
	switch {
	case c.op == lookup && r.user == "":
		return r, errors.Is(c.err, sessionrelay.ErrGone)
	case c.op == lookup:
		return r, c.err == nil && c.saw == r.home && c.whose == r.user
	case c.op == refused:
		return r, !another && r.over&c.bit != 0
	case c.op == deregister:
		r.over |= c.bit
		if r.home == c.home {
			r.home, r.bit = sessionrelay.Home{}, 0
		}
		return r, c.err == nil || c.lost()
	case another:
		return r, errors.Is(c.err, sessionrelay.ErrWrongUser) || c.lost()
	case r.over&c.bit != 0:
		return r, c.lost()
	case r.home != c.home:
		r = registry{c.user, c.home, r.home, c.bit, r.over | r.bit}
	}
	return r, c.err == nil && c.saw == r.before || c.lost()
}

var model = porcupine.Model{
	Init: func() any { return registry{} },
	Step: func(state, input, _ any) (bool, any) {
		next, ok := state.(registry).after(input.(call))
		return ok, next
	},
}

// operations are calls as porcupine wants them. With resent, a Register that was refused
// may have been the home before: its first reply was lost, another connection replaced
// it, and the request was sent again.
func operations(calls []call, resent bool) []porcupine.Operation {
	var all []porcupine.Operation
	add := func(c call) {
		all = append(all, porcupine.Operation{Input: c, Call: c.begin, Return: c.end})
	}
	for _, c := range calls {
		switch {
		case c.lost() && c.op == lookup:
			continue
		case c.lost():
			c.end = math.MaxInt64
		case errors.Is(c.err, sessionrelay.ErrMoved):
			if resent {
				first := c
				first.err = sessionrelay.ErrUnavailable
				add(first)
			}
			c.op = refused
		}
		add(c)
	}
	return all
}

func check(calls []call, resent bool) porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(model, operations(calls, resent), time.Minute)
}

func TestModelTellsHistoriesApart(t *testing.T) {
	home := func(s string) sessionrelay.Home {
		if s == "" {
			return sessionrelay.Home{}
		}
		return sessionrelay.Home{Node: s, Conn: s}
	}
	reg := func(begin, end int64, who, saw string) call {
		return call{begin: begin, end: end, op: register, user: "bob", home: home(who), bit: 1 << (who[0] - 'a'), saw: home(saw)}
	}
	dereg := func(begin, end int64, who string) call {
		return call{begin: begin, end: end, op: deregister, home: home(who), bit: 1 << (who[0] - 'a')}
	}
	look := func(begin, end int64, saw string) call {
		return call{begin: begin, end: end, op: lookup, saw: home(saw), whose: "bob"}
	}
	failed := func(c call, err error) call { c.err = err; return c }
	gone := func(begin, end int64) call { return failed(look(begin, end, ""), sessionrelay.ErrGone) }
	lost := func(c call) call { return failed(c, sessionrelay.ErrUnavailable) }
	moved := func(c call) call { return failed(c, sessionrelay.ErrMoved) }
	eve := func(c call) call { c.user = "eve"; return c }
	refused := func(c call) call { return failed(eve(c), sessionrelay.ErrWrongUser) }
	for name, tt := range map[string]struct {
		history []call
		want    bool
		once    bool // also if nothing is ever sent again
	}{
		"nothing":                            {nil, true, true},
		"one after the other":                {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), look(5, 6, "b")}, true, true},
		"a stale lookup":                     {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), look(5, 6, "a")}, false, false},
		"a lookup meanwhile":                 {[]call{reg(1, 2, "a", ""), reg(3, 6, "b", "a"), look(4, 5, "a")}, true, true},
		"back and forth":                     {[]call{reg(1, 2, "a", ""), reg(3, 9, "b", "a"), look(4, 5, "b"), look(6, 7, "a")}, false, false},
		"two with the same home before":      {[]call{reg(1, 2, "a", ""), reg(3, 6, "b", "a"), reg(4, 5, "c", "a")}, false, false},
		"a late deregister":                  {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), dereg(5, 6, "a"), look(7, 8, "b")}, true, true},
		"a late deregister with effect":      {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), dereg(5, 6, "a"), look(7, 8, "")}, false, false},
		"registered twice":                   {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), reg(5, 6, "b", "a"), look(7, 8, "b")}, true, true},
		"registered twice, as if anew":       {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), reg(5, 6, "b", "b")}, false, false},
		"replaced, and refused":              {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), moved(reg(5, 6, "a", ""))}, true, true},
		"given up, and refused":              {[]call{dereg(1, 2, "a"), moved(reg(3, 4, "a", "")), gone(5, 6)}, true, true},
		"refused, and never over":            {[]call{moved(reg(1, 2, "a", ""))}, false, false},
		"replaced before it was answered":    {[]call{moved(reg(1, 4, "a", "")), reg(2, 3, "b", "a")}, true, false},
		"replaced after it was answered":     {[]call{moved(reg(1, 2, "a", "")), reg(3, 4, "b", "a")}, false, false},
		"replaced, and back":                 {[]call{reg(1, 2, "a", ""), reg(3, 4, "b", "a"), reg(5, 6, "a", "b")}, false, false},
		"none yet":                           {[]call{gone(1, 2), reg(3, 4, "a", "")}, true, true},
		"none, though there is":              {[]call{reg(1, 2, "a", ""), gone(3, 4)}, false, false},
		"another user":                       {[]call{reg(1, 2, "a", ""), refused(reg(3, 4, "b", "")), look(5, 6, "a")}, true, true},
		"another user, of none":              {[]call{refused(reg(1, 2, "b", ""))}, false, false},
		"another user, let in":               {[]call{reg(1, 2, "a", ""), eve(reg(3, 4, "b", "a"))}, false, false},
		"another user, refused with effect":  {[]call{reg(1, 2, "a", ""), refused(reg(3, 4, "b", "")), look(5, 6, "")}, false, false},
		"another user, told it was replaced": {[]call{reg(1, 2, "a", ""), dereg(3, 4, "b"), eve(moved(reg(5, 6, "b", "")))}, false, false},
		"the first user is refused":          {[]call{eve(reg(1, 2, "a", "")), reg(3, 4, "b", "a")}, false, false},
		"whose it is not":                    {[]call{eve(reg(1, 2, "a", "")), look(3, 4, "a")}, false, false},
		"lost, with effect later":            {[]call{lost(reg(1, 2, "a", "")), gone(3, 4), look(5, 6, "a")}, true, true},
		"lost, without effect":               {[]call{lost(reg(1, 2, "a", "")), reg(3, 4, "b", "")}, true, true},
		"lost, of another user":              {[]call{reg(1, 2, "a", ""), lost(eve(reg(3, 4, "b", ""))), look(5, 6, "b")}, false, false},
		"lost, and its effect gone and back": {[]call{lost(reg(1, 2, "a", "")), look(3, 4, "a"), reg(5, 6, "b", "a"), look(7, 8, "a")}, false, false},
		"given up, lost, with effect later":  {[]call{reg(1, 2, "a", ""), lost(dereg(3, 4, "a")), look(5, 6, "a"), look(7, 8, "")}, true, true},
		"a lookup that was lost":             {[]call{lost(look(1, 2, "x"))}, true, true},
		"an error that nobody has heard of":  {[]call{failed(reg(1, 2, "a", ""), errors.New("x"))}, false, false},
	} {
		result := map[bool]porcupine.CheckResult{true: porcupine.Ok, false: porcupine.Illegal}
		assert.Equal(t, result[tt.want], check(tt.history, true), name)
		assert.Equal(t, result[tt.once], check(tt.history, false), "%s, with nothing sent again", name)
	}
}
