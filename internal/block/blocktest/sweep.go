package blocktest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/fsx/fsxtest"
)

// Options shape a sweep. The zero value is what Sweep and FailSweep use.
type Options struct {
	// MaxAll: up to so many combinations of survivors all are tried; 0 = 1024
	// (ten pending items), 64 with -short.
	MaxAll int
	// Random is the number of survivor sets tried beyond MaxAll, the two
	// extremes among them; 0 = 64, 8 with -short.
	Random int
	// Seed of the random survivor sets; 0 = 1.
	Seed uint64
	// Every tries only each n-th crash point or operation (from 1 on); 0 = all.
	Every int
	// NoKill leaves out process deaths, NoCut power cuts.
	NoKill, NoCut bool
	// Torn adds garbage in one sector of the write hit by the cut.
	Torn bool
	// Recover runs on the restarted machine before check, and is itself cut at
	// each of its persistence operations (survivors: oldest, newest, 2 random)
	// and run again; then check must hold, too.
	Recover func(h *Host) error
	// Errnos are the errors of FailSweep; nil = EIO, ENOSPC, EDQUOT for what
	// needs space, EIO for the rest.
	Errnos []syscall.Errno
	// Timeout bounds one run of the scenario in FailSweep; 0 = 30 s.
	Timeout time.Duration
}

// Report says what a sweep did.
type Report struct {
	Points     int // crash points, or operations failed
	Cases      int // restarts checked
	Exhaustive int // points at which all survivor sets were tried
	Nested     int // crashes during recovery
}

func (r Report) String() string {
	return fmt.Sprintf("%d points, %d cases, %d points with all survivors, %d crashes in recovery", r.Points, r.Cases, r.Exhaustive, r.Nested)
}

func (o Options) withDefaults() Options {
	def := func(v *int, long, short int) {
		if *v == 0 {
			*v = long
			if testing.Short() {
				*v = short
			}
		}
	}
	def(&o.MaxAll, 1024, 64)
	def(&o.Random, 64, 8)
	def(&o.Every, 1, 1)
	if o.Seed == 0 {
		o.Seed = 1
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	return o
}

// replayEnv names the variable that makes a sweep run one case only, in the
// form its failure message prints.
const replayEnv = "KVMREPLICA_SWEEP"

// Sweep runs scenario once to count its persistence operations, then once for
// each of them with the power going at that operation, and once to its end; it
// lets check judge the machine after each restart, by process death and by
// power cut with every survivor set (see Options). scenario gets a new machine
// each time, must start its own bookkeeping afresh, and must return when
// storage fails; its error counts only in the undisturbed run.
func Sweep(t testing.TB, scenario, check func(h *Host) error) Report {
	t.Helper()
	return SweepWith(t, Options{}, scenario, check)
}

// SweepWith is Sweep with options.
func SweepWith(t testing.TB, o Options, scenario, check func(h *Host) error) Report {
	t.Helper()
	s := &sweeper{o: o.withDefaults(), scenario: scenario, check: check}
	h := NewHost()
	if err := scenario(h); err != nil {
		t.Fatalf("sweep: the undisturbed scenario failed: %v", err)
	}
	_, points := h.Power.Counts()
	if points == 0 {
		t.Fatal("sweep: the scenario persists nothing")
	}
	if r := os.Getenv(replayEnv); r != "" {
		if err := s.replay(r, points); err != nil {
			t.Fatalf("sweep: %v", err)
		}
		return s.report
	}
	for n := 1; n <= points+1; n += s.o.Every {
		if err := s.point(n, points); err != nil {
			t.Fatalf("sweep: %v", err)
		}
		s.report.Points++
	}
	t.Logf("sweep: %v", s.report)
	return s.report
}

type sweeper struct {
	o               Options
	scenario, check func(h *Host) error
	report          Report
}

// crashed runs the scenario up to crash point n; points+1 is its end.
func (s *sweeper) crashed(n, points int) (*Host, error) {
	h := NewHost()
	h.SetTorn(s.o.Torn)
	if n <= points {
		h.Power.CrashAt(n)
	}
	err := s.scenario(h)
	if n > points && err != nil {
		return nil, fmt.Errorf("the undisturbed scenario failed: %w", err)
	}
	h.Power.Cut()
	return h, nil
}

func (s *sweeper) point(n, points int) error {
	h, err := s.crashed(n, points)
	if err != nil {
		return err
	}
	all := true
	for _, mode := range []string{"kill", "cut"} {
		if mode == "kill" && s.o.NoKill || mode == "cut" && s.o.NoCut {
			continue
		}
		cases, a, bad, err := fsxtest.Survivors(s.o.MaxAll, s.o.Random, s.o.Seed, func(c fsxtest.Chooser) error {
			return s.restarted(h, mode, c)
		})
		s.report.Cases += cases
		all = all && a
		if err != nil {
			return fmt.Errorf("crash at %v: %w\nreplay: %s=%s@%d:%s", h.Power.Last(), err, replayEnv, mode, n, encode(bad))
		}
	}
	if all {
		s.report.Exhaustive++
	}
	return nil
}

func restart(h *Host, mode string, c fsxtest.Chooser) *Host {
	if mode == "kill" {
		return h.Kill(c)
	}
	return h.Cut(c)
}

func (s *sweeper) restarted(h *Host, mode string, c fsxtest.Chooser) error {
	r := restart(h, mode, c)
	if s.o.Recover == nil {
		return s.check(r)
	}
	probe := r.Kill(fsxtest.Newest)
	if err := s.o.Recover(probe); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if err := s.check(probe); err != nil {
		return err
	}
	_, points := probe.Power.Counts()
	for n := 1; n <= points; n++ {
		again := r.Kill(fsxtest.Newest)
		again.Power.CrashAt(n)
		_ = s.o.Recover(again) // it was cut; what it left is judged below
		again.Power.Cut()
		for i, c := range []fsxtest.Chooser{fsxtest.Oldest, fsxtest.Newest, fsxtest.Random(s.o.Seed), fsxtest.Random(s.o.Seed + 1)} {
			s.report.Nested++
			last := again.Cut(c)
			if err := s.o.Recover(last); err != nil {
				return fmt.Errorf("recover after a cut at %v in recovery (survivors %d): %w", again.Power.Last(), i, err)
			}
			if err := s.check(last); err != nil {
				return fmt.Errorf("after a cut at %v in recovery (survivors %d): %w", again.Power.Last(), i, err)
			}
		}
	}
	return nil
}

func encode(choices []int) string {
	parts := make([]string, len(choices))
	for i, c := range choices {
		parts[i] = strconv.Itoa(c)
	}
	return strings.Join(parts, ".")
}

func (s *sweeper) replay(r string, points int) error {
	mode, rest, ok1 := strings.Cut(r, "@")
	at, list, ok2 := strings.Cut(rest, ":")
	n, err := strconv.Atoi(at)
	if !ok1 || !ok2 || err != nil {
		return fmt.Errorf("%s=%q is not MODE@POINT:CHOICES", replayEnv, r)
	}
	var choices []int
	for _, p := range strings.Split(list, ".") {
		if c, err := strconv.Atoi(p); err == nil {
			choices = append(choices, c)
		}
	}
	h, err := s.crashed(n, points)
	if err != nil {
		return err
	}
	return s.restarted(h, mode, fsxtest.Fixed(choices))
}
