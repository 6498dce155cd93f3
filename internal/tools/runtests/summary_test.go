package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

const stream = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"output","Package":"p","Test":"TestA","Output":"chatter\n"}
{"Action":"pass","Package":"p","Test":"TestA","Elapsed":0.5}
{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:7: wrong: 3\n"}
{"Action":"fail","Package":"p","Test":"TestB","Elapsed":1}
{"Action":"output","Package":"p","Test":"TestC","Output":"    c_test.go:9: needs qemu-io\n"}
{"Action":"skip","Package":"p","Test":"TestC","Elapsed":0}
{"Action":"output","Package":"p","Output":"FAIL\tp\t2.0s\n"}
{"Action":"output","Package":"p","Output":"exit status 1\n"}
{"Action":"fail","Package":"p","Elapsed":2}
{"Action":"output","Package":"q","Test":"TestD","Output":"panic: boom\n"}
{"Action":"fail","Package":"q","Elapsed":3}
not json
`

func TestSummaryCountsAndQuotes(t *testing.T) {
	s := newSummary()
	var out bytes.Buffer
	if err := s.read(strings.NewReader(stream), &out); err != nil {
		t.Fatal(err)
	}
	s.report(&out, time.Minute)
	got := out.String()
	for _, want := range []string{
		"--- PASS: TestA (0.50s)\n", "b_test.go:7: wrong: 3\n--- FAIL: TestB (1.00s)\n", "--- SKIP: TestC",
		"  p TestC: needs qemu-io\n", "exit status 1\nFAIL\tp\t2.000s\n", "panic: boom\n", "not json\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if strings.Count(got, "FAIL\tp") != 1 {
		t.Errorf("package p is not said to have failed just once:\n%s", got)
	}
	if strings.Contains(got, "chatter") {
		t.Error("a passing test's output is shown")
	}
	if !strings.HasSuffix(got, "\n1 passed, 2 failed, 1 skipped\n") {
		t.Errorf("wrong last line:\n%s", got)
	}
}

func TestGroupsAreSplitAtDashes(t *testing.T) {
	g := split([]string{"-race", "./a", "--", "-p", "1", "./b"})
	if len(g) != 2 || strings.Join(g[0], " ") != "-race ./a" || strings.Join(g[1], " ") != "-p 1 ./b" {
		t.Errorf("got %q", g)
	}
}

func TestFailuresAreQuotedLastWithTheirCause(t *testing.T) {
	s := newSummary()
	var in strings.Builder
	say := func(test, text string) {
		for l := range strings.Lines(text) {
			fmt.Fprintf(&in, `{"Action":"output","Package":"p","Test":%q,"Output":%q}`+"\n", test, l)
		}
	}
	say("TestA", "=== RUN   TestA\n")
	for i := range 300 {
		say("TestA", fmt.Sprintf("    a_test.go:%d: step\n", i))
	}
	say("TestA", "    a_test.go:400: the cause: 3\n        want 4\n")
	for range 8 { // clean-up shows logs
		say("TestA", "    a_test.go:9: log of a host:\n"+strings.Repeat("        level=INFO msg=x\n", 200))
	}
	say("TestA", "--- FAIL: TestA (1.00s)\n")
	in.WriteString(`{"Action":"fail","Package":"p","Test":"TestA","Elapsed":1}` + "\n")
	say("TestB", "panic: boom\n\ngoroutine 7 [running]:\n"+strings.Repeat("\t/x/b.go:7 +0x1\n", 500))
	in.WriteString(`{"Action":"fail","Package":"p","Elapsed":3}` + "\n")
	if err := s.read(strings.NewReader(in.String()), io.Discard); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.report(&out, time.Minute)
	_, got, found := strings.Cut(out.String(), "\nfailed:\n")
	if !found {
		t.Fatalf("nothing is quoted:\n%s", &out)
	}
	for _, want := range []string{"--- p TestA\n", "the cause: 3\n", "--- p TestB (did not end)\npanic: boom\n", "\n0 passed, 1 failed, 0 skipped\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if n := strings.Count(got, "\n"); n > 2*quoteLines+5 {
		t.Errorf("%d lines for two failures:\n%s", n, got)
	}
}

func TestACompilersErrorsAreQuoted(t *testing.T) {
	s := newSummary()
	const in = `{"ImportPath":"p","Action":"build-output","Output":"p/x.go:3:1: undefined: y\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}
{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p"}
`
	if err := s.read(strings.NewReader(in), io.Discard); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.report(&out, time.Minute)
	if !strings.Contains(out.String(), "--- p\np/x.go:3:1: undefined: y\n") {
		t.Errorf("got:\n%s", &out)
	}
}
