package kvm_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
)

// The groups that the configuration names, and a user in none of them.
const (
	opsGroup, monGroup = 64001, 64002
	plainUser          = 64123
)

// ctlAs runs replicactl on host A as another user with one group.
func (w *world) ctlAs(group int, args ...string) (string, int) {
	w.t.Helper()
	who := []string{"--reuid", fmt.Sprint(plainUser), "--regid", fmt.Sprint(group), "--clear-groups", "/run/replicactl"}
	out, err := w.Lab.Host("A").Command(w.step(), "setpriv", append(who, args...)...).CombinedOutput()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return string(out), ee.ExitCode()
	}
	w.must(err)
	return string(out), 0
}

// People without root use replicactl by the groups that the configuration names,
// each for what the role is for; the log says who it was, and a reload takes it
// away.
func TestPeopleWithoutRootMayDoWhatTheirGroupIsFor(t *testing.T) {
	w := up(t, estate.Options{Config: fmt.Sprintf("[access]\noperators = [\"%d\"]\nmonitors = [\"%d\"]\n", opsGroup, monGroup)})
	bin, err := estate.Binaries(w.step())
	w.must(err)
	program, err := os.ReadFile(filepath.Join(bin, "replicactl"))
	w.must(err)
	w.must(w.Lab.Host("A").PutFile("/run/replicactl", program, 0o755))
	d := w.smallGuest("shared", 44, 4<<20)
	w.must(w.Define(w.step(), "A", d))
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.replicating("A", d.Name)

	const denied = 6
	for _, c := range []struct {
		group int
		args  string
		code  int
		says  string
	}{
		{plainUser, "vm list", denied, "only root may control the daemon, and members"},
		{monGroup, "vm list", 0, d.Name},
		{monGroup, "failover log shared", 0, "vm-enable"},
		{monGroup, "vm pause shared", denied, "takes the role operator, the caller is monitor"},
		{opsGroup, "vm pause shared", 0, ""},
		{opsGroup, "vm resume shared", 0, ""},
		{opsGroup, "vm disable shared --yes", denied, "takes the role admin, the caller is operator"},
		{opsGroup, "peer invite", denied, "takes the role admin"},
		{opsGroup, "point export shared --to /tmp", denied, "takes the role admin"},
		{opsGroup, "failover log shared", 0, fmt.Sprintf("uid %d", plainUser)},
	} {
		out, code := w.ctlAs(c.group, strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(out, c.says) {
			t.Errorf("group %d, %s: exit %d\n%s", c.group, c.args, code, out)
		}
	}
	w.replicating("A", d.Name)

	conf := w.Lab.Host("A").Path("/etc/replicad/replicad.toml")
	text, err := os.ReadFile(conf)
	w.must(err)
	before, rest, _ := strings.Cut(string(text), "[access]")
	_, rest, _ = strings.Cut(rest, "[limits]")
	w.must(os.WriteFile(conf, []byte(before+"[limits]"+rest), 0o600))
	w.ctl("A", "reload")
	if out, code := w.ctlAs(opsGroup, "vm", "list"); code != 5 || !strings.Contains(out, "permission denied") {
		t.Errorf("after the reload: exit %d\n%s", code, out)
	}
}
