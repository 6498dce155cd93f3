package vm

import "testing"

func TestAPlannedFailoverThereAndBackLosesNothing(t *testing.T) {
	w := newPair(t)
	w.protect()
	if err := w.a.do(planned); err != nil {
		t.Fatal(err)
	}
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	if err := w.b.do(planned); err != nil {
		t.Fatal(err)
	}
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM")
	}
}
