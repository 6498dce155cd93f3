package vm

import (
	"testing"

	"kvmreplica/replicad/session"
	"kvmreplica/replicad/status"
)

// What a host cannot know is shown as unknown, never as nothing.
func TestPendingIsKnownOnlyWhereItIsMeasured(t *testing.T) {
	w := newPair(t)
	w.protect()
	p, r := w.a.vm().Status(t.Context(), "b"), w.b.vm().Status(t.Context(), "a")
	if p.Pending < 0 || p.Disks[0].Pending < 0 {
		t.Errorf("the primary does not know what is pending: %d, disk %d", p.Pending, p.Disks[0].Pending)
	}
	if r.Pending >= 0 || r.Disks[0].Pending >= 0 {
		t.Errorf("the replica claims that %d bytes are pending, disk %d", r.Pending, r.Disks[0].Pending)
	}
}

func TestWhatTheInitialCopyHasNotSentIsPending(t *testing.T) {
	disks := []status.Disk{{Size: 100}, {Size: 50}}
	for _, c := range []struct {
		title string
		p     *session.Progress
		want  int64
	}{
		{"not begun", nil, 150},
		{"begun", &session.Progress{Phase: "seed", Done: 30, Total: 120}, 90},
		{"more than was counted", &session.Progress{Phase: "seed", Done: 130, Total: 120}, 0},
	} {
		if got := unseeded(c.p, disks); got != c.want {
			t.Errorf("%s: %d, want %d", c.title, got, c.want)
		}
	}
}
