package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"kvmreplica/replicad/health"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

func resync(ctx context.Context, _ *Manager, v *VM) error { return v.Resync(ctx, ResyncOptions{}) }

// A replica's image is put back from a copy, as a backup would. It takes
// nothing, says so, and what it names as the remedy brings it back.
func TestTheRemedyOfASuspectReplicaBringsItBack(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	var we *wire.Error
	if err := w.b.do(resync); !errors.As(err, &we) || we.Kind != wire.KindRefused {
		t.Fatalf("resync of a sound replica on its own host: %v", err)
	}
	path := w.b.vm().record().Disks[0].Path
	w.b.kill()
	old, err := os.ReadFile(path)
	must(t, err)
	copy(old[2<<20:], "somebody else was here")
	must(t, os.WriteFile(path+".new", old, 0o600))
	must(t, os.Rename(path+".new", path))
	w.write(w.a, 3)
	w.b.start()
	w.until("the replica to be suspect", func() error {
		st := w.b.vm().Status(t.Context(), "A")
		for _, c := range st.Conditions {
			if c.Code == "replica-suspect" && strings.HasSuffix(c.Remedy, "on this host: replicactl vm resync web") && st.State == status.Suspect {
				return nil
			}
		}
		return fmt.Errorf("%s: %+v", st.State, st.Conditions)
	})
	w.until("the primary to say what the replica says", func() error {
		cs := w.a.vm().Status(t.Context(), "B").Conditions
		if c := condition(cs, "replica-suspect"); c == nil || !strings.Contains(c.Text, "a replica image was changed from outside") || !strings.HasSuffix(c.Remedy, "on the replica host: replicactl vm resync web") || condition(cs, "corrupt") != nil {
			return fmt.Errorf("%+v", cs)
		}
		return nil
	})
	must(t, w.b.do(resync))
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
	if c := condition(w.a.vm().Status(t.Context(), "B").Conditions, "replica-suspect"); c != nil {
		t.Fatalf("still: %+v", c)
	}
	w.until("the images to be equal", func() error {
		if !bytes.Equal(w.a.image(), w.b.image()) {
			return errors.New("they differ")
		}
		return nil
	})
	w.until("the replica to know that it was compared", func() error {
		st := w.b.vm().Status(t.Context(), "A")
		if c := condition(st.Conditions, "unverified"); c != nil || unproven(w.b) != "" {
			return fmt.Errorf("%+v; %s", c, unproven(w.b))
		}
		return nil
	})
	// what it was told lasts: no later handshake compares everything again
	w.b.kill()
	w.b.start()
	w.write(w.a, 2)
	w.rest()
	if why := unproven(w.b); why != "" {
		t.Errorf("after a restart: %s", why)
	}
	if s := w.a.vm().session().Status(); s.Verifying != "" {
		t.Errorf("the primary compares again: %s", s.Verifying)
	}
}

// unproven is why a replica wants everything compared.
func unproven(s *side) string {
	st, err := s.vm().storeStatus()
	if err != nil {
		return err.Error()
	}
	return st.VerifyAll
}

func condition(cs []health.Condition, code string) *health.Condition {
	if i := slices.IndexFunc(cs, func(c health.Condition) bool { return c.Code == code }); i >= 0 {
		return &cs[i]
	}
	return nil
}

// A suspect replica is not failed over to: the refusal comes before the role
// changes, whatever way the failover goes, and names what ends the suspicion;
// after that it works.
func TestASuspectReplicaIsNotFailedOverTo(t *testing.T) {
	for _, inPlace := range []bool{true, false} {
		t.Run(fmt.Sprintf("in place %t", inPlace), func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.rest()
			path := w.b.vm().record().Disks[0].Path
			w.a.silent.Store(true) // nothing more comes: there is nothing left to apply, which would fail early
			w.until("everything to be applied", func() error {
				if st, err := w.b.vm().storeStatus(); err != nil || st.Backlog > 0 {
					return fmt.Errorf("%d epochs: %v", st.Backlog, err)
				}
				return nil
			})
			w.b.kill()
			replaced(t, path)
			w.b.start()
			w.until("the replica to be suspect", func() error {
				if st := w.b.vm().Status(t.Context(), "A"); st.State != status.Suspect {
					return fmt.Errorf("%s", st.State)
				}
				return nil
			})
			w.forced.Store(true)
			w.lossy.Store(true)
			err := w.b.do(failoverTo("latest", UnplannedOptions{Force: true, InPlace: inPlace}))
			if err == nil || !strings.Contains(err.Error(), "changed from outside") || !strings.Contains(err.Error(), "replicactl vm resync web") {
				t.Errorf("the failover: %v", err)
			}
			if l := w.b.vm().record().Lineage; l.State != lineage.Replica || w.b.planOpen() {
				t.Fatalf("B is %s, a plan is open: %t", l.State, w.b.planOpen())
			}
			must(t, w.b.do(resync))
			// nobody has compared anything yet: that is said before the failover
			l, err := w.b.vm().Loss(t.Context(), "latest", true)
			must(t, err)
			if c := condition(w.b.vm().Status(t.Context(), "A").Conditions, "unverified"); l.Unproven == "" || c == nil {
				t.Errorf("not said to be unverified: %+v, %+v", l, c)
			}
			must(t, w.b.do(failoverTo("latest", UnplannedOptions{Force: true, InPlace: inPlace})))
			if l := w.b.vm().record().Lineage; !l.MayServe() {
				t.Errorf("B is %s", l.State)
			}
		})
	}
}

// replaced puts an equal image in the place of one, as a backup would.
func replaced(t *testing.T, path string) {
	t.Helper()
	old, err := os.ReadFile(path)
	must(t, err)
	must(t, os.WriteFile(path+".new", old, 0o600))
	must(t, os.Rename(path+".new", path))
}

// A host is put back while its failover is on trial, so that the disks cannot be
// opened any more. The commit is refused before anything is final; the trial can
// still be cancelled, and the old primary serves again.
func TestATrialWhoseDisksCannotBeOpenedIsNotCommittedButCancelled(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.powerCutA()
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
	path := w.b.vm().record().Disks[0].Path
	w.b.kill()
	w.b.hyper.halt()
	w.b.stopPlane()
	replaced(t, path)
	w.b.reboot()
	err := w.b.do(commit)
	if err == nil || !strings.Contains(err.Error(), "changed from outside") || !strings.Contains(err.Error(), "failover cancel web") {
		t.Errorf("the commit: %v", err)
	}
	if r := w.b.vm().record(); r.Overlay == nil || r.Overlay.Committed || w.b.planOpen() {
		t.Fatalf("not on trial any more: %+v, a plan is open: %t", r.Overlay, w.b.planOpen())
	}
	must(t, w.b.do(cancel))
	w.a.reboot()
	must(t, w.b.do(resync))
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}

// A host is put back to before a hand-over, and the other follows a generation
// that it does not know: it must not start the guest on its old content.
func TestAHostPutBackToBeforeAHandOverDoesNotStartItsGuest(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	h := &history{pair: w, r: rand.New(rand.NewPCG(1, 11)), kept: map[string]bool{}}
	h.putBack(w.a) // a copy of it
	w.rest()
	must(t, w.a.do(planned))
	w.rest()
	must(t, w.b.do(planned))
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
	h.putBack(w.a)
	w.until("the guest to be held", func() error {
		if w.a.hyper.runs() {
			t.Fatal("the guest was started on what was put back")
		}
		v := w.a.vm()
		v.mu.Lock()
		defer v.mu.Unlock()
		if !strings.Contains(v.held, "earlier time") {
			return fmt.Errorf("held %q", v.held)
		}
		return nil
	})
	var we *wire.Error
	start := func(force bool) error {
		return w.a.do(func(ctx context.Context, _ *Manager, v *VM) error {
			return v.StartGuest(ctx, StartOptions{Force: force})
		})
	}
	if err := start(false); !errors.As(err, &we) || !strings.Contains(we.Text, "earlier time") {
		t.Fatalf("a start by hand: %v", err)
	}
	must(t, w.b.do(failoverTo("latest", UnplannedOptions{InPlace: true})))
	w.until("the return", func() error {
		if w.b.planOpen() {
			return errors.New("the return goes on")
		}
		return w.b.do(reverse)
	})
	w.forced.Store(false)
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
}
