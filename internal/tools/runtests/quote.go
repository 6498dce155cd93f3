package main

import (
	"fmt"
	"io"
	"regexp"
	"strings"
)

// failure is a test, or a package without a failing test, and what it printed.
type failure struct {
	what  string
	lines []string
}

// Lines of a failure shown again at the end: of one, and of all together.
const (
	quoteLines = 60
	quoteAll   = 600
	quoteLeast = 12
)

// quoteFailures repeats what failed, as the last thing before the result: who
// keeps only the end of the output has the causes.
func quoteFailures(out io.Writer, failures []failure) {
	if len(failures) == 0 {
		return
	}
	limit := max(quoteLeast, min(quoteLines, quoteAll/len(failures)))
	fmt.Fprintf(out, "\nfailed:\n")
	for _, f := range failures {
		fmt.Fprintf(out, "--- %s\n", f.what)
		for _, l := range quote(f.lines, limit) {
			fmt.Fprintln(out, l)
		}
	}
}

// blockStart matches the first line of what belongs together: a message of the
// test, a panic, a report of the race detector.
var blockStart = regexp.MustCompile(`^\s*[\w.-]+\.go:\d+: |^panic: |^fatal error: |^WARNING: DATA RACE|^goroutine \d+ `)

// own are the lines that a test printed itself.
func own(lines []string) (kept []string) {
	for _, l := range lines {
		l = strings.TrimSuffix(l, "\n")
		if t := strings.TrimSpace(l); strings.HasPrefix(l, "=== ") || strings.HasPrefix(t, "--- FAIL") || t == "" {
			continue
		}
		kept = append(kept, l)
	}
	return kept
}

// quote shortens lines to limit. Each message keeps its beginning for as long
// as that is possible: the one that says why is rarely the last, because what
// clean-up logs comes after it.
func quote(lines []string, limit int) []string {
	lines = own(lines)
	for _, keep := range []int{20, 8, 4, 2, 1} {
		if len(lines) <= limit {
			return lines
		}
		lines = shorten(lines, keep)
	}
	if len(lines) <= limit {
		return lines
	}
	head := limit / 4
	tail := limit - head - 1
	left := fmt.Sprintf("    ... %d lines ...", len(lines)-head-tail)
	return append(append(append([]string(nil), lines[:head]...), left), lines[len(lines)-tail:]...)
}

// shorten keeps the first lines of every block.
func shorten(lines []string, keep int) (kept []string) {
	in := 0
	for _, l := range lines {
		if blockStart.MatchString(l) {
			in = 0
		}
		if in++; in <= keep {
			kept = append(kept, l)
		}
	}
	return kept
}
