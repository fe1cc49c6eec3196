package main

import (
	"bufio"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
)

// table lists the cases of one or more systems, numbered from 1. A row is
// system, number, tests separated by spaces, reason, with tabs between; either
// tests or reason. Comments declare the rest: "# MHV 34" a system and its number
// of cases, "# package P" where tests named without a package are.
type table struct {
	systems []string
	size    map[string]int
	pkg     string
	rows    []row
}

type row struct {
	line   int
	system string
	number int
	tests  []string
	reason string
}

var (
	declaresPackage = regexp.MustCompile(`^# package (\S+)$`)
	declaresSystem  = regexp.MustCompile(`^# (\S+) (\d+)$`)
	bareName        = regexp.MustCompile(`^(Test|Example|Fuzz)`)
)

func readTable(in io.Reader) (table, error) {
	t := table{size: map[string]int{}}
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		switch {
		case strings.TrimSpace(line) == "":
		case strings.HasPrefix(line, "#"):
			t.declare(line)
		default:
			r, err := t.readRow(line)
			if err != nil {
				return table{}, fmt.Errorf("line %d: %w", n, err)
			}
			r.line = n
			t.rows = append(t.rows, r)
		}
	}
	if err := lines.Err(); err != nil {
		return table{}, err
	}
	if len(t.systems) == 0 {
		return table{}, fmt.Errorf("no comment declares a system and its number of cases")
	}
	return t, nil
}

func (t *table) declare(comment string) {
	if m := declaresPackage.FindStringSubmatch(comment); m != nil {
		t.pkg = m[1]
		return
	}
	if m := declaresSystem.FindStringSubmatch(comment); m != nil {
		t.systems = append(t.systems, m[1])
		t.size[m[1]], _ = strconv.Atoi(m[2])
	}
}

func (t *table) readRow(line string) (row, error) {
	cols := strings.Split(line, "\t")
	if len(cols) != 3 && len(cols) != 4 {
		return row{}, fmt.Errorf("%d columns, want 3 or 4", len(cols))
	}
	number, err := strconv.Atoi(cols[1])
	if err != nil {
		return row{}, fmt.Errorf("number of the case: %w", err)
	}
	r := row{system: cols[0], number: number}
	for _, test := range strings.Fields(cols[2]) {
		if bareName.MatchString(test) {
			test = t.pkg + "." + test
		}
		r.tests = append(r.tests, test)
	}
	if len(cols) == 4 {
		r.reason = strings.TrimSpace(cols[3])
	}
	return r, nil
}

// check returns what is wrong, a line for each problem.
func (t *table) check(res results) (problems []string) {
	problem := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	seen := map[string]map[int]bool{}
	for _, system := range t.systems {
		seen[system] = map[int]bool{}
	}
	for _, r := range t.rows {
		where := fmt.Sprintf("line %d: %s %d", r.line, r.system, r.number)
		switch numbers := seen[r.system]; {
		case numbers == nil:
			problem("%s: system not declared", where)
		case r.number < 1 || r.number > t.size[r.system]:
			problem("%s: not in 1..%d", where, t.size[r.system])
		case numbers[r.number]:
			problem("%s: listed twice", where)
		default:
			numbers[r.number] = true
		}
		if (len(r.tests) > 0) == (r.reason != "") {
			problem("%s: wants tests or a reason, and not both", where)
		}
		for _, test := range r.tests {
			switch res.worst(test) {
			case "pass":
			case "":
				problem("%s: did not run: %s", where, test)
			case "skip":
				problem("%s: skipped, or something in it: %s", where, test)
			default:
				problem("%s: failed: %s", where, test)
			}
		}
	}
	for _, system := range t.systems {
		for n := 1; n <= t.size[system]; n++ {
			if !seen[system][n] {
				problem("%s %d: missing", system, n)
			}
		}
	}
	return problems
}

func (t *table) tally(system string) (shown, excused int) {
	for _, r := range t.rows {
		switch {
		case r.system != system:
		case r.reason != "":
			excused++
		default:
			shown++
		}
	}
	return shown, excused
}
