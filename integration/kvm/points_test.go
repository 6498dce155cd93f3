package kvm_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

func (w *world) points(host, vm string) wire.PointsReply {
	w.t.Helper()
	return decode[wire.PointsReply](w.t, w.ctl(host, "--json", "point", "list", vm))
}

// agent waits until the guest agent answers, and asks it for the freeze state.
func (w *world) agent(host string, d guest.Domain) (freeze string) {
	w.t.Helper()
	w.eventually("the guest agent answers", func() bool {
		out, err := w.Lab.Host(host).Virsh(w.step(), "qemu-agent-command", d.Name, `{"execute":"guest-fsfreeze-status"}`)
		freeze = out
		return err == nil
	})
	return freeze
}

// With the real agent in a real guest: the daemon dies while the file systems
// are frozen, the next one thaws them; an application-consistent point's file
// systems need no recovery; a point stays the same, mounted or exported, while
// the guest goes on; the replica's host alone says what is kept.
func TestRecoveryPointsOfARealGuest(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("points", 60, 2, "")
	c := w.start(d)
	w.protect(d, "1s")
	if s := w.agent("A", d); !strings.Contains(s, "thawed") {
		t.Fatalf("before anything: %s", s)
	}
	w.crashAt("A", "quiesce/frozen/acted", func(ctx context.Context) {
		_, _ = w.Ctl(ctx, "A", "point", "app", d.Name, "1h") // the daemon dies over it
	})
	_, err := c.WaitSynced(w.step(), c.Synced()+20)
	w.must(err)
	if s := w.agent("A", d); !strings.Contains(s, "thawed") {
		t.Fatalf("after a daemon that died while the guest was frozen: %s", s)
	}
	w.ctl("A", "point", "app", d.Name, "2h") // also when the first one was refused
	w.eventually("an application-consistent point is listed on both hosts", func() bool {
		for _, h := range []string{"A", "B"} {
			n := 0
			for _, p := range w.points(h, d.Name).Points {
				if p.App {
					n++
				}
			}
			if n == 0 {
				return false
			}
		}
		return true
	})
	w.refused("A", 6, "point", "mount", d.Name)
	w.refused("A", 6, "point", "keep", d.Name, "0")

	to := "/var/lib/libvirt/exports"
	w.must(os.MkdirAll(w.Lab.Host("B").Path(to), 0o755))
	w.ctl("B", "point", "pin", d.Name, "latest-app")
	point := pinned(w.points("B", d.Name)) // a newer one may come any time
	w.ctl("B", "point", "export", d.Name, "--point", point, "--to", to)
	m := w.mountOn("B", "point", "mount", d.Name, "--point", point)
	_, err = c.WaitSynced(w.step(), c.Synced()+20)
	w.must(err)
	for _, k := range m.Disks {
		file := filepath.Join(w.Lab.Host("B").Path(to), fmt.Sprintf("%s-%s.raw", d.Name, k.Name))
		out, err := exec.CommandContext(w.step(), "dumpe2fs", "-h", file).CombinedOutput()
		if err != nil || strings.Contains(string(out), "needs_recovery") {
			t.Errorf("disk %s of the application-consistent point: %v\n%s", k.Name, err, out)
		}
		w.sameDisk(file, k.URI)
	}
	w.refused("B", 2, "point", "export", d.Name, "--point", point, "--to", to)
	w.ctl("B", "point", "unmount", d.Name, m.ID)
	w.ctl("B", "point", "keep", d.Name, "all:10m,1h:1d", "--quota", "1G")
	if r := w.points("B", d.Name); r.Retention != "all:10m,1h:1d" || r.Quota != 1<<30 || pinned(r) != point {
		t.Errorf("what was set is not what is kept: %+v", r)
	}
}

// pinned is the number of the application-consistent point that is kept.
func pinned(r wire.PointsReply) string {
	for _, p := range r.Points {
		if p.Pinned && p.App {
			return fmt.Sprint(p.Ordinal)
		}
	}
	return ""
}

// mountOn runs a command that mounts a point, or a patch, and returns the mount
// with addresses that can be reached from outside the host.
func (w *world) mountOn(host string, args ...string) status.Mount {
	w.t.Helper()
	w.ctl(host, args...)
	ms := decode[[]status.Mount](w.t, w.ctl(host, "--json", "point", "mounts"))
	if len(ms) != 1 {
		w.t.Fatalf("mounts: %+v", ms)
	}
	for i := range ms[0].Disks {
		k := &ms[0].Disks[i]
		k.URI = strings.Replace(k.URI, "socket=", fmt.Sprintf("socket=/proc/%d/root", w.Lab.Host(host).Pid()), 1)
	}
	return ms[0]
}

// sameDisk lets qemu-img compare a file with an NBD export.
func (w *world) sameDisk(file, uri string) {
	w.t.Helper()
	out, err := exec.CommandContext(w.step(), "qemu-img", "compare", "-f", "raw", "-F", "raw", file, uri).CombinedOutput()
	if err != nil {
		w.t.Errorf("qemu-img compare %s %s: %v\n%s", file, uri, err, out)
	}
}
