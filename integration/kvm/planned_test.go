package kvm_test

import (
	"regexp"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// The main job with two disks on an iothread: the guest is never stopped by
// enabling, both ways lose nothing, the second one is asked for on the replica
// host, and disabling gives the definition back byte for byte.
func TestPlannedFailoverThereAndBackLosesNothing(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("two", 1, 2, "")
	d.IOThread = true
	c := w.start(d)
	before := w.virsh("A", "dumpxml", "--inactive", d.Name)
	w.protect(d, "2s")
	w.noErrors("A", d, false)

	on := w.virsh("A", "dumpxml", "--inactive", d.Name)
	if !strings.Contains(on, "protocol='nbd'") || strings.Contains(on, "<source file=") {
		t.Fatalf("the definition does not point at the exports:\n%s", on)
	}
	if out := w.virsh("B", "domstate", d.Name); !strings.Contains(out, "shut off") {
		t.Fatalf("the replica's domain is %q", out)
	}
	if out, err := w.Lab.Host("B").Virsh(w.step(), "start", d.Name); err == nil {
		t.Fatalf("the replica could be started by mistake: %s", out)
	} else if !strings.Contains(err.Error(), "refuses to start") {
		t.Fatalf("the refusal does not say why: %v", err)
	}

	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("B", "point", "pin", d.Name, "latest")
	w.ctl("B", "point", "export", d.Name, "--point", "oldest", "--to", replicaRoot)
	if out := w.ctl("A", "failover", "planned", d.Name, "--dry-run"); !strings.Contains(out, "END with the failover") || !strings.Contains(out, "--keep-points") {
		t.Errorf("it is not said what becomes of the recovery points:\n%s", out)
	}
	moved := w.ctl("A", "failover", "planned", d.Name, "--keep-points", "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	high := w.booted(b, last.Uint("n"))
	w.replicating("B", d.Name)
	if v := w.status("A", d.Name); v.Role != status.Replica || v.Running {
		t.Fatalf("the old primary is %s, running %v", v.Role, v.Running)
	}
	_, err = b.WaitSynced(w.step(), high+10)
	w.must(err)
	w.keptHistory(moved, d.Name)

	// asked for on the replica host
	a, err := w.Console("A", d, false)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err = b.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(a, last.Uint("n"))
	w.replicating("A", d.Name)
	w.noErrors("A", d, false)
	w.noErrors("B", d, true)

	_, err = a.WaitSynced(w.step(), 0)
	w.must(err)
	w.ctl("A", "vm", "disable", d.Name, "--yes")
	if after := w.virsh("A", "dumpxml", "--inactive", d.Name); after != before {
		t.Fatalf("the definition did not come back byte for byte:\n--- before\n%s\n--- after\n%s", before, after)
	}
	w.orphan("B", d.Name)
	if out := w.virsh("B", "list", "--all", "--name"); strings.TrimSpace(out) != "" {
		t.Fatalf("the replica's domain is left over: %q", out)
	}
	synced := a.Synced()
	_, err = a.WaitSynced(w.step(), synced+10)
	w.must(err)
	w.noErrors("A", d, false)
	if out := w.ctl("A", "--json", "vm", "list"); len(decode[[]status.VM](t, out)) != 0 {
		t.Fatalf("still listed: %s", out)
	}
}

// keptHistory expects that a failover kept the recovery points on B, for
// replicafsck to read, and that the oldest is what was exported of it before.
func (w *world) keptHistory(out, vm string) {
	w.t.Helper()
	m := regexp.MustCompile(`recovery points? kept in (/\S+?),?\s`).FindStringSubmatch(out)
	if m == nil {
		w.t.Fatalf("it is not said where the recovery points are:\n%s", out)
	}
	dump, err := w.fsck("B", "dump", m[1])
	w.must(err)
	epoch := regexp.MustCompile(`point +epoch (\d+) `).FindStringSubmatch(dump)
	if epoch == nil || !strings.Contains(dump, ", pinned") {
		w.t.Fatalf("what was kept:\n%s", dump)
	}
	copied, err := w.fsck("B", "recover", m[1], "--read-only-copy", replicaRoot+"/copied", "--point", epoch[1])
	w.must(err)
	for _, disk := range []string{"vda", "vdb"} {
		if _, err := w.Lab.Host("B").Exec(w.step(), "cmp", replicaRoot+"/copied/"+disk+".raw", replicaRoot+"/"+vm+"-"+disk+".raw"); err != nil {
			w.t.Errorf("the kept point of %s is not what it was: %v\n%s", disk, err, copied)
		}
	}
}

// orphan expects that a host kept its copy although the other one ended the
// relationship, and deletes it as its administrator.
func (w *world) orphan(host, vm string) {
	w.t.Helper()
	v := decode[status.VM](w.t, w.ctl(host, "--json", "vm", "status", vm))
	if v.State != status.Orphan {
		w.t.Fatalf("%s is %s on %s after the other host ended the relationship, want an orphan", vm, v.State, host)
	}
	if r := decode[wire.PointsReply](w.t, w.ctl(host, "--json", "point", "list", vm)); len(r.Points) == 0 || r.Orphan == "" {
		w.t.Fatalf("the orphan's points: %+v", r)
	}
	w.ctl(host, "vm", "disable", vm, "--delete-replica", "--yes")
}
