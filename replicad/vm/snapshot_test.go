package vm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/status"
)

// endedBelow has a backup's snapshot above the disk of A's guest, which then ends.
func endedBelow(t *testing.T) *pair {
	t.Helper()
	w := newPair(t)
	w.protect()
	w.shipped(w.b)
	w.a.hyper.SetGraph(string(testVM), libvirt.DiskGraph{Target: "vda", Position: libvirt.PositionBelowOverlay, Overlays: []string{"/backup.overlay"}})
	w.a.vm().look(t.Context())
	w.behind("finish the backup")
	must(t, w.a.hyper.Destroy(t.Context(), string(testVM), false))
	w.a.vm().look(t.Context())
	return w
}

// behind checks that nothing is shipped, that the snapshot is named with its
// remedy, and that no planned failover is begun.
func (w *pair) behind(remedy string) {
	w.t.Helper()
	v := w.a.vm()
	w.until("shipping to stop", func() error {
		if s := v.session(); s == nil || !s.Status().Paused {
			return errors.New("it goes on")
		}
		return nil
	})
	s := v.Status(w.t.Context(), "B")
	told := false
	for _, c := range s.Conditions {
		told = told || c.Code == "overlay" && strings.Contains(c.Text, "/backup.overlay") && strings.Contains(c.Remedy, remedy)
	}
	if s.State != status.Behind || !told {
		w.t.Errorf("state %s, conditions %+v", s.State, s.Conditions)
	}
	if err := w.a.do(planned); err == nil || !strings.Contains(err.Error(), "/backup.overlay") {
		w.t.Errorf("a planned failover: %v", err)
	}
	if p, err := v.peerView(w.t.Context()); err != nil || p.Pending >= 0 {
		w.t.Errorf("the other host is told of %d pending bytes, %v", p.Pending, err)
	}
}

func starting(o StartOptions) func(context.Context, *Manager, *VM) error {
	return func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, o) }
}

// A guest that ended below a snapshot, with its definition on the export: it is
// started neither by a person nor by libvirt nor after a boot, until somebody
// says that what lies in the snapshot is given up.
func TestAGuestThatEndedBelowASnapshotIsNotStartedWithoutIt(t *testing.T) {
	t.Parallel()
	for name, again := range map[string]func(s *side){
		"at once":                   func(*side) {},
		"the daemon starts again":   (*side).restart,
		"the host goes down and up": (*side).reboot,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := endedBelow(t)
			again(w.a)
			w.until("the guest to be held", func() error {
				w.a.vm().look(t.Context())
				if err := w.a.hook(); err == nil {
					return fmt.Errorf("libvirt may start it")
				}
				return nil
			})
			w.behind("--without-snapshot")
			if err := w.a.do(starting(StartOptions{Force: true})); err == nil || !strings.Contains(err.Error(), "/backup.overlay") {
				t.Errorf("started: %v", err)
			}
			if w.a.hyper.runs() {
				t.Fatal("the guest runs")
			}
			w.a.hyper.SetGraph(string(testVM), libvirt.DiskGraph{Target: "vda", Position: libvirt.PositionTop})
			must(t, w.a.do(starting(StartOptions{WithoutSnapshot: true})))
			w.shipped(w.b)
			must(t, w.a.do(planned))
			w.rest()
		})
	}
}

// One whose definition names the snapshot is started on it, and all is well when
// that is merged.
func TestAGuestIsStartedOnTheSnapshotThatItsDefinitionNames(t *testing.T) {
	t.Parallel()
	w := endedBelow(t)
	v := w.a.vm()
	doc, err := v.deps.Hyper.XML(t.Context(), string(testVM), libvirt.XMLPersistent)
	must(t, err)
	head, rest, _ := strings.Cut(string(doc), "<disk ")
	_, tail, _ := strings.Cut(rest, "</disk>")
	_, err = w.a.hyper.Define(t.Context(), []byte(head+"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/backup.overlay'/><target dev='vda' bus='virtio'/></disk>"+tail))
	must(t, err)
	v.look(t.Context())
	w.behind("vm start")
	must(t, w.a.do(starting(StartOptions{})))
	v.look(t.Context())
	w.behind("finish the backup")
	_, err = w.a.hyper.Define(t.Context(), doc) // as the merge leaves it
	must(t, err)
	w.a.hyper.SetGraph(string(testVM), libvirt.DiskGraph{Target: "vda", Position: libvirt.PositionTop})
	w.shipped(w.b)
}
