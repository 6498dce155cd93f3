package kvm_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// errorCase is one thing that goes wrong: what is done, how replicactl ends,
// and what it must say, cause and next command. docs/operations/errors.md has
// a row for every id; TestEveryErrorIsInTheHandbook compares them.
type errorCase struct {
	id    string
	host  string // where the command is typed; A when empty
	args  []string
	code  int
	words []string
	setup func(w *errorWorld) (undo func())
}

// errorWorld is an estate with two VMs that are off: "free" is not protected,
// "kept" is.
type errorWorld struct {
	*world
	free, kept guest.Domain
}

// Names of the two VMs.
const (
	freeVM = "free"
	keptVM = "kept"
)

// Directories of the hosts that these tests make small and fill.
const (
	stateDir    = "/var/lib/replicad"
	replicaRoot = "/var/lib/libvirt/replicas"
)

// errorUUID numbers the guests of these tests.
func errorUUID(n int) string { return fmt.Sprintf("e4404000-0000-4000-8000-%012d", n) }

// smallGuest describes a guest that is only ever off, or paused at its first
// instruction, with one small image on host A.
func (w *world) smallGuest(name string, n int, bytes int) guest.Domain {
	w.t.Helper()
	p := "/var/lib/libvirt/images/" + name + ".raw"
	w.must(os.MkdirAll(filepath.Dir(w.Lab.Host("A").Path(p)), 0o755))
	w.must(os.WriteFile(w.Lab.Host("A").Path(p), pattern(bytes), 0o644))
	return guest.Domain{Name: name, UUID: errorUUID(n), Files: w.Files, Disks: []guest.Disk{{File: p}}}
}

func upErrors(t *testing.T) *errorWorld {
	t.Helper()
	w := &errorWorld{world: up(t, estate.Options{})}
	w.free, w.kept = w.smallGuest(freeVM, 1, 4<<20), w.smallGuest(keptVM, 2, 4<<20)
	w.small("A", stateDir, "16m")
	w.small("B", replicaRoot, "32m")
	w.must(w.Define(w.step(), "A", w.free))
	w.must(w.Define(w.step(), "A", w.kept))
	w.ctl("A", "vm", "enable", keptVM, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.replicating("A", keptVM)
	return w
}

// footprint is everything an attempt could have left behind.
func (w *errorWorld) footprint() string {
	w.t.Helper()
	var b strings.Builder
	for _, h := range []string{"A", "B"} {
		out, err := w.Lab.Host(h).Exec(w.step(), "sh", "-c",
			"ls /var/lib/replicad/vms /var/lib/libvirt/replicas /run/replicad/vm /run/replicad/hook 2>&1; ls /var/lib/replicad/vms/*/plan.json 2>/dev/null; true")
		w.must(err)
		fmt.Fprintf(&b, "host %s:\n%s%s\n", h, out, w.virsh(h, "list", "--all", "--name"))
	}
	b.WriteString(w.virsh("A", "dumpxml", "--inactive", freeVM))
	b.WriteString(w.virsh("A", "dumpxml", "--inactive", keptVM))
	return b.String()
}

// run plays one case and proves that nothing is half done afterwards.
func (w *errorWorld) run(t *testing.T, c errorCase) {
	t.Helper()
	was := w.t
	w.t = t
	defer func() { w.t = was }()
	if c.host == "" {
		c.host = "A"
	}
	before := w.footprint()
	undo := func() {}
	if c.setup != nil {
		undo = c.setup(w)
	}
	out, err := w.Ctl(w.step(), c.host, c.args...)
	undo()
	code := 0
	var ce *estate.CtlError
	if asCtl(err, &ce) {
		code = ce.Code
	} else if err != nil {
		t.Fatal(err)
	}
	if code != c.code {
		t.Errorf("exit %d, want %d", code, c.code)
	}
	last := tail(out)
	for _, word := range c.words {
		if !strings.Contains(last, word) {
			t.Errorf("%q is missing in the message", word)
		}
	}
	if after := w.footprint(); after != before {
		t.Errorf("something is left behind\n--- before\n%s\n--- after\n%s", before, after)
	}
	t.Logf("replicactl %s on %s: exit %d\n%s", strings.Join(c.args, " "), c.host, code, last)
	if t.Failed() {
		t.Logf("whole output:\n%s", out)
	}
}

// tail is the message of a command that failed: from "replicactl:" on.
func tail(out string) string {
	if i := strings.LastIndex(out, "replicactl: "); i >= 0 {
		return out[i:]
	}
	return out
}

func enable(name string, more ...string) []string {
	return append([]string{"vm", "enable", name, "--to", estate.Peer("B"), "--every", "1s", "--yes"}, more...)
}

// Whatever a person asks for that cannot be done gives its own message, which
// names the cause and the next command, and leaves nothing half done.
func TestEachMistakeGivesItsOwnErrorAndLeavesNothingBehind(t *testing.T) {
	w := upErrors(t)
	for _, c := range slices.Concat(enableErrors(), operateErrors(), pointErrors(), setErrors()) {
		t.Run(c.id, func(t *testing.T) { w.run(t, c) })
	}
	w.replicating("A", keptVM)
}

// condition waits until a host shows a VM's condition.
func (w *world) condition(host, vm, code string, words ...string) status.VM {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), host, vm, "in condition "+code, func(v status.VM) bool {
		_, ok := findCondition(v, code, words)
		return ok
	})
	if err != nil {
		w.t.Fatalf("%v\nconditions: %+v", err, v.Conditions)
	}
	text, _ := findCondition(v, code, words)
	w.t.Logf("on %s: %s", host, text)
	return v
}

func findCondition(v status.VM, code string, words []string) (string, bool) {
	for _, c := range v.Conditions {
		text := fmt.Sprintf("[%s] %s: %s -> %s", c.Severity, c.Code, c.Text, c.Remedy)
		all := c.Code == code && c.Remedy != ""
		for _, word := range words {
			all = all && strings.Contains(text, word)
		}
		if all {
			return text, true
		}
	}
	return "", false
}
