package kernel_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/micro"
	"kvmreplica/integration/powerfail/cutdisk"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

const vmID wire.VMID = "11111111-2222-3333-4444-555555555555"

// patience bounds each wait; nothing waits this long when all is well.
const patience = 5 * time.Minute

// machine is a guest with an ext4 file system at /data and a data plane in it.
type machine struct {
	*micro.Machine
	t     *testing.T
	ctx   context.Context
	dir   string
	plane *dataplane.Client
	cfg   dataplane.Config
}

// long skips what only "make kernel" runs.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("KVMREPLICA_KERNEL") != "full" {
		t.Skip("takes a minute: make kernel")
	}
}

// boot starts a machine, or skips where none can be booted.
func boot(t *testing.T, tools map[string]string, disks ...string) *machine {
	t.Helper()
	if os.Getenv("KVMREPLICA_LAB") == "" {
		t.Skip("boots guests: KVMREPLICA_LAB=1")
	}
	for _, tool := range []string{"qemu-system-x86_64", "busybox", "mke2fs", "nbd-server", "sqlite3"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
	if m := lab.Missing(); len(m) > 0 {
		t.Skipf("needs %v", m)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	t.Cleanup(cancel)
	all := map[string]string{"/sbin/mke2fs": "mke2fs", "/sbin/e2fsck": "e2fsck"}
	for at, name := range tools {
		all[at] = name
	}
	files, err := guest.Custom(ctx, micro.Recipe(guest.Recipe{
		Name: "kernel", Modules: []string{"nbd"}, Tools: all,
		Commands: map[string]string{"/bin/replicad": "./cmd/replicad", "/bin/knbd": "./integration/kernel/knbd"},
	}))
	must(t, err)
	dir, err := os.MkdirTemp("", "kn") // short: it holds sockets
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	srv, err := cutdisk.Serve(cutdisk.New(512<<20), filepath.Join(dir, "disk"))
	must(t, err)
	t.Cleanup(func() { _ = srv.Close() })
	m := &machine{t: t, ctx: ctx, dir: dir}
	m.Machine, err = micro.Boot(ctx, micro.Config{
		Files: files, Dir: dir, Disks: append([]string{filepath.Join(dir, "disk")}, disks...), Load: []string{"nbd"}, MemoryMiB: 384,
	})
	must(t, err)
	t.Cleanup(m.Cut)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "console"))
			log, _ := m.Exec(context.WithoutCancel(ctx), "/bin/busybox", "sh", "-c", "cat /run/*.log /run/vm/*.log; dmesg | tail -20")
			t.Logf("console:\n%s\nlogs:\n%s", b[max(0, len(b)-2000):], log)
		}
	})
	m.sh("/sbin/mke2fs -q -t ext4 -F /dev/vda && mkdir -p /data && mount -t ext4 /dev/vda /data")
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sh runs a line of shell in the guest.
func (m *machine) sh(line string) string {
	m.t.Helper()
	out, err := m.Exec(m.ctx, "/bin/busybox", "sh", "-c", line)
	must(m.t, err)
	return strings.TrimSpace(out)
}

// start starts a program that goes on, and waits for a line of its log.
func (m *machine) start(name, line, says string) {
	m.t.Helper()
	m.sh(line + " >/run/" + name + ".log 2>&1 & echo $! >/run/" + name + ".pid")
	m.until("/run/"+name+".log", says)
}

// until waits until a file of the guest holds a text.
func (m *machine) until(file, text string) {
	m.t.Helper()
	m.sh("i=0; until grep -q '" + text + "' " + file + "; do usleep 50000; i=$((i+1)); [ $i -lt 2400 ] || { cat " + file + "; exit 1; }; done")
}

// serve starts keeper and data plane with disks, all exported.
func (m *machine) serve(disks ...dataplane.DiskConfig) {
	m.t.Helper()
	m.cfg = dataplane.Config{
		AnyClient: true,
		VM:        vmID, Name: "guest", StateDir: "/data/track", SharedDir: "/dev/shm/vm", RunDir: "/run/vm", Disks: disks,
	}
	b, err := json.Marshal(m.cfg)
	must(m.t, err)
	m.sh("mkdir -p /data/track /dev/shm/vm /run/vm")
	must(m.t, m.Put(m.ctx, "/run/vm/config.json", b, 0o600))
	m.sh("/bin/replicad keeper --detach --config /run/vm/config.json >/run/vm/plane.log 2>&1")
	sock, err := m.Forward(m.cfg.ControlSocket())
	must(m.t, err)
	m.plane = dataplane.NewClient(sock)
	m.t.Cleanup(m.plane.Close)
	m.answers()
	must(m.t, m.plane.CreateTracker(m.ctx, dataplane.CreateRequest{Generation: delta.Generation{7}}))
	must(m.t, m.plane.Export(m.ctx, dataplane.ExportRequest{On: true}))
}

// answers waits for the data plane and returns its state.
func (m *machine) answers() dataplane.Status {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.ctx, patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		st, err := m.plane.Status(ctx)
		if err == nil {
			return st
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			m.t.Fatal(errors.Join(err, ctx.Err()))
		}
	}
}
