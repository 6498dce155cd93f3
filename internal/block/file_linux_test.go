package block_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
)

func image(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, opts block.FileOptions) *block.File {
	t.Helper()
	f, err := block.OpenFile(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func requires(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("needs %s: %v", tool, err)
	}
}

func TestFileConforms(t *testing.T) {
	for _, c := range []struct {
		name string
		opts block.FileOptions
	}{
		{"default", block.FileOptions{}},
		{"without dirty bound", block.FileOptions{DirtyLimit: -1}},
		{"with a dirty bound of two pages", block.FileOptions{DirtyLimit: 8192}},
	} {
		t.Run(c.name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T, size int64) block.Device {
				return open(t, image(t, size), c.opts)
			})
		})
	}
}

// loopDevice returns a block device of the given size.
func loopDevice(t *testing.T, size int64) string {
	t.Helper()
	requires(t, "losetup")
	img := image(t, size)
	out, err := exec.Command("losetup", "--find", "--show", img).CombinedOutput()
	if err != nil {
		t.Skipf("no loop device here: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

func TestBlockDeviceReadsWritesAndZeroes(t *testing.T) {
	f := open(t, loopDevice(t, 1<<20), block.FileOptions{})
	if got := f.Size(); got != 1<<20 {
		t.Fatalf("Size() = %d", got)
	}
	want := bytes.Repeat([]byte{0xa5}, 1<<20)
	if _, err := f.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	for _, z := range []block.Range{{Off: 4096, Len: 8192}, {Off: 100, Len: 300}, {Off: 1<<20 - 512, Len: 512}} {
		for _, punch := range []bool{false, true} {
			if err := f.ZeroAt(z.Off, z.Len, punch); err != nil {
				t.Fatalf("zero %+v punch=%v: %v", z, punch, err)
			}
		}
		clear(want[z.Off:z.End()])
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("content differs, err %v", err)
	}
	id, err := f.Identity()
	if err != nil || id.Kind != block.KindBlockDevice || id.Size != 1<<20 || id.Device == 0 || id.Inode != 0 {
		t.Fatalf("Identity() = %+v, %v", id, err)
	}
}

func TestSizeIsRoundedUpWithVirtualZeros(t *testing.T) {
	path := image(t, 1000)
	f := open(t, path, block.FileOptions{})
	if f.Size() != 1024 {
		t.Fatalf("Size() = %d, want 1024", f.Size())
	}
	if _, ok := f.ReadFD(); ok {
		t.Error("descriptor offered although the file ends before the device")
	}
	before, err := f.Identity()
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{1}, 512)
	if _, err := f.ReadAt(p, 512); err != nil || !bytes.Equal(p, make([]byte, 512)) {
		t.Fatalf("tail reads %v, %v", p, err)
	}
	if _, err := f.WriteAt([]byte{7}, 1023); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(p, 512); err != nil || p[510] != 0 || p[511] != 7 {
		t.Fatalf("tail reads %d %d after a write, %v", p[510], p[511], err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 1024 {
		t.Fatalf("image has %d bytes, %v", st.Size(), err)
	}
	if after, err := f.Identity(); err != nil || !after.SameImage(before) {
		t.Fatalf("identity %+v became %+v, %v", before, after, err)
	}
	last := block.Extent{}
	if err := f.Map(0, 1024, func(e block.Extent) bool { last = e; return true }); err != nil || last.End() != 1024 {
		t.Fatalf("map ends at %d, %v", last.End(), err)
	}
}

func TestMapShowsHolesAndData(t *testing.T) {
	f := open(t, image(t, 1<<20), block.FileOptions{})
	if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 64<<10), 256<<10); err != nil {
		t.Fatal(err)
	}
	var hole, data int64
	next := int64(4096)
	err := f.Map(next, 1<<20-next, func(e block.Extent) bool {
		if e.Off != next || e.Len <= 0 {
			t.Fatalf("extent %+v, expected one at %d", e, next)
		}
		next = e.End()
		if e.Hole && e.Zero {
			hole += e.Len
		} else {
			data += e.Len
		}
		return true
	})
	if err != nil || next != 1<<20 || data != 64<<10 || hole != 1<<20-4096-data {
		t.Fatalf("end %d, data %d, hole %d, err %v", next, data, hole, err)
	}
}

func TestCutImageIsAnErrorNotZeros(t *testing.T) {
	path := image(t, 1<<20)
	f := open(t, path, block.FileOptions{})
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8192)
	if _, err := f.ReadAt(p, 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("read of a cut image: %v", err)
	}
	if _, err := f.TryReadAt(p, 0); err == nil {
		t.Fatal("TryReadAt of a cut image succeeded")
	}
}

func TestReadOnlyRefusesEveryChange(t *testing.T) {
	f := open(t, image(t, 8192), block.FileOptions{ReadOnly: true})
	_, err := f.WriteAt(make([]byte, 512), 0)
	_, err2 := f.TryWriteAt(make([]byte, 512), 0)
	for _, err := range []error{err, err2, f.ZeroAt(0, 512, true)} {
		if !errors.Is(err, block.ErrReadOnly) {
			t.Errorf("got %v", err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
}

func TestSymbolicLinksAreResolvedAndOtherKindsRefused(t *testing.T) {
	path := image(t, 512)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	if f := open(t, link, block.FileOptions{}); f.Path() != real {
		t.Errorf("Path() = %q, want %q", f.Path(), real)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{fifo, t.TempDir(), "/dev/null", path + ".absent"} {
		if f, err := block.OpenFile(bad, block.FileOptions{}); err == nil {
			t.Errorf("%s was opened", bad)
			_ = f.Close()
		}
	}
}

func TestIdentityTellsImagesAndWritesApart(t *testing.T) {
	a, b := open(t, image(t, 4096), block.FileOptions{}), open(t, image(t, 4096), block.FileOptions{})
	before, err := a.Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, err := b.Identity()
	if err != nil || before.SameImage(other) {
		t.Fatalf("two files look the same: %+v, %v", other, err)
	}
	if before.Kind != block.KindFile || before.Size != 4096 || before.Inode == 0 || before.MtimeNS == 0 {
		t.Fatalf("Identity() = %+v", before)
	}
	if err := os.Chtimes(a.Path(), time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	after, err := a.Identity()
	if err != nil || after.MtimeNS == before.MtimeNS || !after.SameImage(before) {
		t.Fatalf("after a change: %+v, %v", after, err)
	}
}

func TestClosedFileRefusesEverything(t *testing.T) {
	f := open(t, image(t, 4096), block.FileOptions{})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	_, err1 := f.ReadAt(p, 0)
	_, err2 := f.WriteAt(p, 0)
	_, err3 := f.TryReadAt(p, 0)
	_, err4 := f.TryWriteAt(p, 0)
	_, err5 := f.Identity()
	for i, err := range []error{err1, err2, err3, err4, err5, f.Sync(), f.ZeroAt(0, 512, true), f.LockQEMU(), f.Close()} {
		if !errors.Is(err, block.ErrClosed) {
			t.Errorf("call %d after Close: %v", i, err)
		}
	}
}

func TestDirtyBytesStayBounded(t *testing.T) {
	const limit = 1 << 20
	f := open(t, image(t, 8<<20), block.FileOptions{DirtyLimit: limit})
	p := bytes.Repeat([]byte{1}, 256<<10)
	refused := false
	for off := int64(0); off < f.Size(); off += int64(len(p)) {
		_, err := f.TryWriteAt(p, off)
		if errors.Is(err, block.ErrWouldBlock) {
			refused = true
			_, err = f.WriteAt(p, off)
		}
		if err != nil {
			t.Fatal(err)
		}
		if d := f.DirtyBytes(); d >= limit+int64(len(p)) {
			t.Fatalf("%d bytes dirty, limit %d", d, limit)
		}
	}
	t.Logf("a write had to wait: %v", refused)
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	f := open(t, image(t, 1<<20), block.FileOptions{})
	p := make([]byte, 4096)
	n := testing.AllocsPerRun(200, func() {
		if _, err := f.TryWriteAt(p, 4096); err != nil {
			t.Fatal(err)
		}
		if _, err := f.TryReadAt(p, 4096); err != nil && !errors.Is(err, block.ErrWouldBlock) {
			t.Fatal(err)
		}
	})
	if n != 0 {
		t.Fatalf("%v allocations per write and read", n)
	}
}
