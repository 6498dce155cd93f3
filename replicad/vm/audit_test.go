package vm

import (
	"strings"
	"testing"
)

// One correlation id names a failover on both hosts.
func TestBothHostsKeepWhoChangedARoleUnderOneId(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	must(t, w.a.do(planned))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	of := func(s *side, plan string) (request string) {
		t.Helper()
		all, err := s.vm().Audit(1000)
		must(t, err)
		for _, e := range all {
			if e.What == "plan "+plan && strings.HasPrefix(e.Result, "done") {
				request = e.Request
			}
		}
		for _, e := range all {
			if e.Request == request && strings.HasPrefix(e.What, "role ") {
				return request
			}
		}
		t.Fatalf("%s: no plan %s with its role change among %+v", s.name, plan, all)
		return ""
	}
	if a, b := of(w.a, "planned"), of(w.b, "promote"); a == "" || a != b {
		t.Fatalf("A calls it %q, B %q", a, b)
	}
}
