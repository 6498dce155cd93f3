package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"time"
)

// event is one line of "go test -json".
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

// summary gathers the results of all groups.
type summary struct {
	passed, failed int
	broken         int // packages that failed without a failing test
	skipped        []string
	slow           []took
	output         map[string][]string // of tests and packages that run
	failures       map[string]int      // failed tests by package
	quotes         []failure           // each with its output, in order
	build          []string            // what the compiler said
}

type took struct {
	pkg     string
	seconds float64
}

func newSummary() *summary {
	return &summary{output: map[string][]string{}, failures: map[string]int{}}
}

func (s *summary) read(in io.Reader, out io.Writer) error {
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			fmt.Fprintln(out, sc.Text()) // a build error's plain text
			continue
		}
		s.take(e, out)
	}
	return sc.Err()
}

// take handles one event. Output is held until its test has ended, and shown
// only when it failed.
func (s *summary) take(e event, out io.Writer) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output", "build-output":
		if e.Action == "build-output" {
			fmt.Fprint(out, e.Output)
			s.build = append(s.build, e.Output)
			return
		}
		s.output[key] = append(s.output[key], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.endPackage(e, key, out)
		} else {
			s.endTest(e, key, out)
		}
		delete(s.output, key)
	}
}

func (s *summary) endTest(e event, key string, out io.Writer) {
	switch e.Action {
	case "pass":
		s.passed++
	case "fail":
		s.failed++
		s.failures[e.Package]++
		s.quotes = append(s.quotes, failure{e.Package + " " + e.Test, s.output[key]})
		for _, l := range s.output[key] {
			if !strings.HasPrefix(l, "=== ") && !strings.HasPrefix(strings.TrimSpace(l), "--- FAIL") {
				fmt.Fprint(out, l)
			}
		}
	case "skip":
		s.skipped = append(s.skipped, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(s.output[key])))
	}
	fmt.Fprintf(out, "--- %s: %s (%.2fs)\n", strings.ToUpper(e.Action), e.Test, e.Elapsed)
}

// reason is what a skipped test said.
func reason(lines []string) string {
	var words []string
	for _, l := range lines {
		l = strings.TrimSpace(l)
		if strings.HasPrefix(l, "===") || strings.HasPrefix(l, "---") {
			continue
		}
		if _, text, ok := strings.Cut(l, ".go:"); ok { // "file.go:12: text"
			if _, said, ok := strings.Cut(text, ": "); ok {
				l = said
			}
		}
		words = append(words, l)
	}
	return strings.Join(words, " ")
}

func (s *summary) endPackage(e event, key string, out io.Writer) {
	s.slow = append(s.slow, took{e.Package, e.Elapsed})
	switch e.Action {
	case "fail":
		if s.failures[e.Package] == 0 {
			s.broken++
			s.quotes = append(s.quotes, failure{e.Package, slices.Concat(s.build, s.output[key])})
			s.build = nil
		}
		for _, l := range s.output[key] {
			if !strings.HasPrefix(l, "FAIL") { // said below
				fmt.Fprint(out, l)
			}
		}
		for k, lines := range s.output { // tests that never ended: a panic, a timeout
			if strings.HasPrefix(k, e.Package+" ") && k != key {
				fmt.Fprint(out, strings.Join(lines, ""))
				s.quotes = append(s.quotes, failure{k + " (did not end)", lines})
				delete(s.output, k)
			}
		}
		fmt.Fprintf(out, "FAIL\t%s\t%.3fs\n", e.Package, e.Elapsed)
	case "pass":
		fmt.Fprintf(out, "ok  \t%s\t%.3fs\n", e.Package, e.Elapsed)
	}
}

// report ends the run; its last line is the one to read.
func (s *summary) report(out io.Writer, all time.Duration) {
	sort.Slice(s.slow, func(i, j int) bool { return s.slow[i].seconds > s.slow[j].seconds })
	fmt.Fprintf(out, "\nslowest packages, %v in all:\n", all.Round(time.Second))
	for i, p := range s.slow {
		if i < 8 {
			fmt.Fprintf(out, "  %7.1fs  %s\n", p.seconds, p.pkg)
		}
	}
	if len(s.skipped) > 0 {
		fmt.Fprintf(out, "\nskipped:\n")
		sort.Strings(s.skipped)
		for _, l := range s.skipped {
			fmt.Fprintln(out, "  "+l)
		}
	}
	quoteFailures(out, s.quotes)
	fmt.Fprintf(out, "\n%s\n", s.line())
}

// line is the result in one line.
func (s *summary) line() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", s.passed, s.failed+s.broken, len(s.skipped))
}
