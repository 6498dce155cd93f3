package kvm_test

import (
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// The primary is gone. The fencing command is run first, with the VM's name; one
// that fails ends the failover before anything happened, unless a person insists.
// A trial that nobody ends ends by itself as was asked: cancelled, or committed.
func TestAFailoverIsFencedAndEndsByItselfAsAsked(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.offGuest("fenced", 14)
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.settled(d.Name)
	b := w.Lab.Host("B")
	w.must(b.PutFile("/etc/replicad/fence", []byte("#!/bin/sh\necho \"$@\" >> /etc/replicad/fenced\ntest -e /etc/replicad/reachable\n"), 0o755))
	w.fenceWith("/etc/replicad/fence")
	w.must(w.Daemon("A").Stop(w.step()))
	unplanned := []string{"failover", "unplanned", d.Name, "--force", "--no-start", "--yes"}
	if out := w.refused("B", 6, unplanned...); !strings.Contains(out, "--unfenced") {
		t.Errorf("the refusal does not name the way on:\n%s", out)
	}
	if v := w.rested("B", d.Name); v.Role != status.Replica {
		t.Fatalf("after a fence that failed B is %s", v.Role)
	}
	w.must(b.PutFile("/etc/replicad/reachable", nil, 0o600))
	w.ctl("B", append(unplanned, "--cancel-within", "2s")...)
	_, err := w.WaitStatus(w.step(), "B", d.Name, "cancelled", func(v status.VM) bool { return v.Role == status.Replica && v.Plan == nil })
	w.must(err)
	begun := time.Now()
	w.ctl("B", append(unplanned, "--commit-within", "2s")...)
	w.failedOver("B", d.Name, "")
	t.Logf("committed by itself after %v", time.Since(begun).Round(100*time.Millisecond))
	out, err := b.Exec(w.step(), "cat", "/etc/replicad/fenced")
	w.must(err)
	if n := strings.Count(string(out), d.Name+" "+d.UUID+" "); n != 3 {
		t.Errorf("fenced %d times:\n%s", n, out)
	}
	w.must(w.StartDaemon(w.step(), "A"))
	w.ctl("B", "failover", "reverse", d.Name, "--yes")
	if p := w.settled(d.Name); p != "B" {
		t.Fatalf("the primary is %s", p)
	}
}

// fenceWith configures B's fencing command.
func (w *world) fenceWith(program string) {
	w.t.Helper()
	w.reconfigure("B", "[domain]\n", "[domain]\nfence = \""+program+"\"\n")
}
