package sim

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
)

// Result is what a run showed.
type Result struct {
	Seed     uint64
	Script   []Op
	Err      error // a violation, or the pair did not settle
	Coverage map[string]int
	Trace    []string
}

// Run plays a script. With verbose the result carries a trace.
func Run(seed uint64, script []Op, verbose bool) (res Result) {
	dir, err := os.MkdirTemp("/dev/shm", "kvmsim")
	if err != nil {
		return Result{Seed: seed, Script: script, Err: err}
	}
	defer os.RemoveAll(dir)
	w := newWorld(seed, options(seed), dir)
	w.verbose = verbose
	defer w.close()
	err = w.play(script)
	return Result{Seed: seed, Script: script, Err: err, Coverage: w.coverage, Trace: w.trace}
}

func (w *World) play(script []Op) error {
	if err := w.enable(w.hosts[0], w.hosts[1]); err != nil {
		return fmt.Errorf("enable: %w", err)
	}
	for _, o := range script {
		w.note("%s", o)
		if err := w.do(o); err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	w.note("end of the script")
	if err := w.settle(); err != nil {
		return err
	}
	for _, h := range w.hosts {
		if err := h.look(); err != nil {
			return err
		}
	}
	return w.failure()
}

func (w *World) do(o Op) error {
	for _, v := range vocabulary() {
		if v.kind != o.Kind {
			continue
		}
		w.count("op " + o.Kind)
		if err := v.do(w, rand.New(rand.NewPCG(o.N, 4))); err != nil {
			return err
		}
		if err := w.finish(); err != nil {
			return err
		}
		return w.check()
	}
	return fmt.Errorf("op %s is not known", o.Kind)
}

// Shrink leaves ops out as long as the script still fails, and returns the
// shortest script found with its result.
func Shrink(res Result, tries int) Result {
	best := res
	for step := len(best.Script) / 2; step > 0 && tries > 0; {
		smaller := false
		for at := 0; at+step <= len(best.Script) && tries > 0; tries-- {
			less := slices.Concat(best.Script[:at], best.Script[at+step:])
			if r := Run(res.Seed, less, false); r.Err != nil {
				best, smaller = r, true
				continue
			}
			at += step
		}
		if !smaller || step > len(best.Script) {
			step /= 2
		}
	}
	return Run(best.Seed, best.Script, true)
}

// String says how to see the run again.
func (r Result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "seed %d: %v\nSEED=%d SCRIPT=%q make sim\n", r.Seed, r.Err, r.Seed, FormatScript(r.Script))
	for _, l := range r.Trace {
		fmt.Fprintln(&b, l)
	}
	return b.String()
}

// Add sums coverage.
func Add(to, from map[string]int) {
	for k, n := range from {
		to[k] += n
	}
}

// Table is coverage for people.
func Table(c map[string]int) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintf(&b, "%10d  %s\n", c[k], k)
	}
	return b.String()
}
