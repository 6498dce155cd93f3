package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/lineage"
)

// action is what a person asks of a host.
type action = func(context.Context, *Manager, *VM) error

// aPlan is a plan in its natural surroundings: how things are before it, what a
// person does, when it is through, and what must hold then.
type aPlan struct {
	prepare func()
	act     func() (*side, action)
	through func() error
	end     func()
	lost    *side // this host is off until the end
	insist  bool  // the person does not wait for what goes on by itself
}

// everyPlan makes each plan of the product around a fresh pair.
func everyPlan() map[string]func(t *testing.T, w *pair) aPlan {
	return map[string]func(t *testing.T, w *pair) aPlan{
		"enable":            enabling(false),
		"enable a running":  enabling(true),
		"disable":           disabling(false),
		"disable a running": disabling(true),
		"delete an orphan":  deletingAnOrphan,
		"planned":           planning,
		"planned, declined": takingBack,
		"take-back, forced": takingBackByForce,
		"unplanned":         takingOver,
		"return":            returning,
		"add a disk":        addingADisk,
		"remove a disk":     removingADisk,
	}
}

// images lists what lies below this host's storage root.
func (s *side) images() []string {
	s.t.Helper()
	left, err := filepath.Glob(filepath.Join(s.root, "*", "*"))
	must(s.t, err)
	return left
}

func enable(ctx context.Context, m *Manager, _ *VM) error {
	_, err := m.Enable(ctx, EnableOptions{Name: "web", Peer: "00000000-0000-4000-8000-00000000000B", Interval: testInterval, Request: "enable"}, nil)
	return err
}

// boot lets a guest run that does not use our exports yet.
func (w *pair) boot() {
	w.t.Helper()
	must(w.t, w.a.hyper.Fake.Start(context.Background(), string(testVM), libvirt.StartOptions{}))
}

func (w *pair) doc() []byte {
	w.t.Helper()
	doc, err := w.a.hyper.XML(context.Background(), string(testVM), libvirt.XMLPersistent)
	must(w.t, err)
	return doc
}

func (w *pair) protected() error {
	if v := w.a.vm(); v == nil || !v.record().Placed {
		return errors.New("A does not protect it")
	}
	return w.copied(w.a, w.b)
}

func enabling(running bool) func(t *testing.T, w *pair) aPlan {
	return func(t *testing.T, w *pair) aPlan {
		return aPlan{
			prepare: func() {
				if running {
					w.boot()
				}
			},
			act:     func() (*side, action) { return w.a, enable },
			through: w.protected,
			end: func() {
				if running {
					w.a.vm().look(t.Context())
					if b := w.a.vm().bypassed(); b != "" {
						t.Fatalf("the guest writes past us: %s", b)
					}
					return
				}
				must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
				if o := w.rest(); o != w.a {
					t.Fatal("A does not own the VM")
				}
			},
		}
	}
}

func disable(o DisableOptions) action {
	return func(ctx context.Context, m *Manager, v *VM) error {
		if v == nil {
			return nil
		}
		o.Request = "disable"
		return m.Disable(ctx, v, o, nil)
	}
}

func disabling(running bool) func(t *testing.T, w *pair) aPlan {
	return func(t *testing.T, w *pair) aPlan {
		var before []byte
		return aPlan{
			prepare: func() {
				before = w.doc()
				if running {
					w.boot()
				}
				must(t, w.a.do(enable))
				w.until("a complete copy", w.protected)
			},
			act: func() (*side, action) { return w.a, disable(DisableOptions{}) },
			through: func() error {
				if w.a.vm() != nil {
					return errors.New("A still knows the VM")
				}
				if v := w.b.vm(); v != nil && v.record().Orphan == nil {
					return errors.New("B was not told")
				}
				return nil
			},
			end: func() {
				if now := w.doc(); !bytes.Equal(now, before) {
					t.Fatalf("the definition is\n%s\nit was\n%s", now, before)
				}
			},
		}
	}
}

func deletingAnOrphan(t *testing.T, w *pair) aPlan {
	ended := disabling(false)(t, w)
	return aPlan{
		prepare: func() {
			ended.prepare()
			must(t, w.a.do(disable(DisableOptions{})))
			if v := w.b.vm(); v == nil || v.record().Orphan == nil {
				t.Fatal("B holds no orphan")
			}
		},
		act: func() (*side, action) { return w.b, disable(DisableOptions{Delete: true}) },
		through: func() error {
			if w.b.vm() != nil {
				return errors.New("B still knows the VM")
			}
			return nil
		},
		end: func() {
			if left := w.b.images(); len(left) > 0 {
				t.Fatalf("left over: %v", left)
			}
		},
	}
}

func planning(t *testing.T, w *pair) aPlan {
	return aPlan{
		prepare: w.protect,
		act:     func() (*side, action) { return w.a, planned },
		through: func() error {
			if o := w.owner(); o != w.b {
				return errors.New("B does not own the VM")
			}
			return w.settled()
		},
		end: func() { w.rest() },
	}
}

// takingBack: the other host declines at the last moment, for good.
func takingBack(t *testing.T, w *pair) aPlan {
	return aPlan{
		prepare: func() {
			w.protect()
			_, err := w.b.vm().decline("declined", "the test says so")
			must(t, err)
		},
		act: func() (*side, action) {
			return w.a, func(ctx context.Context, _ *Manager, v *VM) error {
				return v.Planned(ctx, PlannedOptions{Request: "declined"}, nil)
			}
		},
		through: w.settled,
		end: func() {
			if o := w.rest(); o != w.a {
				t.Fatal("A does not own the VM")
			}
		},
	}
}

// takingBackByForce: the other host was asked to take over and is silent since.
func takingBackByForce(t *testing.T, w *pair) aPlan {
	ended := make(chan struct{})
	return aPlan{
		prepare: func() {
			w.protect()
			asked := make(chan struct{})
			w.a.mu.Lock()
			w.a.atPoint = map[string]func(){"planned/promote/begun": func() { w.b.silent.Store(true); close(asked) }}
			w.a.mu.Unlock()
			go func() { defer close(ended); _ = w.a.do(planned) }() // the take-back interrupts it
			<-asked
		},
		act: func() (*side, action) {
			return w.a, func(ctx context.Context, _ *Manager, v *VM) error { return v.Settle(ctx, true, true) }
		},
		insist: true,
		through: func() error {
			if l := w.a.vm().record().Lineage; !l.MayServe() || !l.Forced || !w.a.hyper.runs() {
				return fmt.Errorf("A is %s, forced %t, its guest runs %t", l.State, l.Forced, w.a.hyper.runs())
			}
			return nil
		},
		end: func() {
			<-ended
			w.b.silent.Store(false)
			if o := w.rest(); o != w.a {
				t.Fatal("A does not own the VM")
			}
		},
	}
}

func takingOver(t *testing.T, w *pair) aPlan {
	return aPlan{
		prepare: func() {
			w.protect()
			w.synced()
			w.powerCutA()
		},
		lost: w.a,
		act:  func() (*side, action) { return w.b, failoverTo("latest", UnplannedOptions{InPlace: true}) },
		through: func() error {
			if !w.b.vm().record().Lineage.MayServe() || !w.b.hyper.runs() || w.b.planOpen() {
				return errors.New("B does not run it")
			}
			return nil
		},
		end: func() {
			w.a.reboot()
			w.until("A to learn of the promotion", w.primaryHeld)
			w.forced.Store(false)
			w.b.until(reverse, func(v *VM) bool { return !v.record().NoReverse })
			if o := w.rest(); o != w.b {
				t.Fatal("B does not own the VM")
			}
		},
	}
}

func returning(t *testing.T, w *pair) aPlan {
	return aPlan{
		prepare: func() {
			w.protect()
			w.losePrimary()
			w.a.reboot()
			w.until("A to learn of the promotion", w.primaryHeld)
		},
		act: func() (*side, action) { return w.b, reverse },
		through: func() error {
			if w.b.vm().record().NoReverse || w.b.planOpen() || w.a.vm().record().Lineage.State != lineage.Replica {
				return errors.New("not yet")
			}
			return nil
		},
		end: func() {
			w.forced.Store(false)
			if o := w.rest(); o != w.b {
				t.Fatal("B does not own the VM")
			}
		},
	}
}

// drive does what p is about until it is through: a daemon that dies is started
// again, what was interrupted must go on by itself, and a person repeats what
// was taken back.
func (w *pair) drive(p aPlan) {
	w.t.Helper()
	var answer chan error
	asked := false
	w.until("the plan to be through", func() error {
		w.check()
		w.reviveBut(p.lost)
		if answer != nil {
			select {
			case <-answer:
				answer = nil
			default:
				return errors.New("the command goes on")
			}
		}
		for _, s := range []*side{w.a, w.b} {
			if asked && !p.insist && s.vm() != nil && s.planOpen() {
				return errors.New("a plan is open on " + s.name)
			}
		}
		if asked && p.through() == nil {
			return nil
		}
		asked = true
		s, f := p.act()
		answer = make(chan error, 1)
		go func(answer chan<- error) { answer <- s.do(f) }(answer)
		return errors.New("asked")
	})
	w.reviveBut(p.lost)
}

// passedBy lists the points that a side's plans passed since the last call.
func (s *side) passedBy() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.DeleteFunc(s.passed, func(p string) bool { return strings.HasPrefix(p, "quiesce/") })
	s.passed = nil
	slices.Sort(out)
	return slices.Compact(out)
}

// Every step of every plan, on either host: the daemon dies before it acts and
// before its end is recorded, also in a take-back. The points are those that a
// whole run passes, so that a new step is in the test by itself.
func TestACrashAtEveryStepOfEveryPlanIsContinued(t *testing.T) {
	if testing.Short() {
		t.Skip("a sweep over every point")
	}
	total := 0
	for name, of := range everyPlan() {
		w := newPair(t)
		p := of(t, w)
		p.prepare()
		w.a.passedBy()
		w.b.passedBy()
		w.drive(p)
		at := map[string][]string{"A": w.a.passedBy(), "B": w.b.passedBy()}
		p.end()
		w.check()
		t.Logf("%-18s %3d points on A, %3d on B", name, len(at["A"]), len(at["B"]))
		if len(at["A"])+len(at["B"]) < 4 {
			t.Errorf("%s passed only %v", name, at)
		}
		for host, points := range at {
			total += len(points)
			for _, point := range points {
				t.Run(name+" "+host+" "+strings.ReplaceAll(point, "/", " "), func(t *testing.T) {
					t.Parallel()
					w := newPair(t)
					p := of(t, w)
					p.prepare()
					s := w.a
					if host == "B" {
						s = w.b
					}
					s.mu.Lock()
					s.crashAt = point
					s.mu.Unlock()
					w.drive(p)
					s.mu.Lock()
					met := s.crashAt == ""
					s.mu.Unlock()
					if !met {
						t.Fatal("it was not reached")
					}
					p.end()
					w.check()
				})
			}
		}
	}
	t.Logf("%d crash points", total)
	if total < 100 {
		t.Errorf("only %d crash points", total)
	}
}
