package vm

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// refusedSet wants an addition and a removal refused with the words and a next
// command, and nothing changed.
func (w *pair) refusedSet(s *side, words, hint string) {
	w.t.Helper()
	xml := func() []byte {
		b, err := s.hyper.XML(w.t.Context(), string(testVM), libvirt.XMLPersistent)
		must(w.t, err)
		return b
	}
	before, second := xml(), s.second()
	for _, o := range []DiskOptions{{Disk: "vdb", Request: "add"}, {Disk: "vda", Remove: true, Request: "take"}} {
		var err error
		w.until("no other operation", func() error {
			err = s.do(func(ctx context.Context, _ *Manager, v *VM) error { return v.SetDisk(ctx, o, nil) })
			if err != nil && strings.Contains(err.Error(), "another operation") {
				return err
			}
			return nil
		})
		var e *wire.Error
		if !errors.As(err, &e) || !strings.Contains(e.Text, words) || !strings.Contains(e.Hint, hint) {
			w.t.Errorf("%s: %v; want %q and %q", o.Request, err, words, hint)
		}
	}
	if s.planOpen() || s.second() != second || !bytes.Equal(xml(), before) {
		w.t.Error("something was changed")
	}
}

// Where the set of disks is not this host's to change now, that is said with the
// way out.
func TestAChangeOfTheSetIsRefusedInAStateThatForbidsIt(t *testing.T) {
	t.Parallel()
	t.Run("on trial, then not reversed", func(t *testing.T) {
		t.Parallel()
		w := newPair(t)
		w.protectFirst()
		w.shipped(w.b)
		w.powerCutA()
		must(t, w.b.do(failoverTo("latest", UnplannedOptions{})))
		w.refusedSet(w.b, "not final yet", "failover commit web")
		must(t, w.b.do(commit))
		w.until("the images to be all there is", w.b.flattened)
		w.refusedSet(w.b, "nothing is replicated since the failover", "failover reverse web")
		w.a.start()
		w.until("A to know", w.primaryHeld)
		w.refusedSet(w.a, "may own this VM", "failover reverse web")
	})
	t.Run("diverged", func(t *testing.T) {
		t.Parallel()
		w := newPair(t)
		w.protectFirst()
		w.shipped(w.b)
		must(t, w.a.do(pausing))
		for _, s := range []*side{w.b, w.a} {
			s.vm().conclude(lineage.Decision{Alarm: true, Diverged: true, Row: "forked", Reason: "both sides went on from a common point"}, [16]byte{7})
		}
		w.refusedSet(w.a, "may own this VM", "failover reverse web")
	})
}
