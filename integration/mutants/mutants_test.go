package main

import (
	"strings"
	"testing"
	"time"
)

func TestEveryMutantAppliesAndCompiles(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	all, err := All()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 40 {
		t.Fatalf("%d mutants", len(all))
	}
	w := &workshop{root: root, dir: t.TempDir()}
	rounds, err := w.compile(t.Context(), all)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d mutants in %d rounds", len(all), rounds)
}

func TestAMutantWhoseTextIsGoneIsAnError(t *testing.T) {
	h := Hunk{File: "x.go", Old: []string{"a()", "b()"}, New: []string{"c()"}}
	for _, text := range []string{"", "\ta()\n", "\ta()\n\tx()\n\tb()\n", "a()\nb()\na()\nb()"} {
		if _, err := h.apply(text); err == nil || !strings.Contains(err.Error(), "bring the mutant up to date") {
			t.Errorf("%q: %v", text, err)
		}
	}
	got, err := h.apply("f {\n\ta()\n\tb()\n}")
	if err != nil || got != "f {\nc()\n}" {
		t.Fatalf("%q %v", got, err)
	}
}

func TestTheFirstFailureIsNamed(t *testing.T) {
	for out, want := range map[string]string{
		"--- FAIL: TestA (0.1s)\n    --- FAIL: TestA/b\n":                      "TestA",
		"panic: test timed out after 1s\n\trunning tests:\n\t\tTestB (1s)\n":   "TestB (hangs)",
		"panic: runtime error: index out of range\n\ngoroutine 1 [running]:\n": "panic: runtime error: index out of range",
		"FAIL\tkvmreplica/cbt [no test files]":                                 "fails: FAIL\tkvmreplica/cbt [no test files]",
	} {
		if got := firstFailure(out); got != want {
			t.Errorf("%q: %q", out, got)
		}
	}
}

// What a command of one's own builds has the mutant in it; a command that
// passes all the same has not seen it.
func TestACommandBuildsWhatHasTheMutant(t *testing.T) {
	root, err := moduleRoot()
	if err != nil {
		t.Fatal(err)
	}
	m := Mutant{Name: "x", Hunks: []Hunk{{
		File: "internal/count/count.go", Old: []string{"package count"}, New: []string{"package count", "", `import _ "embed"`},
	}}}
	for command, want := range map[string]string{
		"go list ./internal/count": "",
		"echo '--- FAIL: TestC (1s)'; ! go list -f '{{.Imports}}' ./internal/count | grep embed": "TestC",
	} {
		w := &workshop{root: root, dir: t.TempDir(), limit: time.Minute, with: command}
		if got, err := w.test(t.Context(), &m, ""); err != nil || got != want {
			t.Errorf("%s: %q, %v", command, got, err)
		}
	}
}
