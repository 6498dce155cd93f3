package kvm_test

import (
	"context"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// trialSteps are the steps of an unplanned failover and of what ends it.
var trialSteps = map[string][]string{
	"unplanned": {"apply", "generation", "store", "tracker", "define", "firmware", "start", "reverse"},
	"cancel":    {"stop", "close", "role", "drop", "follow"},
	"commit":    {"keep", "role", "seal"},
	"reverse":   {"keep", "final", "release", "ship"},
}

// Every step of an unplanned failover, of its cancel, its commit and of the way
// back is crashed before and after its act. Whatever happens, the command can be
// repeated, and in the end one host is the primary and replication runs.
func TestACrashAtEveryStepOfAnUnplannedFailoverAndItsEndSettles(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.offGuest("trials", 9)
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	run := func(host string, args ...string) func(context.Context) {
		return func(ctx context.Context) {
			_, _ = w.Ctl(ctx, host, append(append([]string{"failover"}, args...), d.Name, "--yes")...)
		}
	}
	for _, kind := range []string{"unplanned", "cancel", "commit", "reverse"} {
		for _, step := range trialSteps[kind] {
			for _, when := range []string{"begun", "acted"} {
				point := kind + "/" + step + "/" + when
				primary := w.settled(d.Name)
				host := other(primary)
				onTrial := func() { w.failedOver(host, d.Name, status.Trial) }
				final := func() { w.failedOver(host, d.Name, "") }
				if kind == "unplanned" {
					w.crashAt(host, point, run(host, "unplanned", "--no-start"))
					if w.rested(host, d.Name).Failover == nil { // taken back
						w.ctl(host, "failover", "unplanned", d.Name, "--no-start", "--yes")
					}
				} else {
					w.ctl(host, "failover", "unplanned", d.Name, "--no-start", "--yes")
				}
				onTrial()
				switch kind {
				case "unplanned":
					w.ctl(host, "failover", "cancel", d.Name, "--yes")
				case "cancel":
					w.crashWhen(onTrial, host, point, run(host, "cancel"))
					if w.rested(host, d.Name).Failover != nil {
						w.ctl(host, "failover", "cancel", d.Name, "--yes")
					}
				case "commit":
					w.crashWhen(onTrial, host, point, run(host, "commit", "--keep-points"))
					if f := w.rested(host, d.Name).Failover; f != nil && f.Phase == status.Trial {
						w.ctl(host, "failover", "commit", d.Name, "--yes")
					}
					final()
					w.ctl(host, "failover", "reverse", d.Name, "--yes")
				case "reverse":
					w.ctl(host, "failover", "commit", d.Name, "--yes")
					final()
					w.crashWhen(final, host, point, run(host, "reverse"))
					if v := w.rested(host, d.Name); v.State == status.FailedOver {
						w.ctl(host, "failover", "reverse", d.Name, "--yes")
					}
				}
				now := w.settled(d.Name)
				if want := map[bool]string{true: primary, false: host}[kind == "unplanned" || kind == "cancel"]; now != want {
					t.Fatalf("%s: the primary was %s and is %s", point, primary, now)
				}
				t.Logf("%-22s crashed on %s", point, host)
			}
		}
	}
}

// failedOver waits until a VM runs on a host after an unplanned failover in this
// phase; "" = it is committed and its images are plain.
func (w *world) failedOver(host, vm string, phase string) {
	w.t.Helper()
	_, err := w.WaitStatus(w.step(), host, vm, "failed over", func(v status.VM) bool {
		if v.Plan != nil || v.Role != status.Primary || v.State != status.FailedOver {
			return false
		}
		return v.Failover == nil && phase == "" || v.Failover != nil && v.Failover.Phase == phase
	})
	w.must(err)
}

// rested waits until no plan of a VM is open on a host.
func (w *world) rested(host, vm string) status.VM {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), host, vm, "at rest", func(v status.VM) bool {
		return v.Plan == nil && v.State != status.Error && v.State != status.Unprotected
	})
	w.must(err)
	return v
}
