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

// A failover by force changes it, too, each one anew; a cancel leaves the guest
// that goes on where it was with the one it had; a test copy never has the
// VM's.
func TestAForcedFailoverChangesTheGenerationIDAndACancelDoesNot(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.synced()
	first := w.a.genID(t)
	c := newCopies(t, w.b)
	one := c.must(testcopy.Options{Request: "one"})
	doc, err := c.hyp.XML(t.Context(), one.UUID, libvirt.XMLPersistent)
	must(t, err)
	// Empty: libvirt makes a new one.
	if !regexp.MustCompile("<genid */>|<genid></genid>").Match(doc) {
		t.Errorf("the copy's generation id is not libvirt's to make: %s", regexp.MustCompile("<genid.*").Find(doc))
	}
	_, err = c.m.Stop(t.Context(), testVM, "", nil)
	must(t, err)

	w.powerCutA()
	must(t, w.b.do(failoverTo("", UnplannedOptions{})))
	tried := w.b.genID(t)
	must(t, w.b.do(cancel))
	w.forced.Store(false)
	w.a.reboot()
	if o := w.rest(); o != w.a {
		t.Fatal("A does not own the VM after the cancel")
	}
	w.lossy.Store(false)
	if now := w.a.genID(t); now != first {
		t.Errorf("a cancel changed it from %s to %s", first, now)
	}
	w.synced()
	w.powerCutA()
	must(t, w.b.do(failoverTo("", UnplannedOptions{})))
	again := w.b.genID(t)
	must(t, w.b.do(commit))
	if tried == first || again == first || again == tried {
		t.Errorf("at first %s, tried %s, tried again %s", first, tried, again)
	}
	if now := w.b.genID(t); now != again {
		t.Errorf("the commit changed it under the guest from %s to %s", again, now)
	}
}
