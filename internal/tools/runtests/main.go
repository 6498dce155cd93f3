// Command runtests runs groups of Go tests and judges the whole.
//
//	runtests -skips FILE -- GO TEST ARGS... [-- GO TEST ARGS...]...
//
// Each group is one "go test -json" run; they run one after the other, all of
// them even when one fails. The output is that of "go test -v", passing tests'
// own output left out, and at the end: every skipped test with its reason, the
// slowest packages, every failed test once more with what it printed (at most
// some 60 lines each), and one line "N passed, N failed, N skipped".
//
// FILE holds the largest number of skips allowed in its first line; lines
// "machine: PACKAGE TEST: why" name tests that do not count. A test that
// quietly stops running is a test lost, so that more skips are a failure.
//
// Exit codes: 0 all well, 1 a failure or too many skips, 2 wrong usage.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "runtests:", err)
		if _, usage := err.(usageError); usage {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// summaryVar names a file that takes the last line, for who prints after us.
const summaryVar = "KVMREPLICA_SUMMARY"

type usageError string

func (e usageError) Error() string { return string(e) }

func run(args []string) error {
	if len(args) < 4 || args[0] != "-skips" || args[2] != "--" {
		return usageError("usage: runtests -skips FILE -- GO TEST ARGS... [-- GO TEST ARGS...]...")
	}
	limit, may, err := skipLimit(args[1])
	if err != nil {
		return err
	}
	began := time.Now()
	s := newSummary()
	for _, group := range split(args[3:]) {
		if err := s.group(group); err != nil {
			return err
		}
	}
	s.report(os.Stdout, time.Since(began))
	if path := os.Getenv(summaryVar); path != "" {
		if err := os.WriteFile(path, []byte(s.line()+"\n"), 0o644); err != nil {
			return err
		}
	}
	switch {
	case s.failed > 0 || s.broken > 0:
		return fmt.Errorf("%d tests and %d packages failed", s.failed, s.broken)
	case countSkips(s.skipped, may) > limit:
		return fmt.Errorf("%d tests were skipped, %d are allowed by %s: install what they need, or say there why they may be skipped", len(s.skipped), limit, args[1])
	}
	return nil
}

// skipLimit reads the number, and the tests ("package Test") that may be skipped
// besides: those behind "machine:", which depend on it.
func skipLimit(file string) (n int, may []string, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, nil, err
	}
	lines := strings.Split(string(text), "\n")
	if n, err = strconv.Atoi(strings.TrimSpace(lines[0])); err != nil {
		return 0, nil, fmt.Errorf("%s: the first line must be a number: %w", file, err)
	}
	for _, l := range lines[1:] {
		if w := strings.Fields(l); len(w) > 2 && w[0] == "machine:" {
			may = append(may, w[1]+" "+strings.TrimSuffix(w[2], ":")+":")
		}
	}
	return n, may, nil
}

// countSkips leaves out the tests that may be skipped.
func countSkips(skipped, may []string) (n int) {
	for _, s := range skipped {
		if !slices.ContainsFunc(may, func(m string) bool { return strings.HasPrefix(s, m) }) {
			n++
		}
	}
	return n
}

func split(args []string) (groups [][]string) {
	groups = [][]string{nil}
	for _, a := range args {
		if a == "--" {
			groups = append(groups, nil)
			continue
		}
		groups[len(groups)-1] = append(groups[len(groups)-1], a)
	}
	return groups
}

// group runs one go test.
func (s *summary) group(args []string) error {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	before := s.failed + s.broken
	readErr := s.read(out, os.Stdout)
	err = cmd.Wait()
	if readErr != nil {
		return readErr
	}
	if err != nil && s.failed+s.broken == before {
		s.broken++ // it failed without a word about a test: it did not build
		s.quotes = append(s.quotes, failure{"go test " + strings.Join(args, " "), s.build})
		s.build = nil
	}
	return nil
}
