package kvm_test

import (
	"fmt"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// networked starts the default network of both hosts and a guest in it.
func (w *world) networked(name string, n int, knobs string) (guest.Domain, *console.Console) {
	w.t.Helper()
	for _, h := range []string{"A", "B"} {
		w.virsh(h, "net-start", "default")
	}
	d := w.guest(name, n, 2, knobs)
	d.Network, d.MAC = "default", fmt.Sprintf("52:54:00:aa:00:%02x", n)
	return d, w.start(d)
}

// copyOf starts a test copy and returns it with its console.
func (w *world) copyOf(vm string, args ...string) (status.Test, *console.Console) {
	w.t.Helper()
	before := map[string]bool{}
	for _, t := range w.status("B", vm).Tests {
		before[t.ID] = true
	}
	out := w.ctl("B", append([]string{"failover", "test", vm}, args...)...)
	for _, t := range w.status("B", vm).Tests {
		if !before[t.ID] {
			return t, console.Open(w.Lab.Host("B").Path(t.Console))
		}
	}
	w.t.Fatalf("no copy appeared:\n%s", out)
	return status.Test{}, nil
}

// noCopies waits until nothing of any test copy is left on B.
func (w *world) noCopies(vm string) status.VM {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), "B", vm, "without test copies", func(v status.VM) bool { return len(v.Tests) == 0 })
	w.must(err)
	if out := w.virsh("B", "list", "--all", "--name"); strings.Contains(out, "-test") {
		w.t.Fatalf("a copy's domain is left over:\n%s", out)
	}
	if out := w.virsh("B", "net-list", "--all", "--name"); strings.Contains(out, "kvmreplica-test") {
		w.t.Fatalf("a copy's network is left over:\n%s", out)
	}
	out, err := w.Lab.Host("B").Exec(w.step(), "sh", "-c", "ls /var/lib/replicad/tests; ls /run/replicad/vm; ls /sys/class/net")
	w.must(err)
	for _, f := range strings.Fields(out) {
		if f != "ended.json" && f != "lo" && !strings.HasPrefix(f, "virbr") && !strings.HasPrefix(f, "eth") && !strings.HasPrefix(f, "veth") && f != string(v.ID) {
			w.t.Errorf("left over on B: %s", f)
		}
	}
	return v
}

// A test copy of the newest state shows exactly what was committed; while it
// runs the primary goes on and epochs are committed. A second copy of the same
// point, started later, shows exactly the same, beside the first one. Their
// disks survive the daemon; whoever plugs something into a copy's network ends
// it; what was destroyed by hand is taken away.
func TestCopiesOfAnOlderPointShowExactlyItWhileReplicationGoesOn(t *testing.T) {
	w := up(t, estate.Options{})
	d, c := w.networked("tried", 41, "lab.net=1")
	w.protect(d, "1s")
	w.virsh("A", "suspend", d.Name) // what was written last is known now
	first := c.Synced()
	e := w.status("A", d.Name).Epoch
	_, err := w.WaitStatus(w.step(), "A", d.Name, "wholly copied", func(v status.VM) bool { return v.Pending == 0 && v.Epoch > e })
	w.must(err)
	one, c1 := w.copyOf(d.Name)
	w.virsh("A", "resume", d.Name)
	high := w.booted(c1, first)
	if high > first+50 {
		t.Errorf("the copy shows record %d, %d was the last one known", high, first)
	}
	if !one.Isolated || one.Proven.IsZero() || one.UUID == d.UUID || one.Networks[0].MAC == d.MAC {
		t.Errorf("the copy is not apart: %+v", one)
	}
	_, err = c.WaitSynced(w.step(), high+100)
	w.must(err)
	e = w.status("B", d.Name).Epoch
	_, err = w.WaitStatus(w.step(), "B", d.Name, "three epochs further", func(v status.VM) bool { return v.Epoch >= e+3 && len(v.Tests) == 1 })
	w.must(err)

	two, c2 := w.copyOf(d.Name, "--point", fmt.Sprint(one.Ordinal))
	_, err = w.WaitStatus(w.step(), "A", d.Name, "aware of both copies", func(v status.VM) bool { return v.TestsThere == 2 })
	w.must(err)
	if again := w.booted(c2, first); again != high {
		t.Errorf("the second copy of point %d shows record %d, the first one %d", one.Ordinal, again, high)
	}
	if two.Point != one.Point || two.Name == one.Name {
		t.Errorf("the second copy: %+v", two)
	}
	w.virshOK("B", "domiflist", two.Name, one.Networks[0].Network, false)

	// The daemon dies: the copies wait, and go on with what they wrote.
	w.must(w.Daemon("B").Kill())
	w.must(w.StartDaemon(w.step(), "B"))
	for _, cc := range []*console.Console{c1, c2} {
		_, err = cc.WaitSynced(w.step(), cc.Synced()+20)
		w.must(err)
	}

	// Somebody plugs a cable into the first copy's bridge.
	bridge := one.Networks[0].Bridge
	_, err = w.Lab.Host("B").Exec(w.step(), "sh", "-c", "ip link add leak0 type veth peer name leak1 && ip link set leak0 master "+bridge)
	w.must(err)
	v, err := w.WaitStatus(w.step(), "B", d.Name, "rid of the copy that leaks", func(v status.VM) bool { return len(v.Tests) == 1 && v.Tests[0].ID == two.ID })
	w.must(err)
	if v.LastTest == nil || !strings.Contains(v.LastTest.Reason, "leak0") {
		t.Errorf("it is not said why the copy ended: %+v", v.LastTest)
	}
	_, err = w.Lab.Host("B").Exec(w.step(), "ip", "link", "del", "leak0")
	w.must(err)

	// The second is destroyed and undefined by hand.
	w.virsh("B", "destroy", two.Name)
	w.virsh("B", "undefine", two.Name)
	w.noCopies(d.Name)
	w.ctl("B", "failover", "test-stop", d.Name) // nothing to do is no error
	w.ctl("B", "failover", "test-stop", d.Name, "--all")
	w.replicating("A", d.Name)
	w.noErrors("A", d, false)
}

// virshOK expects, or does not, a word in what virsh prints.
func (w *world) virshOK(host, verb, name, word string, want bool) {
	w.t.Helper()
	if out := w.virsh(host, verb, name); strings.Contains(out, word) != want {
		w.t.Errorf("virsh %s %s: %q is there: %t\n%s", verb, name, word, !want, out)
	}
}
