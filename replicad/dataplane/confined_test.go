package dataplane_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

// procStatus is what the kernel says of a process.
func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for l := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(l, ":")
		m[k] = strings.TrimSpace(v)
	}
	return m
}

// whole skips where a data plane cannot be confined, and says why.
func whole(t *testing.T, cfg dataplane.Config) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(cfg.RunDir, "dataplane.log"))
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() != 0 || strings.Contains(string(b), "refuses to take it away") {
		t.Skipf("needs root and a kernel with seccomp and Landlock:\n%s", b)
	}
}

// A data plane runs with less than the keeper, from its start, after a death,
// and as the successor of another; it serves and tracks as ever.
func TestADataPlaneIsConfinedAlsoAfterADeathAndAnUpgrade(t *testing.T) {
	cfg := dt.Config(t, 8*mib)
	c := dt.Ensure(t, &cfg)
	open(t, c, 1)
	whole(t, cfg)
	confined := func(when string) int {
		t.Helper()
		pid := status(t, c).PID
		s := procStatus(t, pid)
		caps, err := strconv.ParseUint(s["CapPrm"], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		const never = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_SYS_MODULE |
			1<<unix.CAP_SYS_RAWIO | 1<<unix.CAP_KILL | 1<<unix.CAP_SETUID | 1<<unix.CAP_SETPCAP | 1<<unix.CAP_MKNOD
		if s["NoNewPrivs"] != "1" || s["Seccomp"] != "2" || caps&never != 0 || s["CapPrm"] != s["CapEff"] || s["CapInh"] != "0000000000000000" {
			t.Errorf("%s: NoNewPrivs %s, Seccomp %s, CapPrm %s, CapEff %s, CapInh %s", when, s["NoNewPrivs"], s["Seccomp"], s["CapPrm"], s["CapEff"], s["CapInh"])
		}
		dt.Boot(t, cfg, 1).Scribble(5)
		return pid
	}
	first := confined("at the start")
	dt.Kill(t, first)
	second := confined("after a death")
	a, err := c.Upgrade(context.Background(), dataplane.UpgradeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got := status(t, c).PID; got != a.PID { // on connections that the predecessor had
		t.Errorf("process %d answers after an upgrade, %d serves", got, a.PID)
	}
	third := confined("after an upgrade")
	if first == second || second == third {
		t.Errorf("not three processes: %d, %d, %d", first, second, third)
	}
}

// It writes nowhere but where it has to. Its directory for shared memory is
// replaced by a link; what the tracker makes there would lie elsewhere. (It goes
// on without, as on a host that has no shared memory.)
func TestADataPlaneWritesNowhereElse(t *testing.T) {
	cfg := dt.Config(t, 8*mib)
	c := dt.Ensure(t, &cfg)
	whole(t, cfg)
	elsewhere := t.TempDir()
	if err := os.Rename(cfg.SharedDir, cfg.SharedDir+".was"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, cfg.SharedDir); err != nil {
		t.Fatal(err)
	}
	open(t, c, 1)
	if left, err := os.ReadDir(elsewhere); err != nil || len(left) > 0 {
		t.Errorf("elsewhere there is %v (%v)", left, err)
	}
	log, err := os.ReadFile(filepath.Join(cfg.RunDir, "dataplane.log"))
	if err != nil || !strings.Contains(string(log), "permission denied") {
		t.Errorf("the attempt is not in the log (%v):\n%s", err, log)
	}
}
