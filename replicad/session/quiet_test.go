package session

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/dataplane"
)

// quietSource is a data plane that only cuts, and a guest that can be frozen.
type quietSource struct {
	Source
	frozen, held    bool
	quiesce, thawed int
	freezeErr       error
	thawErr         error
	abandoned       []uint64
	cuts            []dataplane.FreezeRequest
	wasFrozen       []bool
}

func (q *quietSource) Freeze(_ context.Context, r dataplane.FreezeRequest) (dataplane.Epoch, error) {
	q.cuts, q.wasFrozen = append(q.cuts, r), append(q.wasFrozen, q.frozen)
	return dataplane.Epoch{Epoch: uint64(len(q.cuts)), App: r.App}, q.freezeErr
}

func (q *quietSource) Abandon(_ context.Context, epoch uint64) error {
	q.abandoned = append(q.abandoned, epoch)
	return nil
}

func (q *quietSource) session(refuse error, off bool) *Session {
	return New(Config{Source: q, Quiesce: func(context.Context) (func() (bool, error), error) {
		q.quiesce++
		if refuse != nil || off {
			return nil, refuse
		}
		q.frozen = true
		return func() (bool, error) {
			q.thawed++
			q.frozen = false
			return q.held, q.thawErr
		}, nil
	}})
}

func TestAnApplicationConsistentCutIsMadeWhileFrozenAndThawedWhateverHappens(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		q       *quietSource
		refuse  error
		off     bool
		app     bool // the cut is application-consistent
		why     string
		cuts    int
		wantErr error
	}{
		"all is well":             {q: &quietSource{held: true}, app: true, cuts: 1},
		"the guest is off":        {q: &quietSource{}, off: true, cuts: 1},
		"the agent is silent":     {q: &quietSource{}, refuse: broken, why: "broken", cuts: 1},
		"the guest thawed itself": {q: &quietSource{}, why: "thawed before", cuts: 2},
		"the thaw fails":          {q: &quietSource{held: true, thawErr: broken}, why: "thaw the guest: broken", cuts: 2},
		"the cut fails":           {q: &quietSource{held: true, freezeErr: broken}, cuts: 1, wantErr: broken},
	} {
		t.Run(name, func(t *testing.T) {
			e, why, err := c.q.session(c.refuse, c.off).cut(t.Context(), dataplane.FreezeRequest{}, true)
			if !errors.Is(err, c.wantErr) || e.App != (c.app || c.wantErr != nil) || !strings.Contains(why, c.why) || (why == "") != (c.why == "") {
				t.Errorf("cut %+v, why %q, %v", e, why, err)
			}
			if len(c.q.cuts) != c.cuts || c.q.frozen {
				t.Errorf("%d cuts, frozen %v", len(c.q.cuts), c.q.frozen)
			}
			for i, r := range c.q.cuts {
				if r.App != c.q.wasFrozen[i] {
					t.Errorf("cut %d is marked %v, the guest was frozen: %v", i, r.App, c.q.wasFrozen[i])
				}
			}
			if c.cuts == 2 && (len(c.q.abandoned) != 1 || c.q.abandoned[0] != 1) {
				t.Errorf("given back: %v, want the first cut", c.q.abandoned)
			}
		})
	}
}

func TestApplicationConsistentCutsKeepTheirOwnInterval(t *testing.T) {
	now := start
	m := NewMachine(MachineConfig{Interval: 10 * time.Minute, AppEvery: 25 * time.Minute, Verified: true, Rand: func() float64 { return 0 }}, now)
	m.protected, m.phase = true, Waiting
	m.nextCut, m.nextApp = now.Add(10*time.Minute), now.Add(25*time.Minute)
	var app []time.Duration
	for range 40 {
		at, ok := m.Wake()
		if !ok {
			at = m.nextCut
		}
		now = at
		for _, a := range m.Step(now, EvWake{}) {
			f, ok := a.(DoFreeze)
			if !ok {
				continue
			}
			if f.App {
				app = append(app, now.Sub(start))
			}
			m.Step(now, EvFrozen{Epoch: dataplane.Epoch{Empty: true, Cut: now}})
			m.Step(now, EvBeaten{})
		}
	}
	if len(app) < 4 || app[0] != 25*time.Minute || app[1] != 50*time.Minute || app[2] != 75*time.Minute {
		t.Errorf("application-consistent cuts after %v", app)
	}
	// An interval that is set while a plain cut is made counts from the next.
	m.cfg.AppEvery = 0
	m.Step(now, EvTrigger{})
	m.Step(now, EvAppEvery{time.Hour})
	m.Step(now, EvFrozen{Epoch: dataplane.Epoch{Empty: true, Cut: now}})
	if acts := m.Step(now, EvBeaten{}); !cmp.Equal(acts, []Action{DoFreeze{Parent: m.parent, App: true}}) {
		t.Errorf("after the interval was set: %v", acts)
	}
	m.Step(now, EvFrozen{Epoch: dataplane.Epoch{Empty: true, Cut: now}})
	m.Step(now, EvBeaten{})
	m.final = true
	if m.appDue(now.Add(time.Hour)) {
		t.Error("a final cut freezes the guest")
	}
}

// With hours between application-consistent points, one bad moment of the guest
// must not cost one.
func TestAnApplicationConsistentCutThatFailsIsMadeUpFor(t *testing.T) {
	now := start
	m := NewMachine(MachineConfig{Interval: time.Hour, AppEvery: 12 * time.Hour, Verified: true, Rand: func() float64 { return 0 }}, now)
	m.protected, m.phase = true, Waiting
	m.nextCut = now.Add(time.Hour)
	m.nextApp = now
	var at []time.Duration
	freeze := func(answer EvFrozen) {
		t.Helper()
		for range 100 {
			for _, a := range m.Step(now, EvWake{}) {
				if f, ok := a.(DoFreeze); ok {
					answer.Epoch.Cut = now
					m.Step(now, answer)
					if f.App {
						at = append(at, now.Sub(start))
						return
					}
					m.Step(now, EvBeaten{})
				}
			}
			now, _ = m.Wake()
		}
		t.Fatal("no application-consistent cut any more")
	}
	failed := EvFrozen{Epoch: dataplane.Epoch{Empty: true}, AppError: "the guest does not answer"}
	for range 3 {
		freeze(failed)
		m.Step(now, EvBeaten{})
	}
	freeze(EvFrozen{Epoch: dataplane.Epoch{Epoch: 1, App: true}})
	m.drop = true // given back: it is no point either
	m.Step(now, EvFailed{Class: ClassLink})
	m.Step(now, EvAbandoned{})
	if want := m.cutAt.Add(appRetry); !m.nextApp.Equal(want) {
		t.Errorf("after a cut was given back the next is at %v, want %v", m.nextApp, want)
	}
	if want := []time.Duration{0, time.Minute, 3 * time.Minute, 7 * time.Minute}; !slices.Equal(at, want) {
		t.Errorf("application-consistent cuts after %v, want %v", at, want)
	}
	if m.appFails != 0 || m.meter.stats.AppFailed != 3 || m.meter.stats.AppError != "" {
		t.Errorf("failed in a row %d, in all %d, last error %q", m.appFails, m.meter.stats.AppFailed, m.meter.stats.AppError)
	}
}
