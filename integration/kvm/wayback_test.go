package kvm_test

import (
	"fmt"
	"regexp"
	"strconv"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// The oldest of 24 recovery points is failed over to for good. The way back
// sends what either side changed since it, and what the failover took back, and
// nothing else: no more bytes than the plan said before.
func TestTheWayBackFromTheOldestOf24PointsSendsOnlyWhatDiffers(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("back", 24, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	_, err := c.WaitSynced(w.step(), c.Synced()+10)
	w.must(err)
	before := w.points("B", d.Name)
	for n := range 24 {
		e := w.status("A", d.Name).Epoch
		_, err := w.WaitStatus(w.step(), "A", d.Name, fmt.Sprintf("ready for point %d", n), func(v status.VM) bool { return v.Epoch > e })
		w.must(err)
		w.ctl("B", "point", "pin", d.Name, "latest") // makes it one
	}
	r := w.points("B", d.Name)
	if len(r.Points) < 24 || r.Points[0].Ordinal != before.Points[0].Ordinal {
		t.Fatalf("%d recovery points, the oldest is number %d", len(r.Points), r.Points[0].Ordinal)
	}
	safe := c.Synced()
	w.must(w.Lab.Host("A").Crash())

	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("B", "failover", "unplanned", d.Name, "--point", "oldest", "--force", "--yes")
	old := w.booted(b, 0)
	if old >= safe {
		t.Fatalf("the oldest point's guest found record %d, %d was durable at last", old, safe)
	}
	_, err = b.WaitSynced(w.step(), old+10)
	w.must(err)
	w.ctl("B", "failover", "commit", d.Name, "--yes")
	_, err = w.WaitStatus(w.step(), "B", d.Name, "plain images", func(v status.VM) bool { return v.Failover == nil })
	w.must(err)
	w.restart("A")
	_, err = w.WaitStatus(w.step(), "A", d.Name, "held back", func(v status.VM) bool { return !v.Running && v.Role == status.Primary })
	w.must(err)

	// Nothing is written from here on, so that the bytes can be counted.
	w.virsh("B", "suspend", d.Name)
	var plan string
	var m []string
	w.eventually("both sides can say what they changed", func() bool {
		plan, _ = w.Ctl(w.step(), "B", "failover", "reverse", d.Name, "--dry-run")
		m = regexp.MustCompile(`Changed: (\d+) bytes here, (\d+) bytes on kvm-a; the failover to an older point took back (\d+) bytes`).FindStringSubmatch(plan)
		return m != nil
	})
	var said int64
	for _, x := range m[1:] {
		n, err := strconv.ParseInt(x, 10, 64)
		w.must(err)
		said += n
	}
	if m[3] == "0" {
		t.Errorf("the failover to the oldest point took nothing back:\n%s", plan)
	}
	w.ctl("B", "failover", "reverse", d.Name, "--yes")
	v, err := w.WaitStatus(w.step(), "B", d.Name, "replicating", func(v status.VM) bool { return v.State == status.Replicating && !v.LastCommit.IsZero() })
	w.must(err)
	t.Logf("said %d bytes (%s), sent %d, %d on the wire, of a disk of %d", said, m[0], v.Stats.RawBytes, v.Stats.SentBytes, v.Disks[0].Size)
	if v.Stats.RawBytes == 0 || v.Stats.RawBytes > said {
		t.Errorf("%d bytes were sent, the plan said at most %d", v.Stats.RawBytes, said)
	}
	w.virsh("B", "resume", d.Name)
	a, err := w.Console("A", d, false)
	w.must(err)
	w.ctl("B", "failover", "planned", d.Name, "--yes")
	last, err := b.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(a, last.Uint("n"))
}
