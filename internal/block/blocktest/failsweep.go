package blocktest

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/fsx/fsxtest"
)

// FailSweep runs scenario once to count all its operations, reads too, then
// for each of them with that operation failing: once, and from then on for
// good; with each errno it may return (see Options); reads and writes also
// stopping half way; a failed Sync also dropping what was written. Then the
// faults end and check judges the machine after a process death and after
// power cuts (survivors: oldest, newest, 2 random). The scenario may return
// whatever error it likes, but it must return.
func FailSweep(t testing.TB, scenario, check func(h *Host) error) Report {
	t.Helper()
	return FailSweepWith(t, Options{}, scenario, check)
}

// FailSweepWith is FailSweep with options.
func FailSweepWith(t testing.TB, o Options, scenario, check func(h *Host) error) Report {
	t.Helper()
	o = o.withDefaults()
	var trace []fsxtest.Op
	h := NewHost()
	h.Power.SetTrace(func(op fsxtest.Op) { trace = append(trace, op) })
	if err := scenario(h); err != nil {
		t.Fatalf("fail sweep: the undisturbed scenario failed: %v", err)
	}
	var rep Report
	for n := 0; n < len(trace); n += o.Every {
		rep.Points++
		for _, f := range faultsFor(trace[n], o.Errnos) {
			f.at = n
			cases, err := failOnce(o, f, scenario, check)
			rep.Cases += cases
			if err != nil {
				t.Fatalf("fail sweep: %v at %v: %v", f, trace[n], err)
			}
		}
	}
	t.Logf("fail sweep: %d operations failed, %d cases", rep.Points, rep.Cases)
	return rep
}

// fault is one way in which one operation fails.
type fault struct {
	at     int
	errno  syscall.Errno
	sticky bool
	half   bool // transfer half of it first
	drop   bool // a failed sync loses the new content at once
}

func (f fault) String() string {
	s := "one " + f.errno.Error()
	if f.sticky {
		s = "lasting " + f.errno.Error()
	}
	if f.half {
		s += " half way"
	}
	if f.drop {
		s += " with pages dropped"
	}
	return s
}

func needsSpace(k fsxtest.Kind) bool {
	switch k {
	case fsxtest.Create, fsxtest.Write, fsxtest.Zero, fsxtest.Allocate, fsxtest.Mkdir, fsxtest.Rename:
		return true
	}
	return false
}

func faultsFor(op fsxtest.Op, errnos []syscall.Errno) []fault {
	if errnos == nil {
		errnos = []syscall.Errno{syscall.EIO}
		if needsSpace(op.Kind) {
			errnos = append(errnos, syscall.ENOSPC, syscall.EDQUOT)
		}
	}
	var out []fault
	for _, e := range errnos {
		out = append(out, fault{errno: e}, fault{errno: e, sticky: true})
	}
	switch op.Kind {
	case fsxtest.Read, fsxtest.Write:
		if op.Len > 1 {
			out = append(out, fault{errno: errnos[len(errnos)-1], half: true})
		}
	case fsxtest.Sync:
		out = append(out, fault{errno: errnos[0], drop: true}, fault{errno: errnos[0], sticky: true, drop: true})
	}
	return out
}

// hook is the fault as a Power hook. A lasting want of space hits what needs
// space, a lasting EIO everything.
func (f fault) hook(op fsxtest.Op) error {
	switch {
	case op.Index < f.at || op.Index > f.at && !f.sticky:
		return nil
	case op.Index > f.at && f.errno != syscall.EIO && !needsSpace(op.Kind):
		return nil
	case f.half:
		return fsxtest.Short(int(op.Len/2), f.errno)
	}
	return f.errno
}

func failOnce(o Options, f fault, scenario, check func(h *Host) error) (cases int, err error) {
	h := NewHost()
	h.Power.SetHook(f.hook)
	h.Power.DropOnSyncError(f.drop)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = scenario(h) // any error is allowed; what it left is judged below
	}()
	limit := time.NewTimer(o.Timeout)
	defer limit.Stop()
	select {
	case <-done:
	case <-limit.C:
		return 0, fmt.Errorf("the scenario did not return within %v", o.Timeout)
	}
	h.Power.SetHook(nil)
	h.Power.Cut()
	restarts := []*Host{
		h.Kill(fsxtest.Newest), h.Cut(fsxtest.Oldest), h.Cut(fsxtest.Newest),
		h.Cut(fsxtest.Random(o.Seed)), h.Cut(fsxtest.Random(o.Seed + 1)),
	}
	for i, r := range restarts {
		cases++
		if o.Recover != nil {
			if err := o.Recover(r); err != nil {
				return cases, fmt.Errorf("recover (restart %d): %w", i, err)
			}
		}
		if err := check(r); err != nil {
			return cases, fmt.Errorf("restart %d: %w", i, err)
		}
	}
	return cases, nil
}

// Once is a hook that fails the first operation for which match is true.
func Once(match func(fsxtest.Op) bool, err error) func(fsxtest.Op) error {
	var once sync.Once
	return func(op fsxtest.Op) (out error) {
		if match(op) {
			once.Do(func() { out = err })
		}
		return out
	}
}

// Always is a hook that fails every operation for which match is true.
func Always(match func(fsxtest.Op) bool, err error) func(fsxtest.Op) error {
	return func(op fsxtest.Op) error {
		if match(op) {
			return err
		}
		return nil
	}
}

// IsPowerLost reports whether err comes from the cut.
func IsPowerLost(err error) bool { return errors.Is(err, fsxtest.ErrPowerLost) }
