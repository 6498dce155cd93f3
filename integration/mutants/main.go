package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	pattern := flag.String("run", "", "only mutants whose name matches")
	check := flag.Bool("check", false, "only see whether every mutant applies and compiles")
	by := flag.String("by", "", "what to look with: empty = the mutant's own packages, sim = the simulation")
	with := flag.String("with", "", "a shell command in place of the mutant's tests: whatever it builds has the mutant, and it must fail")
	file := flag.String("campaign", "", "file that keeps what became of each mutant, one JSON line per run")
	untried := flag.Bool("untried", false, "only those of which the campaign does not say that a test catches them")
	limit := flag.Duration("timeout", 20*time.Minute, "for a run of one mutant's tests")
	flag.Parse()
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	every, err := All()
	if err != nil {
		return err
	}
	known, err := openLedger(*file)
	if err != nil {
		return err
	}
	defer func() {
		if *file != "" {
			fmt.Println(known.totals(every))
		}
	}()
	all, err := chosen(slices.Clone(every), *pattern)
	if err != nil {
		return err
	}
	if *untried {
		all = known.untried(all)
	}
	w := &workshop{root: root, limit: *limit, with: *with}
	if *with != "" && (*file != "" || *untried) {
		return errors.New("-with looks by a command of yours; the campaign's file keeps what the tests find")
	}
	if w.dir, err = os.MkdirTemp("", "mutants"); err != nil {
		return err
	}
	defer os.RemoveAll(w.dir)
	if *check {
		n, err := w.compile(ctx, all)
		fmt.Printf("%d mutants apply; compiled in %d rounds\n", len(all), n)
		return err
	}
	return w.hunt(ctx, all, *by, known)
}

// workshop builds and tests changed sources.
type workshop struct {
	root, dir string
	limit     time.Duration
	with      string // a shell command instead of tests
}

// hunt tests every mutant and prints a line for each.
func (w *workshop) hunt(ctx context.Context, all []Mutant, by string, known *ledger) error {
	var alive []string
	for i, m := range all {
		began := time.Now()
		found, err := w.test(ctx, &m, by)
		if err != nil {
			return err
		}
		if err := known.add(&m, found, time.Since(began)); err != nil {
			return err
		}
		if found == "" {
			alive = append(alive, m.Name)
			found = "SURVIVES"
		}
		fmt.Printf("%3d/%d %-34s %7s  %s\n", i+1, len(all), m.Name, time.Since(began).Round(100*time.Millisecond), found)
	}
	fmt.Printf("%d mutants, %d caught, %d survive\n", len(all), len(all)-len(alive), len(alive))
	if len(alive) > 0 {
		return fmt.Errorf("no test sees: %s", strings.Join(alive, ", "))
	}
	return nil
}

// test returns the first test that fails with the mutant, "" when none does.
func (w *workshop) test(ctx context.Context, m *Mutant, by string) (string, error) {
	changed, err := m.Apply(w.root, nil)
	if err != nil {
		return "", err
	}
	overlay, err := w.overlay(changed)
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(filepath.Dir(overlay))
	if w.with != "" {
		return w.command(ctx, m, overlay)
	}
	packages, tests := m.Packages, m.Tests
	if by == "sim" {
		packages, tests = []string{"./integration/sim"}, "TestSeeds"
	}
	for _, p := range packages {
		binary, err := w.build(ctx, m, overlay, p)
		if err != nil {
			return "", err
		}
		for _, r := range w.rounds(tests) {
			out, err := w.output(ctx, filepath.Join(w.root, p), binary, "-test.failfast", "-test.timeout", r.limit.String(), r.flag, r.pattern)
			if ctx.Err() != nil {
				return "", ctx.Err()
			}
			if err != nil {
				return p + " " + firstFailure(out), nil
			}
		}
	}
	return "", nil
}

// slow are the tests that take most of a package's time: the sweeps, and those
// that play long. Most mutants are caught without them.
const slow = "LosesABlock|LosesNoBlock|Crash|EveryFail|EveryFault|Truncated|Damage|Detected|Sweep|EveryCell|CutAnywhere|" +
	"RandomLives|Histories|KillCosts|HandedOn|FailingFileCall|WhileEverythingRuns|AtEvery|DiesAt"

// quickLimit is for the tests that are not slow: a mutant that hangs is caught
// by it.
const quickLimit = 3 * time.Minute

// round is one run of a test program.
type round struct {
	flag, pattern string
	limit         time.Duration
}

// rounds are the runs of a package's tests: the quick ones first.
func (w *workshop) rounds(tests string) []round {
	if tests != "" {
		return []round{{"-test.run", tests, w.limit}}
	}
	return []round{{"-test.skip", slow, min(quickLimit, w.limit)}, {"-test.run", slow, w.limit}}
}

// build makes a package's test program with the mutant in it.
func (w *workshop) build(ctx context.Context, m *Mutant, overlay, p string) (string, error) {
	at := filepath.Join(filepath.Dir(overlay), filepath.Base(p)+".test")
	out, err := w.output(ctx, w.root, "go", "test", "-c", "-o", at, "-vet=off", "-overlay", overlay, p)
	if err != nil {
		return "", fmt.Errorf("mutant %s cannot be tested: %w\n%s", m.Name, err, out)
	}
	return at, nil
}

// hangs marks a failure that was only the time limit.
const hangs = " (hangs)"

// firstFailure names what went wrong in the output of go test.
func firstFailure(out string) string {
	if x := regexp.MustCompile(`panic: test timed out[^\n]*\n(?:[^\n]*\n)?\s*(Test\w+)`).FindStringSubmatch(out); x != nil {
		return x[1] + hangs
	}
	all := regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`).FindAllStringSubmatch(out, -1)
	if len(all) > 0 {
		return all[0][1]
	}
	if x := regexp.MustCompile(`(?m)^(panic|fatal error): .*$`).FindString(out); x != "" {
		return x
	}
	return "fails: " + strings.TrimSpace(out[:min(len(out), 200)])
}

// compile builds all mutants, several of different places in one round.
func (w *workshop) compile(ctx context.Context, all []Mutant) (rounds int, err error) {
	for left := all; len(left) > 0; rounds++ {
		changed := map[string]string{}
		touched := map[string]bool{}
		var again []Mutant
		for _, m := range left {
			if slices.ContainsFunc(m.Hunks, func(h Hunk) bool { return touched[h.File+"\x00"+h.Old[0]] }) {
				again = append(again, m)
				continue
			}
			if _, err := m.Apply(w.root, nil); err != nil { // on the sources as they are
				return rounds, err
			}
			next, err := m.Apply(w.root, changed)
			if err != nil { // two mutants of one place
				again = append(again, m)
				continue
			}
			for f, text := range next {
				changed[f] = text
			}
			for _, h := range m.Hunks {
				for _, l := range h.Old {
					touched[h.File+"\x00"+l] = true
				}
			}
		}
		if len(again) == len(left) {
			return rounds, fmt.Errorf("mutant %s applies to nothing", left[0].Name)
		}
		overlay, err := w.overlay(changed)
		if err != nil {
			return rounds, err
		}
		var dirs []string
		for f := range changed {
			dirs = append(dirs, "./"+filepath.Dir(f))
		}
		slices.Sort(dirs)
		if out, err := w.output(ctx, w.root, "go", append([]string{"build", "-overlay", overlay}, slices.Compact(dirs)...)...); err != nil {
			return rounds, fmt.Errorf("a mutant does not compile: %w\n%s", err, out)
		}
		left = again
	}
	return rounds, nil
}

// overlay writes changed files and the list that tells the compiler of them.
func (w *workshop) overlay(changed map[string]string) (string, error) {
	dir, err := os.MkdirTemp(w.dir, "")
	if err != nil {
		return "", err
	}
	list := struct{ Replace map[string]string }{map[string]string{}}
	for f, text := range changed {
		at := filepath.Join(dir, strings.ReplaceAll(f, "/", "_"))
		if err := os.WriteFile(at, []byte(text), 0o600); err != nil {
			return "", err
		}
		list.Replace[filepath.Join(w.root, f)] = at
	}
	b, err := json.Marshal(list)
	if err != nil {
		return "", err
	}
	at := filepath.Join(dir, "overlay.json")
	return at, os.WriteFile(at, b, 0o600)
}

// command runs the shell command with the mutant in all that go builds in it,
// programs of a lab included, and returns what failed, "" when nothing did.
func (w *workshop) command(ctx context.Context, m *Mutant, overlay string) (string, error) {
	var dirs []string
	for _, h := range m.Hunks {
		dirs = append(dirs, "./"+filepath.Dir(h.File))
	}
	slices.Sort(dirs)
	if out, err := w.output(ctx, w.root, "go", append([]string{"build", "-overlay", overlay}, slices.Compact(dirs)...)...); err != nil {
		return "", fmt.Errorf("mutant %s does not compile: %w\n%s", m.Name, err, out)
	}
	ctx, cancel := context.WithTimeout(ctx, w.limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", w.with)
	cmd.Dir, cmd.Env = w.root, append(os.Environ(), "GOFLAGS="+strings.TrimSpace(os.Getenv("GOFLAGS")+" -overlay="+overlay))
	out, err := cmd.CombinedOutput()
	fmt.Printf("%s", out)
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case err != nil:
		return firstFailure(string(out)), nil
	}
	return "", nil
}

func (w *workshop) output(ctx context.Context, dir, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// moduleRoot is the folder of go.mod, from the working folder up.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("run this inside the module")
}
