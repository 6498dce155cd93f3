package kvm_test

import (
	"os"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// A drill whose proof never comes fails, leaves nothing but a report, and is
// shown until one passes. One that waits for a text on the console passes; so
// does one in a test network, in which the copy gets the address that the
// configuration reserves for it.
func TestDrillsProveTheGuestAndLeaveNothingButReports(t *testing.T) {
	w := up(t, estate.Options{Config: "[[network]]\nvm = \"drilled\"\nto = \"default\"\ntest = \"default\"\ntest_ip = \"192.168.122.77\"\n"})
	d, _ := w.networked("drilled", 42, "lab.net=1")
	w.protect(d, "1s")
	out := w.refused("B", 1, "drill", d.Name, "--isolated", "--proof", "console:never said", "--timeout", "2s")
	if !strings.Contains(out, "/var/lib/replicad/drills/") {
		t.Errorf("the report is not named:\n%s", out)
	}
	v := w.noCopies(d.Name)
	if v.LastDrill == nil || v.LastDrill.OK || v.Proven != nil || !strings.Contains(fmtConditions(v), "drill-failed: ") {
		t.Errorf("the failure is not shown: %+v", v.LastDrill)
	}
	w.refused("B", 6, "drill", d.Name, "--isolated", "--proof", "tcp:22")
	w.refused("B", 2, "drill", d.Name, "--proof", "hope")

	out = w.ctl("B", "drill", d.Name, "--isolated", "--proof", "console:highest=")
	if !strings.Contains(out, "worked") || !strings.Contains(out, "Prove the isolation") {
		t.Errorf("the drill said:\n%s", out)
	}
	out = w.ctl("B", "drill", d.Name, "--proof", "command:/bin/grep -q 192.168.122.77 /var/lib/libvirt/dnsmasq/virbr0.status")
	if !strings.Contains(out, "NOT isolated") || !strings.Contains(out, "192.168.122.77 in default") {
		t.Errorf("the drill in a test network said:\n%s", out)
	}
	if doc := w.virsh("B", "net-dumpxml", "default"); strings.Contains(doc, "192.168.122.77") {
		t.Errorf("the reservation is left over:\n%s", doc)
	}
	v = w.noCopies(d.Name)
	if v.LastDrill == nil || !v.LastDrill.OK || v.LastDrill.RTO <= 0 || v.Proven == nil || strings.Contains(fmtConditions(v), "drill-failed") {
		t.Errorf("the drill that passed is not shown: %+v", v.LastDrill)
	}
	there, err := w.WaitStatus(w.step(), "A", d.Name, "aware of the other host's drill", func(v status.VM) bool { return v.Proven != nil })
	w.must(err)
	for _, got := range []*status.Drill{there.LastDrill, there.Proven} {
		if got.Host != estate.Peer("B") || got.Point != v.Proven.Point || got.RTO != v.Proven.RTO || !got.Started.Equal(v.Proven.Started) {
			t.Errorf("the primary shows %+v, the replica's host %+v", got, v.Proven)
		}
	}
	for _, h := range []string{"A", "B"} {
		text := w.ctl(h, "vm", "status", d.Name)
		for _, want := range []string{"Last test:", "Last drill:", "passed", "Last proven:", v.Proven.Point, " on kvm-b"} {
			if !strings.Contains(text, want) {
				t.Errorf("the status on %s does not say %q:\n%s", h, want, text)
			}
		}
	}
	report := w.ctl("B", "drill", "report", d.Name)
	kept, err := os.ReadFile(w.Lab.Host("B").Path(v.LastDrill.Report))
	w.must(err)
	if string(kept) != report || !strings.Contains(report, "passed") || !strings.Contains(report, "192.168.122.77") {
		t.Errorf("the report:\n%s\nthe file:\n%s", report, kept)
	}
	if ds := decode[[]status.Drill](t, w.ctl("B", "--json", "drill", "list", d.Name)); len(ds) < 3 || ds[0].OK {
		t.Errorf("%d drills are listed: %+v", len(ds), ds)
	}
}
