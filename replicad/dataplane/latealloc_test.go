package dataplane

import "testing"

func TestNotingWhatIsUnderWayAllocatesNothing(t *testing.T) {
	l := newLate()
	if n := testing.AllocsPerRun(1000, func() { l.end(l.begin(4096, 8192)) }); n != 0 {
		t.Errorf("%v allocations for each change", n)
	}
}
