package kvm_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/labtest"
	"kvmreplica/replicad/status"
)

// Every step of a planned failover is crashed before and after its act, on the
// host that runs it. Whatever happens, afterwards exactly one host is the
// primary, nothing is left to be done by hand, and replication runs.
func TestACrashAtEveryStepOfAPlannedFailoverSettlesByItself(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.offGuest("steps", 7)
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.settled(d.Name)
	type plan struct {
		kind  string
		local bool // it runs on the primary
		steps []string
	}
	for _, p := range []plan{
		{"planned", true, []string{"shutdown", "demote", "final", "seal", "demoted", "promote", "follow"}},
		{"promote", false, []string{"apply", "generation", "store", "tracker", "define", "firmware", "start", "reverse"}},
	} {
		for _, step := range p.steps {
			for _, when := range []string{"begun", "acted"} {
				point := fmt.Sprintf("%s/%s/%s", p.kind, step, when)
				primary := w.settled(d.Name)
				victim := primary
				if !p.local {
					victim = other(primary)
				}
				w.crashAt(victim, point, func(ctx context.Context) {
					// what the command says depends on where it was cut
					_, _ = w.Ctl(ctx, primary, "failover", "planned", d.Name, "--yes")
				})
				now := w.settled(d.Name)
				t.Logf("%-26s crashed on %s: primary was %s, is %s", point, victim, primary, now)
			}
		}
	}
}

// The same for enabling and disabling a VM.
func TestACrashAtEveryStepOfEnablingAndDisablingSettlesByItself(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.offGuest("steps", 8)
	before := w.virsh("A", "dumpxml", "--inactive", d.Name)
	for _, step := range []string{"offer", "plane", "define", "place"} {
		for _, when := range []string{"begun", "acted"} {
			w.crashAt("A", "enable/"+step+"/"+when, func(ctx context.Context) {
				_, _ = w.Ctl(ctx, "A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
			})
			w.unprotected(d.Name, before)
		}
	}
	for _, step := range []string{"withdraw", "out", "define", "plane", "forget"} {
		for _, when := range []string{"begun", "acted"} {
			w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
			w.settled(d.Name)
			w.crashAt("A", "disable/"+step+"/"+when, func(ctx context.Context) {
				_, _ = w.Ctl(ctx, "A", "vm", "disable", d.Name, "--delete-replica", "--yes")
			})
			w.unprotected(d.Name, before)
		}
	}
}

func other(host string) string {
	if host == "A" {
		return "B"
	}
	return "A"
}

// offGuest defines a guest that is never started.
func (w *world) offGuest(name string, n int) guest.Domain {
	w.t.Helper()
	d := w.guest(name, n, 2, "")
	for _, k := range d.Disks {
		w.must(os.WriteFile(w.Lab.Host("A").Path(k.File), pattern(8<<20), 0o644))
	}
	w.must(w.Define(w.step(), "A", d))
	return d
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i>>12) ^ byte(i)
	}
	return b
}

// crashAt restarts a host's daemon with a crash armed, runs act, expects the
// crash, and starts the daemon again.
func (w *world) crashAt(host, point string, act func(context.Context)) {
	w.t.Helper()
	w.crashWhen(func() { w.ready(host) }, host, point, act)
}

// crashWhen does so where up waits until the restarted host's VMs are up.
func (w *world) crashWhen(up func(), host, point string, act func(context.Context)) {
	w.t.Helper()
	w.must(w.Daemon(host).Kill())
	w.must(w.StartDaemon(w.step(), host, "REPLICAD_CRASH_AT="+point))
	up()
	armed := w.Daemon(host)
	ctx, cancel := context.WithTimeout(w.t.Context(), labtest.StepTimeout)
	done := make(chan struct{})
	go func() { defer close(done); act(ctx) }()
	defer func() { cancel(); <-done }()
	select {
	case <-armed.Done():
	case <-ctx.Done():
		w.t.Fatalf("%s on %s was never reached", point, host)
	}
	w.must(w.StartDaemon(w.step(), host))
	<-done
}

// ready waits until every VM of a host is up after a restart.
func (w *world) ready(host string) {
	w.t.Helper()
	out := w.ctl(host, "--json", "vm", "list")
	for _, v := range decode[[]status.VM](w.t, out) {
		_, err := w.WaitStatus(w.step(), host, v.Name, "up", func(v status.VM) bool {
			return v.State == status.Replicating && v.Health == "normal"
		})
		w.must(err)
	}
}

// settled waits until exactly one host is the primary, the other the replica,
// no plan is open and replication runs; it returns the primary.
func (w *world) settled(vm string) string {
	w.t.Helper()
	var primary string
	_, err := w.WaitStatus(w.step(), "A", vm, "settled", func(a status.VM) bool {
		b, err := w.Status(w.step(), "B", vm)
		if err != nil || a.Plan != nil || b.Plan != nil || a.Role == b.Role {
			return false
		}
		primary = "A"
		p := a
		if b.Role == status.Primary {
			primary, p = "B", b
		}
		return p.State == status.Replicating && a.Health == "normal" && b.Health == "normal" && !p.LastCommit.IsZero()
	})
	if err != nil {
		b, berr := w.Status(w.step(), "B", vm)
		w.t.Fatalf("%v\nB: %+v %v", err, b, berr)
	}
	return primary
}

// unprotected waits until no trace of protection is left.
func (w *world) unprotected(vm, definition string) {
	w.t.Helper()
	for _, h := range []string{"A", "B"} {
		deadline := time.Now().Add(labtest.StepTimeout)
		for {
			out := w.ctl(h, "--json", "vm", "list")
			vms := decode[[]status.VM](w.t, out)
			if len(vms) == 0 {
				break
			}
			if vms[0].State == status.Orphan { // a copy that held something is its host's to delete
				w.ctl(h, "vm", "disable", vm, "--delete-replica", "--yes")
				continue
			}
			if time.Now().After(deadline) {
				w.t.Fatalf("host %s still lists %s", h, out)
			}
		}
	}
	if now := w.virsh("A", "dumpxml", "--inactive", vm); now != definition {
		w.t.Fatalf("the definition is not as it was:\n--- before\n%s\n--- now\n%s", definition, now)
	}
	if out := w.virsh("B", "list", "--all", "--name"); len(out) > 1 {
		w.t.Fatalf("a domain is left over on B: %q", out)
	}
	left, err := filepath.Glob(filepath.Join(w.Lab.Host("B").Path("/var/lib/libvirt/replicas"), "*", "*"))
	w.must(err)
	if len(left) > 0 {
		w.t.Fatalf("images are left over on B: %v", left)
	}
}
