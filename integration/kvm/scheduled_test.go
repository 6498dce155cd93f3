package kvm_test

import (
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// A scheduled drill waits for the first complete copy, runs by itself once,
// proves the guest through its agent, and leaves a report that says so. The
// failover that follows gives the guest the address that is reserved for it on
// that host.
func TestAScheduledDrillRunsByItselfAndAFailoverTakesItsAddress(t *testing.T) {
	w := up(t, estate.Options{Config: "[[network]]\nvm = \"scheduled\"\nto = \"default\"\nip = \"192.168.122.78\"\n[[drill]]\nvm = \"scheduled\"\nevery = \"24h\"\nproof = \"agent\"\n"})
	d, _ := w.networked("scheduled", 43, "lab.net=1")
	w.protect(d, "1s")
	v, err := w.WaitStatus(w.step(), "B", d.Name, "drilled by itself", func(v status.VM) bool { return v.LastDrill != nil })
	w.must(err)
	if !v.LastDrill.OK || v.LastDrill.Proof != "agent" || v.LastDrill.RTO <= 0 || v.Proven == nil {
		t.Fatalf("the drill: %+v", v.LastDrill)
	}
	if ds := decode[[]status.Drill](t, w.ctl("B", "--json", "drill", "list", d.Name)); len(ds) != 1 {
		t.Errorf("it ran %d times: %+v", len(ds), ds)
	}
	if report := w.ctl("B", "drill", "report", d.Name); !strings.Contains(report, "by schedule") || !strings.Contains(report, "passed") {
		t.Errorf("the report:\n%s", report)
	}
	w.noCopies(d.Name)

	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	w.booted(b, 0)
	w.replicating("B", d.Name)
	if doc := w.virsh("B", "net-dumpxml", "default"); !strings.Contains(doc, "192.168.122.78") || !strings.Contains(doc, d.MAC) {
		t.Errorf("no address is reserved:\n%s", doc)
	}
	w.eventually("the guest has its address", func() bool {
		out, err := w.Lab.Host("B").Virsh(w.step(), "domifaddr", d.Name, "--source", "lease")
		return err == nil && strings.Contains(out, "192.168.122.78")
	})
}
