// Command speccheck reads the output of go test -json.
//
//	go run ./internal/speccheck < gotest.json
//	go run ./internal/speccheck -cases testdata/spec-cases.tsv < gotest.json
//
// The first form prints what a person wants of it: how each package ended, the
// output of what failed, the reason of what was skipped, and as its last line
// "N passed, N failed, N skipped", subtests counted. The second says whether
// every case of a table is shown by tests that ran, passed, and skipped nothing.
// Both exit with 1 when the answer is no.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "speccheck:", err)
		os.Exit(1)
	}
}

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("speccheck", flag.ContinueOnError)
	flags.SetOutput(stdout)
	cases := flags.String("cases", "", "the `table` of cases to check; without it, print a summary")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *cases == "" {
		return summarize(stdin, stdout)
	}
	f, err := os.Open(*cases)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	t, err := readTable(f)
	if err != nil {
		return fmt.Errorf("%s: %w", *cases, err)
	}
	r, err := readResults(stdin)
	if err != nil {
		return err
	}
	return report(t, r, stdout)
}

func summarize(stdin io.Reader, stdout io.Writer) error {
	r, err := readResults(stdin)
	if err != nil {
		return err
	}
	passed, failed, skipped := r.counts()
	_, _ = fmt.Fprintf(stdout, "%s%d passed, %d failed, %d skipped\n", r.text, passed, failed, skipped)
	switch {
	case failed > 0:
		return errors.New("tests failed")
	case passed == 0:
		return errors.New("no test ran")
	}
	return nil
}

func report(t table, r results, stdout io.Writer) error {
	problems := t.check(r)
	if len(problems) > 0 {
		return fmt.Errorf("%d problems:\n%s", len(problems), strings.Join(problems, "\n"))
	}
	for _, system := range t.systems {
		shown, excused := t.tally(system)
		_, _ = fmt.Fprintf(stdout, "%s: %d of %d cases shown by tests that passed, %d do not apply\n",
			system, shown, t.size[system], excused)
	}
	return nil
}
