package kvm_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab"
)

// Both hosts run QEMU as distributions do: an unprivileged user with dynamic
// ownership. Enabling must prove that this QEMU reaches the export before it
// swaps, and the replica must start from images that belong to that user.
func TestAnUnprivilegedQEMUIsProtectedAndFailsOver(t *testing.T) {
	w := up(t, estate.Options{Lab: lab.Options{NonRootQEMU: []string{"A", "B"}}})
	d := w.guest("plain", 9, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	high := w.booted(b, last.Uint("n"))
	_, err = b.WaitSynced(w.step(), high+10)
	w.must(err)
	w.replicating("B", d.Name)
	w.noErrors("A", d, false)
	w.noErrors("B", d, true)
}

// A UEFI guest's variables travel with it.
func TestAUEFIGuestTakesItsVariablesAlong(t *testing.T) {
	if _, err := os.Stat("/usr/share/OVMF/OVMF_CODE_4M.fd"); err != nil {
		t.Skip("needs ovmf: ", err)
	}
	w := up(t, estate.Options{})
	d := w.guest("efi", 10, 1, "")
	d.UEFI = true
	c := w.start(d)
	w.protect(d, "1s")
	before, err := os.ReadFile(w.Lab.Host("A").Path(d.NVRAM()))
	w.must(err)
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	atEnd, err := os.ReadFile(w.Lab.Host("A").Path(d.NVRAM()))
	w.must(err)
	w.booted(b, last.Uint("n"))
	w.replicating("B", d.Name)
	doc := w.virsh("B", "dumpxml", d.Name)
	if !strings.Contains(doc, "<nvram") {
		t.Fatalf("the replica has no variable store:\n%s", doc)
	}
	out, err := w.Lab.Host("B").Exec(w.step(), "sh", "-c", "ls /var/lib/libvirt/qemu/nvram/")
	w.must(err)
	got, err := os.ReadFile(w.Lab.Host("B").Path("/var/lib/libvirt/qemu/nvram/" + strings.TrimSpace(out)))
	w.must(err)
	// the guest's firmware may have written since; what it had must be there
	if len(got) != len(atEnd) || differ(got, atEnd) > len(atEnd)/8 {
		t.Fatalf("the variables differ in %d of %d bytes (%d changed on A after enabling)", differ(got, atEnd), len(atEnd), differ(before, atEnd))
	}
}

func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return 0
	}
	n := 0
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			n++
		}
	}
	return n
}

// What a TPM keeps for good travels with the VM (M15): a guest that sealed a key
// to it must find it on the other host.
func TestATPMsPermanentStateTravels(t *testing.T) {
	if _, err := exec.LookPath("swtpm_setup"); err != nil {
		t.Skip("needs swtpm and swtpm-tools: ", err)
	}
	w := up(t, estate.Options{})
	d := w.guest("tpm", 11, 1, "")
	d.Extra = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
	c := w.start(d)
	w.protect(d, "1s")
	b, err := w.Console("B", d, true)
	w.must(err)
	state := "/var/lib/libvirt/swtpm/" + d.UUID + "/tpm2/tpm2-00.permall"
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	atEnd, err := os.ReadFile(w.Lab.Host("A").Path(state))
	w.must(err)
	w.booted(b, last.Uint("n"))
	w.replicating("B", d.Name)
	if doc := w.virsh("B", "dumpxml", d.Name); !strings.Contains(doc, "<tpm model='tpm-crb'>") {
		t.Fatalf("the replica has no TPM:\n%s", doc)
	}
	got, err := os.ReadFile(w.Lab.Host("B").Path(state))
	w.must(err)
	// A start counts in the state; another TPM's seeds would differ everywhere.
	t.Logf("%d bytes of state, %d differ", len(atEnd), differ(got, atEnd))
	if len(got) < len(atEnd)*9/10 || differ(got, atEnd) > len(atEnd)/16 {
		t.Fatalf("the state differs in %d of %d bytes", differ(got, atEnd), len(atEnd))
	}
}
