package kvm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/labtest"
	"kvmreplica/replicad/status"
)

// world is an estate with the shorthands of a test.
type world struct {
	*estate.Estate
	t *testing.T
}

func up(t *testing.T, o estate.Options) *world {
	t.Helper()
	labtest.Require(t)
	dir, err := os.MkdirTemp("", "kvm-")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	e, err := estate.Up(ctx, dir, o)
	if err != nil {
		t.Fatalf("make an estate: %v", err)
	}
	w := &world{Estate: e, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			w.logs()
		}
		if err := e.Down(); err != nil {
			t.Errorf("take the estate down: %v", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return w
}

// logs shows the ends of all logs of a failed test.
func (w *world) logs() {
	for _, h := range w.Lab.Hosts() {
		for _, pattern := range []string{"log/replicad.log", "log-libvirt/libvirtd.log", "log-libvirt/qemu/*"} {
			files, _ := filepath.Glob(filepath.Join(w.Lab.Dir(), h.Name(), pattern))
			for _, f := range files {
				if b, err := os.ReadFile(f); err == nil && len(b) > 0 {
					w.t.Logf("--- host %s, %s:\n%s", h.Name(), filepath.Base(f), b[max(0, len(b)-5000):])
				}
			}
		}
	}
}

func (w *world) step() context.Context {
	ctx, cancel := context.WithTimeout(w.t.Context(), labtest.StepTimeout)
	w.t.Cleanup(cancel)
	return ctx
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// ctl runs replicactl and fails the test when it fails.
func (w *world) ctl(host string, args ...string) string {
	w.t.Helper()
	out, err := w.Ctl(w.step(), host, args...)
	w.must(err)
	return out
}

// refused runs replicactl, expects the exit code, and returns the output.
func (w *world) refused(host string, code int, args ...string) string {
	w.t.Helper()
	out, err := w.Ctl(w.step(), host, args...)
	var ce *estate.CtlError
	if !asCtl(err, &ce) || ce.Code != code {
		w.t.Fatalf("replicactl %v on %s: want exit %d, got %v\n%s", args, host, code, err, out)
	}
	return out
}

func asCtl(err error, into **estate.CtlError) bool {
	e, ok := err.(*estate.CtlError)
	*into = e
	return ok
}

func (w *world) virsh(host string, args ...string) string {
	w.t.Helper()
	return labtest.Virsh(w.t, w.Lab.Host(host), args...)
}

// guest describes a guest with blank disks on host A.
func (w *world) guest(name string, n int, disks int, knobs string) guest.Domain {
	w.t.Helper()
	d := guest.Domain{
		Name: name, UUID: fmt.Sprintf("5eed0000-0000-4000-8000-%012d", n), Files: w.Files,
		Knobs: "lab.interval=20 " + knobs, Agent: true,
	}
	for i := range disks {
		p := fmt.Sprintf("/var/lib/libvirt/images/%s-%d.raw", name, i)
		host := w.Lab.Host("A").Path(p)
		w.must(os.MkdirAll(filepath.Dir(host), 0o755))
		w.must(guest.BlankImage(host, 256<<20))
		d.Disks = append(d.Disks, guest.Disk{File: p, Serial: fmt.Sprintf("%s-%d", name, i)})
	}
	return d
}

// start defines and starts a guest and waits for its first records.
func (w *world) start(d guest.Domain) *console.Console {
	w.t.Helper()
	w.must(w.Define(w.step(), "A", d))
	c, err := w.Console("A", d, false)
	w.must(err)
	w.virsh("A", "start", d.Name)
	_, err = c.WaitSynced(w.step(), 10)
	w.must(err)
	return c
}

// protect enables the VM and waits for its first consistent copy.
func (w *world) protect(d guest.Domain, every string) status.VM {
	w.t.Helper()
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", every, "--yes")
	return w.replicating("A", d.Name)
}

func (w *world) replicating(host, vm string) status.VM {
	w.t.Helper()
	v, err := w.WaitStatus(w.step(), host, vm, "replicating", func(v status.VM) bool {
		return v.State == status.Replicating && v.Role == status.Primary && !v.LastCommit.IsZero() && v.Health == "normal"
	})
	w.must(err)
	return v
}

func (w *world) status(host, vm string) status.VM {
	w.t.Helper()
	v, err := w.Status(w.step(), host, vm)
	w.must(err)
	return v
}

// booted waits for the guest's verdict on its disks and fails when a record is
// damaged or one of those known to be durable is missing.
func (w *world) booted(c *console.Console, atLeast uint64) uint64 {
	w.t.Helper()
	l, err := c.WaitBoot(w.step())
	w.must(err)
	if l.Int("bad") >= 0 {
		w.t.Fatalf("a record is damaged: %s", l.Raw)
	}
	if n := l.Uint("highest"); n < atLeast {
		w.t.Fatalf("record %d was durable, the highest found is %d: %s", atLeast, n, l.Raw)
	}
	return l.Uint("highest")
}

// noErrors fails when the guest saw an I/O error.
func (w *world) noErrors(host string, d guest.Domain, rendered bool) {
	w.t.Helper()
	p := d.ConsoleFile()
	if rendered {
		p = "/var/log/libvirt/qemu/" + d.UUID + ".log"
	}
	b, err := os.ReadFile(w.Lab.Host(host).Path(p))
	w.must(err)
	for _, bad := range []string{"I/O error", "ERROR op=", "Buffer I/O", "EXT4-fs error", "Remounting filesystem read-only", "JBD2: Error"} {
		if i := strings.Index(string(b), bad); i >= 0 {
			w.t.Fatalf("the guest on %s saw an error: %s", host, string(b[max(0, i-200):min(len(b), i+300)]))
		}
	}
}

// restart starts a crashed host and its daemon again.
func (w *world) restart(host string) {
	w.t.Helper()
	w.must(w.Lab.Host(host).Start(w.step()))
	w.must(w.StartDaemon(w.step(), host))
}

func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return v
}

var _ = lab.Options{}
