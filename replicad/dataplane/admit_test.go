package dataplane_test

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"kvmreplica/nbd"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

// standIn dials an export and says on its output what came of it: a process
// with a command line of its own.
func standIn() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := nbd.Dial(ctx, "unix", os.Getenv("STAND_IN"), nbd.ClientOptions{Export: "vda"})
	if err == nil {
		_, err = c.WriteAt(make([]byte, 512), 0)
		_ = c.Close()
	}
	if err != nil {
		os.Stdout.WriteString(err.Error())
	}
}

func TestOnlyTheDomainsOwnQEMUMayWrite(t *testing.T) {
	cfg := dt.Config(t, 16*mib)
	cfg.AnyClient = false
	c := dt.Ensure(t, &cfg)
	open(t, c, 1)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dial := func(args ...string) string {
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Args = append([]string{"qemu-system-x86_64"}, args...)
		cmd.Env = append(os.Environ(), "STAND_IN="+cfg.NBDSocket())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	for what, args := range map[string][]string{
		"no uuid": nil, "another's": {"-uuid", "99999999-2222-3333-4444-555555555555"}, "cut off": {"-uuid"},
		"as a value": {"-name", string(cfg.VM)},
	} {
		if out := dial(args...); !strings.Contains(out, "not the QEMU") {
			t.Errorf("%s: %q", what, out)
		}
	}
	if _, err := nbd.Dial(t.Context(), "unix", cfg.NBDSocket(), nbd.ClientOptions{Export: "vda"}); err == nil || !strings.Contains(err.Error(), "not the QEMU") {
		t.Errorf("this process: %v", err)
	}
	if out := dial("-name", "guest", "-uuid", string(cfg.VM), "-m", "1"); out != "" {
		t.Errorf("its own: %q", out)
	}
}
