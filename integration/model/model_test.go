package model

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// layout: disk 0 has a region of two granules and one of one, disk 1 a region
// of one.
func layout() []Granule { return []Granule{{0, 0}, {0, 0}, {0, 1}, {1, 2}} }

// exhaust runs one configuration to its end and reports its size.
func exhaust(t *testing.T, c Config) Result {
	t.Helper()
	if c.Granules == nil {
		c.Granules = layout()
	}
	r, err := Explore(c)
	if err != nil {
		t.Fatalf("program %v: %v after %v", c.Program, err, r)
	}
	if r.Violation != "" {
		c.Compact = false
		again, _ := Explore(c)
		t.Errorf("program %v: %v", c.Program, again)
	}
	return r
}

// full asks for the whole space instead of the part that fits a quick run.
func full() bool { return os.Getenv("KVMREPLICA_MODEL") == "full" }

// programs are all sequences of n writes over the targets.
func programs(n int, targets []Target) [][]Target {
	if n == 0 {
		return [][]Target{nil}
	}
	var out [][]Target
	for _, p := range programs(n-1, targets) {
		for _, t := range targets {
			out = append(out, append(append([]Target(nil), p...), t))
		}
	}
	return out
}

func TestDesignHoldsInEveryState(t *testing.T) {
	// Same granule twice, neighbours in a region, across regions, both disks.
	runs := []Config{
		{Program: []Target{{0}, {3}, {0}}, Crashes: 1},
		{Program: []Target{{0, 1}, {1}, {3}}, Crashes: 1},
		{Program: []Target{{1, 2}, {1}, {3}}, Crashes: 1},
		{Program: []Target{{3}, {0}, {1}}, Crashes: 1},
		{Program: []Target{{0}, {0, 1}}, Crashes: 2, Compares: true},
		{Program: []Target{{0}, {0, 1}}, Crashes: 1, Stops: 1},
	}
	if testing.Short() {
		runs = runs[4:]
	}
	if full() {
		for _, p := range programs(2, []Target{{0}, {1}, {2}, {3}, {0, 1}, {1, 2}}) {
			runs = append(runs, Config{Program: p, Crashes: 2, Stops: 1, Compares: true})
		}
	}
	states, transitions := 0, 0
	steps := map[string]int{}
	for _, c := range runs {
		c.Epochs, c.Rollbacks, c.Rules, c.Compact = 2, 1, true, true
		r := exhaust(t, c)
		states += r.States
		transitions += r.Transitions
		for k, n := range r.Steps {
			steps[k] += n
		}
	}
	for name, n := range steps {
		if n == 0 && !strings.HasPrefix(name, "freeze the other disks") {
			t.Errorf("no search came to the step %q", name)
		}
	}
	t.Logf("state space exhausted for %d programs: %d states, %d transitions, 0 violations", len(runs), states, transitions)
}

// TestFourWritesThreeEpochsTwoCrashes is the size the plan asks for, for one
// program that has all shapes of writes: 25 million states, 40 s of one core,
// 1.5 GB.
func TestFourWritesThreeEpochsTwoCrashes(t *testing.T) {
	if !full() {
		t.Skip("set KVMREPLICA_MODEL=full")
	}
	r := exhaust(t, Config{
		Program: []Target{{1, 2}, {3}, {1}, {0}}, Epochs: 3, Crashes: 2, Rollbacks: 0,
		Rules: true, Compact: true, MaxStates: 200_000_000,
	})
	t.Logf("state space exhausted: %v", r)
}

func TestEveryMutantOfTheDesignIsFound(t *testing.T) {
	sound := map[string]bool{}
	for _, m := range Mutants() {
		c := Config{Granules: layout(), Program: []Target{{0}, {3}, {0}}, Epochs: 2, Crashes: 1, Rollbacks: 1, Mutant: m}
		switch m {
		case BelieveUnsynced:
			c.Program = []Target{{0}, {1}}
		case OpenTrustsPages:
			c.Program, c.Crashes = []Target{{0}, {0}}, 2
		case StopKeepsBase:
			c.Stops = 1
		case CompareForgetsWrites:
			c.Program, c.Compares = []Target{{0}, {0}}, true
		case NoLockAcrossEpochs, FreezePerDisk:
			c.Program = []Target{{0, 1}, {1}, {3}}
		}
		// By its consequences alone, then with the rules checked as such.
		for _, rules := range []bool{false, true} {
			c.Rules = rules
			r, err := Explore(c)
			if err != nil || r.Violation == "" {
				t.Errorf("%v (rules %v): not found in %v, %v", m, rules, r, err)
				continue
			}
			if len(r.Trace) < 2 {
				t.Errorf("%v: no trace: %v", m, r)
			}
			if !rules {
				t.Logf("%v: found among %d states, %d steps: %s", m, r.States, len(r.Trace), r.Violation)
			}
		}
		// Without the fault the same search finds nothing.
		c.Mutant, c.Rules = Sound, true
		key := fmt.Sprint(c)
		if sound[key] {
			continue
		}
		sound[key] = true
		if r, err := Explore(c); err != nil || r.Violation != "" {
			t.Errorf("the sound design with the program for %v: %v, %v", m, r, err)
		}
	}
}

func TestSearchSaysWhenItDidNotFinish(t *testing.T) {
	r, err := Explore(Config{Granules: layout(), Program: []Target{{0}, {1}}, Epochs: 2, Crashes: 1, MaxStates: 1000})
	if !errors.Is(err, ErrUnfinished) || r.States < 1000 {
		t.Errorf("%v, %v", r, err)
	}
}

func TestCompactSearchVisitsTheSameStates(t *testing.T) {
	c := Config{Granules: layout(), Program: []Target{{0}, {1}}, Epochs: 2, Crashes: 1, Rollbacks: 1, Rules: true}
	a, err := Explore(c)
	if err != nil {
		t.Fatal(err)
	}
	c.Compact = true
	b, err := Explore(c)
	if err != nil || a.States != b.States || a.Transitions != b.Transitions || a.Depth != b.Depth || a.States < 10_000 {
		t.Errorf("%v and %v, %v", a, b, err)
	}
}

func TestConfigurationsTooLargeAreRefused(t *testing.T) {
	for _, c := range []Config{
		{},
		{Granules: make([]Granule, 7)},
		{Granules: layout(), Epochs: 7},
		{Granules: layout(), Program: make([]Target, 8)},
		{Granules: layout(), Program: []Target{{4}}},
		{Granules: []Granule{{0, 4}}},
	} {
		if _, err := Explore(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}
