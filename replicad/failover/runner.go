// Package failover executes role changes, enabling and disabling as journalled
// plans: short lists of named steps, each idempotent, each with a defined way
// back.
//
// It guarantees that before a step runs its name is durable, that after it ran
// that too is durable, and that a plan interrupted anywhere is found again by
// Load with everything needed to continue it or to take it back. It knows
// nothing of libvirt, peers or stores: the steps do.
//
// Callers must make every Do and Undo safe to repeat (a crash may fall between
// the act and its record), must not run two plans of one VM at once, and must
// rebuild the same steps for the same kind after a restart.
package failover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/wire"
)

// Kind names a plan; it is stored in the journal.
type Kind string

// The plans.
const (
	Enable    Kind = "enable"
	Disable   Kind = "disable"
	Planned   Kind = "planned"   // this host is the primary and gives up the role
	Promote   Kind = "promote"   // this host is the replica and takes over, asked by the primary
	Unplanned Kind = "unplanned" // this host is the replica and takes over alone
	Reverse   Kind = "reverse"   // after an unplanned failover: replicate back
	Commit    Kind = "commit"    // an unplanned failover stays
	Cancel    Kind = "cancel"    // an unplanned failover is given up; this host is a replica again
	AddDisk   Kind = "add-disk"  // one more disk of a protected VM
	TakeDisk  Kind = "take-disk" // one disk less
	Test      Kind = "test"      // a test copy is made and started
	TestStop  Kind = "test-stop" // a test copy is taken away
)

// Step is one act of a plan.
type Step struct {
	// Name is stable: it stands in journals.
	Name string
	// Title is what a person reads, in the present tense.
	Title string
	// Do performs the step and returns a short detail for display. It must be
	// idempotent.
	Do func(ctx context.Context) (detail string, err error)
	// Undo takes the step back; nil when there is nothing to take back. It is
	// also called when Do failed half-way, and must cope with "never done".
	Undo func(ctx context.Context) error
	// Commit marks the point of no return: once this step has begun the plan
	// can only be continued.
	Commit bool
}

// Phase of a plan in its journal.
type Phase string

// The phases.
const (
	Running Phase = "running" // or interrupted, when nobody runs it
	Undoing Phase = "undoing"
	Done    Phase = "done"
	Undone  Phase = "undone"
)

// Journal is the durable state of one plan.
type Journal struct {
	Version   int
	Kind      Kind
	Request   string // correlation id, the same on both hosts
	Phase     Phase
	Begun     string   // the step that was last begun, "" before the first
	Finished  []string // steps that ended, in order
	Committed bool     // a step marked Commit has begun
	Failure   string   `json:",omitempty"` // why it stopped or is being undone
	Started   time.Time
	// Vars are the plan's own values (choices, positions, generations) that
	// its steps need after a restart.
	Vars json.RawMessage
}

// Event reports progress of a run: a step began (Result empty) or ended.
type Event struct {
	wire.Step
	Index, Total int
	Undo         bool
}

// Runner executes one plan over one journal file.
type Runner struct {
	FS    fsx.FS
	Path  string // journal file, e.g. "plan.json"
	Now   func() time.Time
	Event func(Event) // may be nil
	// Failpoint is told "KIND/STEP/begun" before a step acts and
	// "KIND/STEP/acted" before its end is recorded, and in a take-back
	// "KIND/STEP/undo" and "KIND/STEP/undone"; tests crash there. May be nil.
	Failpoint func(point string)

	j Journal
}

const journalVersion = 1

// maxJournal bounds what Load reads.
const maxJournal = 1 << 20

// ErrInterrupted says that a plan is in the journal and has not ended.
var ErrInterrupted = errors.New("a plan was interrupted")

// Load reads the journal. It returns nil without error when there is none or
// when the last plan ended.
func Load(fsys fsx.FS, path string) (*Journal, error) {
	var j Journal
	err := fsx.ReadJSON(fsys, path, maxJournal, &j)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read plan journal %s: %w (move the file away only after `replicactl vm status` shows both roles)", path, err)
	}
	if j.Version != journalVersion {
		return nil, fmt.Errorf("plan journal %s has version %d, this build knows %d", path, j.Version, journalVersion)
	}
	if j.Phase == Done || j.Phase == Undone {
		return nil, nil
	}
	return &j, nil
}

// Begin starts a new plan; vars is stored for a later Continue. It refuses
// with ErrInterrupted while an earlier plan has not ended.
func (r *Runner) Begin(kind Kind, request string, vars any) error {
	old, err := Load(r.FS, r.Path)
	if err != nil {
		return err
	}
	if old != nil {
		return fmt.Errorf("%s (%s): %w", old.Kind, old.Request, ErrInterrupted)
	}
	raw, err := json.Marshal(vars)
	if err != nil {
		return fmt.Errorf("store plan values: %w", err)
	}
	r.j = Journal{Version: journalVersion, Kind: kind, Request: request, Phase: Running, Started: r.Now(), Vars: raw}
	return r.save()
}

// Resume takes up the journal found by Load.
func (r *Runner) Resume(j *Journal) { r.j = *j }

// SetVars replaces the plan's values; durable when it returns.
func (r *Runner) SetVars(vars any) error {
	raw, err := json.Marshal(vars)
	if err != nil {
		return fmt.Errorf("store plan values: %w", err)
	}
	r.j.Vars = raw
	return r.save()
}

// Journal returns a copy of the current state.
func (r *Runner) Journal() Journal { return r.j }

// Run executes the steps that have not finished, in order. When one fails and
// the plan is not committed, everything begun is taken back in reverse order
// and the failure is returned; when it is committed, the plan stays in the
// journal to be continued. A cancelled ctx counts as a failure of the step.
func (r *Runner) Run(ctx context.Context, steps []Step) error {
	if r.j.Phase == Undoing {
		return r.TakeBack(ctx, steps, errors.New(r.j.Failure))
	}
	for i := range steps {
		s := &steps[i]
		if r.finished(s.Name) {
			continue
		}
		// A step that is not begun any more must not commit the plan.
		if err := ctx.Err(); err != nil {
			return r.stopped(ctx, steps, fmt.Errorf("%s: %w", s.Title, err))
		}
		r.j.Begun, r.j.Failure = s.Name, ""
		r.j.Committed = r.j.Committed || s.Commit
		if err := r.save(); err != nil {
			return err
		}
		if err := r.do(ctx, s, i, len(steps)); err != nil {
			err = fmt.Errorf("%s: %w", s.Title, err)
			if s.Commit && errors.Is(err, ErrNotTaken) {
				r.j.Committed = r.committedBefore(steps[:i])
			}
			return r.stopped(ctx, steps, err)
		}
		r.j.Finished = append(r.j.Finished, s.Name)
		if err := r.save(); err != nil {
			return err
		}
	}
	r.j.Phase = Done
	return r.save()
}

// stopped is the end of a run that failed: a committed plan waits to be
// continued, any other is taken back.
func (r *Runner) stopped(ctx context.Context, steps []Step, err error) error {
	if r.j.Committed {
		r.j.Failure = err.Error()
		return errors.Join(err, r.save())
	}
	return r.TakeBack(context.WithoutCancel(ctx), steps, err)
}

func (r *Runner) do(ctx context.Context, s *Step, i, n int) error {
	begun := r.Now()
	r.emit(Event{Step: wire.Step{Name: s.Title}, Index: i, Total: n})
	r.fail(s, "begun")
	detail, err := s.Do(ctx)
	r.fail(s, "acted")
	ev := Event{Step: wire.Step{Name: s.Title, Result: wire.OK, Detail: detail, Took: r.Now().Sub(begun)}, Index: i, Total: n}
	if err != nil {
		ev.Result, ev.Detail = wire.Failed, err.Error()
	}
	r.emit(ev)
	return err
}

// ErrNotTaken is what a Commit step returns (wrapped) when it is durably known
// that its act did not happen and never will: the plan may then be taken back.
var ErrNotTaken = errors.New("refused for good")

func (r *Runner) committedBefore(steps []Step) bool {
	for i := range steps {
		if steps[i].Commit && r.finished(steps[i].Name) {
			return true
		}
	}
	return false
}

// ErrCommitted says that a plan passed its point of no return.
var ErrCommitted = errors.New("the plan has passed its point of no return and can only be continued")

// TakeBack undoes every begun step in reverse order and returns cause, joined
// with what could not be undone; then the plan stays in the journal.
func (r *Runner) TakeBack(ctx context.Context, steps []Step, cause error) error {
	if r.j.Committed {
		return ErrCommitted
	}
	r.j.Phase = Undoing
	if cause != nil {
		r.j.Failure = cause.Error()
	}
	if err := r.save(); err != nil {
		return errors.Join(cause, err)
	}
	for i := len(steps) - 1; i >= 0; i-- {
		s := &steps[i]
		if s.Undo == nil || (!r.finished(s.Name) && r.j.Begun != s.Name) {
			continue
		}
		begun := r.Now()
		r.fail(s, "undo")
		err := s.Undo(ctx)
		r.fail(s, "undone")
		ev := Event{Step: wire.Step{Name: s.Title, Result: wire.OK, Took: r.Now().Sub(begun)}, Index: i, Total: len(steps), Undo: true}
		if err != nil {
			ev.Result, ev.Detail = wire.Failed, err.Error()
		}
		r.emit(ev)
		if err != nil {
			return errors.Join(cause, fmt.Errorf("take back %q: %w", s.Title, err))
		}
	}
	r.j.Phase = Undone
	return errors.Join(cause, r.save())
}

func (r *Runner) fail(s *Step, when string) {
	if r.Failpoint != nil {
		r.Failpoint(string(r.j.Kind) + "/" + s.Name + "/" + when)
	}
}

func (r *Runner) finished(name string) bool {
	for _, f := range r.j.Finished {
		if f == name {
			return true
		}
	}
	return false
}

func (r *Runner) emit(e Event) {
	if r.Event != nil {
		r.Event(e)
	}
}

func (r *Runner) save() error {
	if err := fsx.WriteJSON(r.FS, r.Path, &r.j); err != nil {
		return fmt.Errorf("write plan journal: %w", err)
	}
	return nil
}
