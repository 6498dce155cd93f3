package packaging_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/replicad/config"
)

// install runs install.sh into a directory, with stand-ins for the programs.
func install(t *testing.T, dest, prefix string) string {
	t.Helper()
	bin := t.TempDir()
	for _, p := range []string{"replicad", "replicactl", "replicafsck"} {
		if err := os.WriteFile(filepath.Join(bin, p), []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("./install.sh", bin)
	cmd.Env = append(os.Environ(), "DESTDIR="+dest, "PREFIX="+prefix)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("install.sh: %v\n%s", err, out)
	}
	return string(out)
}

func TestInstallPutsEverythingInItsPlace(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	install(t, dest, "/usr")
	want := map[string]fs.FileMode{
		"/usr/sbin/replicad": 0o755, "/usr/sbin/replicactl": 0o755, "/usr/sbin/replicafsck": 0o755,
		"/usr/lib/systemd/system/replicad.service": 0o644, "/usr/share/kvmreplica/replicad.toml": 0o644,
		"/etc/libvirt/hooks/qemu.d/kvmreplica": 0o755, "/etc/replicad/replicad.toml": 0o600,
	}
	err := filepath.WalkDir(dest, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name := strings.TrimPrefix(p, dest)
		mode, ok := want[name]
		if st, err := d.Info(); err != nil || !ok || st.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, want %v (known %v, %v)", name, st.Mode().Perm(), mode, ok, err)
		}
		delete(want, name)
		return nil
	})
	if err != nil || len(want) > 0 {
		t.Errorf("not installed: %v (%v)", want, err)
	}
	if _, err := config.Load(filepath.Join(dest, "etc/replicad/replicad.toml")); err != nil {
		t.Errorf("the installed configuration: %v", err)
	}
}

func TestInstallingAgainKeepsTheConfiguration(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	install(t, dest, "/usr/local")
	file := filepath.Join(dest, "etc/replicad/replicad.toml")
	if err := os.WriteFile(file, []byte("receiving = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := install(t, dest, "/usr/local"); !strings.Contains(out, "kept as it is") {
		t.Errorf("nothing is said of the kept configuration:\n%s", out)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "receiving = true\n" {
		t.Errorf("the configuration was overwritten: %q, %v", b, err)
	}
}

func TestInstallRefusesWithoutPrograms(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("./install.sh", t.TempDir())
	cmd.Env = append(os.Environ(), "DESTDIR="+t.TempDir())
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "make build") {
		t.Errorf("%v: %s", err, out)
	}
}

// What guests' disks depend on must not get lost in an edit.
func TestTheUnitLeavesDataPlanesAlone(t *testing.T) {
	t.Parallel()
	dest := t.TempDir()
	install(t, dest, "/usr/local")
	b, err := os.ReadFile(filepath.Join(dest, "usr/local/lib/systemd/system/replicad.service"))
	if err != nil {
		t.Fatal(err)
	}
	lines := "\n" + string(b)
	for _, want := range []string{
		"KillMode=process", "RuntimeDirectoryPreserve=yes", "RuntimeDirectoryMode=0711", "Type=notify",
		"ExecStartPre=/usr/local/sbin/replicad --check", "ExecReload=/usr/local/sbin/replicactl reload", "Before=libvirt-guests.service",
	} {
		if !strings.Contains(lines, "\n"+want+"\n") {
			t.Errorf("the unit lacks %q", want)
		}
	}
	for _, never := range []string{"ProtectClock=", "PrivateDevices=", "DeviceAllow=", "PrivateTmp=", "ProtectHome=", "@"} {
		if strings.Contains(lines, "\n"+never) {
			t.Errorf("the unit has %s, which takes images or devices away", never)
		}
	}
}

func TestSystemdAcceptsTheUnit(t *testing.T) {
	t.Parallel()
	tool, err := exec.LookPath("systemd-analyze")
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("needs systemd-analyze (package systemd)")
	}
	dest := t.TempDir()
	install(t, dest, dest) // the prefix is where the programs really are
	src := filepath.Join(dest, dest, "lib/systemd/system/replicad.service")
	unit := filepath.Join(t.TempDir(), "replicad.service")
	b, err := os.ReadFile(src)
	if err == nil {
		b = []byte(strings.ReplaceAll(string(b), "="+dest+"/", "="+dest+dest+"/"))
		err = os.WriteFile(unit, b, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool, "verify", "--man=no", unit).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "replicad.service") {
			t.Errorf("systemd-analyze: %s", line)
		}
	}
	if err != nil {
		t.Logf("systemd-analyze verify: %v\n%s", err, out)
	}
}
