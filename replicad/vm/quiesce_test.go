package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/libvirt/libvirttest"
	"kvmreplica/replicad/wire"
)

// journal is the file that says that the guest may be frozen.
func (s *side) journal() error {
	_, err := os.Stat(filepath.Join(s.dir, "state", "vms", string(testVM), frozenFile))
	if err == nil {
		return fmt.Errorf("the journal says that the guest is frozen")
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (s *side) appEvery(d time.Duration) error {
	return s.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.SetAppEvery(ctx, d) })
}

// thawed waits until nothing of a freeze is left.
func (w *pair) thawed() {
	w.t.Helper()
	w.until("the guest to be thawed", func() error {
		if w.a.hyper.Frozen(string(testVM)) {
			return fmt.Errorf("frozen")
		}
		return w.a.journal()
	})
}

func TestApplicationConsistentPointsAreShownAndTheGuestIsThawed(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	if err := w.b.appEvery(time.Hour); !kindIs(err, wire.KindRefused) {
		t.Errorf("the replica sets the interval: %v", err)
	}
	if err := w.a.appEvery(time.Second); !kindIs(err, wire.KindInvalid) {
		t.Errorf("every second: %v", err)
	}
	// Nobody answers: the point is crash-consistent, counted and told.
	must(t, w.a.appEvery(time.Hour))
	w.until("the failure to be counted", func() error {
		st := w.a.vm().Status(t.Context(), "B")
		if st.Stats.AppFailed != 1 || st.AppEvery != time.Hour {
			return fmt.Errorf("%d failed of every %s", st.Stats.AppFailed, st.AppEvery)
		}
		for _, c := range st.Conditions {
			if c.Code == "app-points" && strings.Contains(c.Remedy, "domfsfreeze") {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v", st.Conditions)
	})
	w.thawed()
	w.a.hyper.SetAgent(string(testVM), true)
	must(t, w.a.appEvery(2*time.Hour))
	w.until("an application-consistent point", func() error {
		for _, s := range []*side{w.a, w.b} {
			n := 0
			for _, p := range w.list(s).Points {
				if p.App {
					n++
				}
			}
			if n != 1 {
				return fmt.Errorf("%s lists %d: %+v", s.name, n, w.a.vm().Status(t.Context(), "B").Stats)
			}
		}
		return nil
	})
	w.thawed()
	w.rest()
	st := w.a.vm().Status(t.Context(), "B")
	if st.Stats.AppPoints != 1 || st.Stats.AppError != "" || st.Stats.LastApp.IsZero() {
		t.Errorf("after it: %+v", st.Stats)
	}
	if got := w.b.vm().record().AppEvery; got != 2*time.Hour {
		t.Errorf("the replica's record says every %s: a failover would forget it", got)
	}
}

// The daemon dies while the guest is frozen: the next one thaws it, however
// long the agent takes to answer.
func TestAGuestFrozenByADaemonThatDiedIsThawedByTheNext(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	w.a.hyper.SetAgent(string(testVM), true)
	w.a.hyper.On(libvirttest.Rule{Op: "Thaw", Err: &libvirt.Error{Op: "Thaw", Kind: libvirt.KindAgent, Msg: "silent"}})
	must(t, w.a.appEvery(time.Hour))
	w.until("the freeze", func() error {
		if !w.a.hyper.Frozen(string(testVM)) {
			return fmt.Errorf("not frozen")
		}
		return nil
	})
	w.until("the condition", func() error {
		for _, c := range w.a.vm().Status(t.Context(), "B").Conditions {
			if c.Code == "guest-frozen" {
				return nil
			}
		}
		return fmt.Errorf("nothing is told")
	})
	w.a.kill()
	if w.a.journal() == nil {
		t.Fatal("nothing on disk tells that the guest is frozen")
	}
	w.a.start()
	w.until("the next daemon to try", func() error {
		if err := w.a.journal(); err == nil {
			return errors.New("the journal went although the guest is frozen")
		}
		if w.a.hyper.Frozen(string(testVM)) {
			return nil
		}
		return errors.New("thawed although the agent is silent")
	})
	w.a.hyper.Clear()
	w.thawed()
	w.rest()
}
