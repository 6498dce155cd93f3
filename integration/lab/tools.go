package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

const libvirtdPath = "/usr/sbin/libvirtd"

// Missing names what the machine lacks for a lab, most important first; empty
// when a lab can be made.
func Missing() []string {
	var m []string
	if os.Geteuid() != 0 {
		m = append(m, "root")
	}
	for _, tool := range []string{libvirtdPath, "virsh", "qemu-system-x86_64", "dnsmasq", "iptables"} {
		if _, err := exec.LookPath(tool); err != nil {
			m = append(m, tool)
		}
	}
	return m
}

// RepoRoot is the directory of this module's go.mod, searched upwards from the
// working directory and then from the running program.
func RepoRoot() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	for _, from := range []string{wd, filepath.Dir(exe)} {
		for d := from; ; d = filepath.Dir(d) {
			if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
				return d, nil
			}
			if d == "/" {
				break
			}
		}
	}
	return "", errors.New("lab: not inside a checkout: no go.mod above " + wd)
}

// CacheDir is where the lab keeps what is expensive to make; git ignores it.
func CacheDir() (string, error) {
	root, err := RepoRoot()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, ".cache", "lab")
	return dir, os.MkdirAll(dir, 0o755)
}

// findHelper returns the kvmlab command: the one given, the running program if
// it is kvmlab, or one built into the lab's directory.
func (l *Lab) findHelper(ctx context.Context) (string, error) {
	if l.opts.Helper != "" {
		return l.opts.Helper, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	if filepath.Base(exe) == "kvmlab" {
		return exe, nil
	}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return "", err
	}
	out := filepath.Join(l.dir, "kvmlab")
	return out, Build(ctx, out, "./integration/lab/cmd/kvmlab")
}

// Build compiles a command of this module, statically, to out.
func Build(ctx context.Context, out, pkg string) error {
	root, err := RepoRoot()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", out, pkg)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", pkg, err, text)
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(err, out.Close())
	}
	return out.Close()
}
