// Package labtest gives tests a lab with the guest's files in it.
//
// It skips the test, with the reason, where a lab cannot be made, takes the lab
// down at the test's end, and shows the hosts' logs of a test that failed.
package labtest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
)

// StepTimeout bounds one wait of a test. A guest needs some 5 seconds to boot
// alone on an idle machine; on a busy one several times that.
const StepTimeout = 4 * time.Minute

// Require skips the test when the machine lacks something for a lab.
func Require(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("-short: labs take too long")
	}
	if m := lab.Missing(); len(m) > 0 {
		t.Skipf("needs %s", strings.Join(m, ", "))
	}
}

// Up makes a lab for the test.
func Up(t testing.TB, opts lab.Options) (*lab.Lab, guest.Files) {
	t.Helper()
	Require(t)
	files, err := guest.Build(t.Context())
	if err != nil {
		t.Fatalf("build the guest: %v", err)
	}
	opts.Boot = append(opts.Boot, files.List()...)
	// Not t.TempDir: labs want short paths and folders open to libvirt-qemu.
	dir, err := os.MkdirTemp("", "lab-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := lab.Up(t.Context(), dir, opts)
	if err != nil {
		t.Fatalf("make a lab: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			showLogs(t, l)
		}
		if err := l.Down(); err != nil {
			t.Errorf("take the lab down: %v", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return l, files
}

// Step returns a context for one wait of a test.
func Step(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), StepTimeout)
	t.Cleanup(cancel)
	return ctx
}

// Console follows the guest's console from the file's beginning.
func Console(h *lab.Host, d guest.Domain) *console.Console {
	return console.Open(h.Path(d.ConsoleFile()))
}

// Define defines the guest on the host.
func Define(t testing.TB, h *lab.Host, d guest.Domain) {
	t.Helper()
	text, err := d.XML()
	if err != nil {
		t.Fatal(err)
	}
	const file = "/etc/libvirt/lab-domain.xml"
	if err := h.PutFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	Virsh(t, h, "define", file)
}

// Start defines and starts the guest.
func Start(t testing.TB, h *lab.Host, d guest.Domain) *console.Console {
	t.Helper()
	Define(t, h, d)
	c, err := console.OpenAtEnd(h.Path(d.ConsoleFile()))
	if err != nil {
		t.Fatal(err)
	}
	Virsh(t, h, "start", d.Name)
	return c
}

// Virsh runs virsh in the host and fails the test when it fails.
func Virsh(t testing.TB, h *lab.Host, args ...string) string {
	t.Helper()
	out, err := h.Virsh(Step(t), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// WaitVirsh repeats a virsh command until its output is want.
func WaitVirsh(t testing.TB, h *lab.Host, want string, args ...string) {
	t.Helper()
	ctx := Step(t)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := h.Virsh(ctx, args...)
		if err == nil && out == want {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("virsh %v on host %s: last answer %q (%v), want %q", args, h.Name(), out, err, want)
		case <-tick.C:
		}
	}
}

// showLogs prints the end of every log of the lab.
func showLogs(t testing.TB, l *lab.Lab) {
	for _, h := range l.Hosts() {
		for _, pattern := range []string{"log/*.log", "log-libvirt/libvirtd.log", "log-libvirt/qemu/*"} {
			files, err := filepath.Glob(filepath.Join(l.Dir(), h.Name(), pattern))
			if err != nil {
				t.Log(err)
			}
			for _, f := range files {
				text, err := os.ReadFile(f)
				if err != nil || len(text) == 0 {
					continue
				}
				t.Logf("--- host %s, %s:\n%s", h.Name(), filepath.Base(f), text[max(0, len(text)-6000):])
			}
		}
	}
}
