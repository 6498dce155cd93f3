package vm

import (
	"errors"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/lineage"
)

// A host that was promoted once, and had to give that role up later, fails half
// way in giving it up. Asked again it must take epochs, without a restart.
func TestAReleaseThatFailedHalfWayTakesEpochsWhenRepeated(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	must(t, w.a.do(planned))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	w.b.silent.Store(true)
	w.lossy.Store(true)
	w.forced.Store(true)
	must(t, w.a.do(unplanned(true)))
	w.write(w.a, 3)
	must(t, w.b.hyper.Shutdown(t.Context(), string(testVM), libvirt.ShutdownOptions{}))
	w.lossy.Store(false)
	w.b.silent.Store(false)
	w.b.fs.keepFiles.Store(true)
	w.until("the return", func() error {
		if w.b.vm().record().Lineage.State == lineage.Replica {
			w.b.fs.keepFiles.Store(false) // the role is given up, its store was not made
		}
		if !w.a.vm().record().NoReverse {
			return nil
		}
		if w.a.planOpen() {
			return errors.New("the return goes on")
		}
		return errors.Join(w.a.do(reverse), errors.New("not yet"))
	})
	w.forced.Store(false)
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}
