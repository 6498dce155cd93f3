package vm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/status"
)

// graph puts the disk of A's guest on its export, or elsewhere.
func (w *pair) graph(p libvirt.Position) {
	w.a.hyper.SetGraph(string(testVM), libvirt.DiskGraph{Target: "vda", Position: p})
}

// past is what a guest writes whose disk was taken off the export: the image
// has it, nobody tracks it.
func (w *pair) past() {
	w.t.Helper()
	f, err := os.OpenFile(filepath.Join(filepath.Dir(w.a.dir), "web.raw"), os.O_RDWR, 0)
	must(w.t, err)
	n := w.counter.Add(1)
	var b [512]byte
	binary.LittleEndian.PutUint64(b[:], n)
	for _, off := range []int64{0, int64(n%64) << 12} {
		_, err := f.WriteAt(b[:], off)
		must(w.t, err)
	}
	_, err = f.WriteAt([]byte(pastMark), pastAt)
	must(w.t, errors.Join(err, f.Sync(), f.Close()))
}

// What the guest writes nowhere else.
const (
	pastMark = "past the tracker"
	pastAt   = 3 << 20
)

// arrivedPast says whether the replica has what was written past the tracker.
func (w *pair) arrivedPast() error {
	st, err := w.b.vm().store()
	if err != nil {
		return err
	}
	v, err := st.View(st.Committed())
	if err != nil {
		return err
	}
	b := make([]byte, len(pastMark))
	d, err := v.Disk("vda")
	if err == nil {
		_, err = d.ReadAt(b, pastAt)
	}
	if err = errors.Join(err, v.Close()); err == nil && string(b) != pastMark {
		err = fmt.Errorf("the replica has %q", b)
	}
	return err
}

// Whatever ends it, writes past the tracker are found by comparison: no error
// and no death makes them be forgotten. Meanwhile nothing is shipped and no
// planned failover is begun.
func TestWritesPastTheTrackerAreNotForgotten(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(w *pair){
		"the export is back": func(w *pair) { w.graph(libvirt.PositionTop) },
		"the export is back while the daemon is away": func(w *pair) {
			w.a.kill()
			w.graph(libvirt.PositionTop)
			w.a.start()
		},
		"the record could not be written": func(w *pair) {
			v := w.a.vm()
			v.mu.Lock()
			v.rec.Bypass = "" // as if it never had been
			v.mu.Unlock()
			w.graph(libvirt.PositionTop)
		},
		"the guest ends": func(w *pair) {
			must(w.t, w.a.hyper.Destroy(w.t.Context(), string(testVM), false))
			w.graph(libvirt.PositionTop) // as it will start
		},
		"the export is back while the data plane is away": func(w *pair) {
			v := w.a.vm()
			v.machine.Lock() // nobody brings it back meanwhile
			must(w.t, dataplane.Stop(w.t.Context(), v.planeConfig()))
			w.graph(libvirt.PositionTop)
			v.lookAtGraph(w.t.Context())
			v.machine.Unlock()
			if v.bypassed() == "" {
				w.t.Error("it is forgotten although nothing could be marked")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newPair(t)
			w.protect()
			w.shipped(w.b)
			w.graph(libvirt.PositionAbsent)
			w.a.vm().look(t.Context())
			w.past()
			w.isBypassed()
			end(w)
			w.until("everything to be marked", func() error {
				if b := w.a.vm().bypassed(); b != "" {
					return errors.New(b)
				}
				return nil
			})
			if !w.a.hyper.runs() {
				must(t, w.a.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }))
			}
			w.shipped(w.b)
			must(t, w.arrivedPast())
			must(t, w.a.do(planned))
			w.rest()
		})
	}
}

// isBypassed checks what is said and done as long as it lasts.
func (w *pair) isBypassed() {
	w.t.Helper()
	v := w.a.vm()
	w.until("shipping to stop", func() error {
		if s := v.session().Status(); !s.Paused {
			return fmt.Errorf("it is %s", s.Phase)
		}
		return nil
	})
	if s := v.Status(w.t.Context(), "B"); s.State != status.Behind || s.Health != "critical" || !strings.Contains(s.Reason, "past the tracker") {
		w.t.Errorf("state %s, health %s because %q", s.State, s.Health, s.Reason)
	}
	p, err := v.peerView(w.t.Context())
	if must(w.t, err); p.Pending >= 0 {
		w.t.Errorf("the other host is told of %d pending bytes", p.Pending)
	}
	checks, err := v.PlanPlanned(context.WithoutCancel(w.t.Context()), false, false)
	must(w.t, err)
	for _, c := range checks {
		if c.Name == "Write path" && c.Result == "failed" && strings.Contains(c.Detail, "past the tracker") {
			return
		}
	}
	w.t.Errorf("a planned failover is not refused: %+v", checks)
}
