package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// results is what became of the tests of a run.
type results struct {
	outcome map[string]string // by "import/path.TestName/sub": pass, fail, skip; the worst if it ran twice
	broken  int               // packages that failed without a failed test: they did not build, or died
	text    string            // the lines worth reading
}

type event struct{ Action, Package, ImportPath, Test, Output string }

// rank orders outcomes from best to worst. A test that was started and never
// ended has the worst, because a package that dies reports nothing for it.
var rank = map[string]int{"pass": 1, "skip": 2, "fail": 3, "run": 4}

// readResults reads the events of one or more go test -json runs.
func readResults(in io.Reader) (results, error) {
	r := results{outcome: map[string]string{}}
	log := map[string]*strings.Builder{} // output not yet judged, by test, or by package
	var text strings.Builder
	dec := json.NewDecoder(in)
	for {
		var e event
		err := dec.Decode(&e)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return results{}, fmt.Errorf("read go test -json: %w", err)
		}
		r.add(e, log, &text)
	}
	for name, o := range r.outcome {
		if o == "run" {
			r.outcome[name] = "fail"
			fmt.Fprintf(&text, "did not end: %s\n", name)
		}
	}
	r.text = text.String()
	return r, nil
}

func (r *results) add(e event, log map[string]*strings.Builder, text *strings.Builder) {
	name := e.Package
	if e.Test != "" {
		name += "." + e.Test
	}
	if log[name] == nil {
		log[name] = &strings.Builder{}
	}
	switch e.Action {
	case "build-output":
		text.WriteString(e.Output)
	case "output":
		log[name].WriteString(e.Output)
	case "run":
		r.outcome[name] = "run"
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e, log[name].String(), text)
		} else {
			r.endTest(name, e.Action, log[name].String(), text)
		}
		delete(log, name)
	}
}

func (r *results) endTest(name, action, output string, text *strings.Builder) {
	if was := r.outcome[name]; was == "run" || rank[action] > rank[was] {
		r.outcome[name] = action
	}
	if action != "pass" {
		fmt.Fprintf(text, "%s: %s\n%s", action, name, output)
	}
}

// endPackage keeps the closing line of a package, of a failed one all it said.
func (r *results) endPackage(e event, output string, text *strings.Builder) {
	if e.Action == "fail" {
		text.WriteString(output)
		if !r.failedIn(e.Package) {
			r.broken++
		}
		return
	}
	for line := range strings.Lines(output) {
		if strings.HasPrefix(line, "ok  \t") || strings.HasPrefix(line, "?   \t") {
			text.WriteString(line)
		}
	}
}

func (r *results) failedIn(pkg string) bool {
	for name, o := range r.outcome {
		if strings.HasPrefix(name, pkg+".") && rank[o] >= rank["fail"] {
			return true
		}
	}
	return false
}

func (r *results) counts() (passed, failed, skipped int) {
	failed = r.broken
	for _, o := range r.outcome {
		switch o {
		case "pass":
			passed++
		case "fail":
			failed++
		case "skip":
			skipped++
		}
	}
	return passed, failed, skipped
}

// worst returns the worst outcome of the named test and all beneath it; "" when
// the test did not run.
func (r *results) worst(test string) string {
	o := r.outcome[test]
	for name, sub := range r.outcome {
		if strings.HasPrefix(name, test+"/") && rank[sub] > rank[o] {
			o = sub
		}
	}
	return o
}
