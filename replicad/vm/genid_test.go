package vm

import (
	"regexp"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/testcopy"
)

func (s *side) genID(t *testing.T) string {
	t.Helper()
	doc, err := s.hyper.XML(t.Context(), string(testVM), libvirt.XMLPersistent)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("<genid>([0-9a-f-]{36})</genid>").FindSubmatch(doc)
	if m == nil {
		t.Fatalf("%s has no generation id: %s", s.name, doc)
	}
	return string(m[1])
}

func TestTheGenerationIDChangesWithEveryFailoverAndNotByATest(t *testing.T) {
	w := newPair(t)
	w.protect()
	w.sync()
	seen := map[string]string{}
	first := w.a.genID(t)
	seen[first] = "at first"
	c := newCopies(t, w.b)
	c.must(testcopy.Options{Request: "one"})
	if _, err := c.m.Stop(t.Context(), testVM, "", nil); err != nil {
		t.Fatal(err)
	}
	if now := w.a.genID(t); now != first {
		t.Errorf("a test changed it from %s to %s", first, now)
	}
	for _, s := range []*side{w.a, w.b, w.a} {
		if err := s.do(planned); err != nil {
			t.Fatal(err)
		}
		w.rest()
		id := s.other.genID(t)
		if was := seen[id]; was != "" {
			t.Errorf("after the failover to %s it is %s as %s", s.other.name, id, was)
		}
		seen[id] = "on " + s.other.name
	}
}
