package upgrade_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"kvmreplica/replicad/dataplane"
)

// servers are the NBD servers a protected disk may be on, and how each is
// started on an image. qemu-nbd serves one client at a time, as it does unless
// told otherwise.
var servers = map[string]func(conf, socket, image string) []string{
	"qemu-nbd": func(_, socket, image string) []string {
		return []string{"-t", "-k", socket, "-f", "raw", "-x", "disk", image}
	},
	"nbdkit": func(_, socket, image string) []string {
		return []string{"-f", "-e", "disk", "-U", socket, "file", image}
	},
	"nbd-server": func(conf, _, _ string) []string { return []string{"-d", "-C", conf} },
}

// serve puts a disk's image below another NBD server, a real process.
func serve(t *testing.T, program string, d dataplane.DiskConfig) dataplane.DiskConfig {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("needs %s: %v", program, err)
	}
	socket, conf := d.Path+".sock", d.Path+".conf"
	text := fmt.Sprintf("[generic]\nunixsock = %s\n[disk]\nexportname = %s\nflush = true\nfua = true\ntrim = true\n", socket, d.Path)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(d.Path + ".log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, servers[program](conf, socket, d.Path)...)
	cmd.Dir = filepath.Dir(d.Path)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // nbd-server has a process per connection
		_ = cmd.Wait()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("%s:\n%s", program, b[max(0, len(b)-2000):])
		}
	})
	w := &world{t: t}
	w.until(program+" listens", func() bool {
		b, err := os.ReadFile("/proc/net/unix")
		return err == nil && strings.Contains(string(b), socket)
	})
	return dataplane.DiskConfig{Name: d.Name, Kind: dataplane.NBD, URI: "nbd+unix:///disk?socket=" + socket}
}

// The disks of the VM are on other NBD servers: the connections to them are
// handed on like the guest's. A second one beside the first would wait at
// qemu-nbd for ever; one that was lost would have everything marked.
func TestUpgradesOverAnotherNBDServerKeepItsConnections(t *testing.T) {
	for program := range servers {
		t.Run(program, func(t *testing.T) { newWorld(t, program).upgrade(upgrades(3)) })
	}
}

// Whoever dies while the connections to the other server pass from process to
// process, one data plane serves afterwards and nothing is missing.
func TestADeathInAnUpgradeOverAnotherNBDServer(t *testing.T) {
	for _, p := range points {
		if strings.HasSuffix(p.at, "/keeper") {
			continue // touches no connection
		}
		t.Run(strings.ReplaceAll(p.at, "/", "-"), func(t *testing.T) {
			t.Setenv("REPLICAD_CRASH_AT", p.at)
			newWorld(t, "qemu-nbd").survives(p.reconnects)
		})
	}
}
