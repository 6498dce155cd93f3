package mount_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/mount"
)

func disk(t *testing.T, name string, fill byte) mount.Disk {
	t.Helper()
	d := block.NewMem(1 << 20)
	if _, err := d.WriteAt(bytes.Repeat([]byte{fill}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	return mount.Disk{Name: name, Device: d}
}

func dial(t *testing.T, uri string, readOnly bool) *nbd.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := nbd.DialURI(ctx, uri, nbd.ClientOptions{AllowUnsafe: true, ReadOnly: readOnly})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // the mount may have ended it
	return c
}

func TestAMountShowsEveryDiskReadOnlyAndLeavesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mounts")
	m, err := mount.Start([]mount.Disk{disk(t, "vda", 1), disk(t, "vdb", 2)}, mount.Options{Dir: dir, ID: "m1"})
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"vda", "vdb"} {
		c := dial(t, m.URI(name), true)
		b := make([]byte, 4096)
		if _, err := c.ReadAt(b, 8192); err != nil || b[0] != byte(i+1) {
			t.Fatalf("disk %s reads %d, %v", name, b[0], err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		if _, err := nbd.DialURI(ctx, m.URI(name), nbd.ClientOptions{}); !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("disk %s for writing: %v", name, err)
		}
		cancel()
	}
	if n := m.Connections(); n < 2 {
		t.Errorf("%d connections", n)
	}
	if err := errors.Join(m.Close(), m.Close()); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestAWritableMountKeepsToItsQuotaAndForgets(t *testing.T) {
	d := disk(t, "vda", 7)
	tmp := t.TempDir()
	zero := 0
	m, err := mount.Start([]mount.Disk{d}, mount.Options{TCP: &zero, ID: "m2", Writable: true, Quota: 64 << 10, ScratchDir: tmp})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(m.URI("vda"), "nbd://127.0.0.1:") {
		t.Errorf("it listens on %s", m.URI("vda"))
	}
	c := dial(t, m.URI("vda"), false)
	b := bytes.Repeat([]byte{9}, 64<<10)
	if _, err := c.WriteAt(b, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteAt(b, 512<<10); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("beyond the quota: %v", err)
	}
	got := make([]byte, 64<<10)
	if _, err := c.ReadAt(got, 4096); err != nil || !bytes.Equal(got, b) {
		t.Fatalf("what was written does not read back: %v", err)
	}
	if m.Used() != 64<<10 {
		t.Errorf("%d bytes used", m.Used())
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Device.ReadAt(got, 0); err != nil || got[5000] != 7 {
		t.Errorf("the disk below was changed: %d, %v", got[5000], err)
	}
	if left, err := os.ReadDir(tmp); err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestCleanRemovesWhatAKilledProcessLeft(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mounts")
	for range 2 {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "old.sock"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := mount.Clean(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Fatalf("still there: %v", err)
		}
	}
}
