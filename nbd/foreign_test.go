package nbd_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// tool runs a foreign program to success and returns what it said.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	requires(t, name)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// patterned returns an image with data, holes and zeros, and its content.
func patterned(t testing.TB, size int64) (*block.File, []byte) {
	t.Helper()
	f := newFile(t, size)
	want := make([]byte, size)
	for off := int64(0); off+96<<10 < size; off += 1 << 20 {
		fill(want[off:off+96<<10], byte(off>>20))
		_, err := f.WriteAt(want[off:off+96<<10], off)
		must(t, err)
	}
	return f, want
}

// Devices of three kinds stand behind the exports of these tests: everything
// inline with sendfile, everything parked, and writes cut into small pieces.
func eachExport(t *testing.T, size int64, test func(t *testing.T, s service, f *block.File, want []byte)) {
	for _, c := range []struct {
		name string
		make func(f *block.File) nbd.Export
	}{
		{"inline", func(f *block.File) nbd.Export { return nbd.Export{Device: f} }},
		{"parked", func(f *block.File) nbd.Export { return nbd.Export{Device: plain{f}} }},
		{"pieces", func(f *block.File) nbd.Export { return nbd.Export{Device: f, MaxPiece: 12 << 10} }},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, want := patterned(t, size)
			test(t, serve(t, nbd.Options{}, c.make(f)), f, want)
		})
	}
}

func TestQEMUImgCopiesAndCompares(t *testing.T) {
	requires(t, "qemu-img")
	eachExport(t, 16<<20+512, func(t *testing.T, s service, f *block.File, want []byte) {
		copied := filepath.Join(t.TempDir(), "copy")
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri(), copied)
		got, err := os.ReadFile(copied)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Fatal("qemu-img convert from us: content differs")
		}
		must(t, f.ZeroAt(0, f.Size(), true))
		tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", copied, s.uri())
		expect(t, f, 0, want)
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", s.uri(), copied)
	})
}

func TestQEMUImgMapSeesTheHoles(t *testing.T) {
	requires(t, "qemu-img")
	f, _ := patterned(t, 4<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: f})
	ours := tool(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri())
	if n := strings.Count(ours, `"data": true`); n != 4 {
		t.Errorf("%d data extents, want 4:\n%s", n, ours)
	}
	if n := strings.Count(ours, `"zero": true`); n != 4 {
		t.Errorf("%d zero extents, want 4:\n%s", n, ours)
	}
}

func TestQEMUIOVerifiesPatterns(t *testing.T) {
	requires(t, "qemu-io")
	eachExport(t, 16<<20, func(t *testing.T, s service, f *block.File, _ []byte) {
		out := tool(t, "qemu-io", "-f", "raw", "-t", "none",
			"-c", "aio_write -P 1 0 4k", "-c", "aio_write -P 2 64k 2M", "-c", "aio_write -P 3 5M 4096", "-c", "aio_flush",
			"-c", "write -f -P 4 8M 300k", "-c", "write -z 70k 10k", "-c", "write -z -u 1M 64k", "-c", "write -z 1536k 64k",
			"-c", "discard 6M 1M", "-c", "flush",
			"-c", "read -P 1 0 4k", "-c", "read -P 2 64k 6k", "-c", "read -P 0 70k 10k", "-c", "read -P 2 80k 900k", "-c", "read -P 0 1M 64k",
			"-c", "read -P 2 1088k 448k", "-c", "read -P 0 1536k 64k", "-c", "read -P 3 5M 4096", "-c", "read -P 4 8M 300k", "-c", "read 0 16M",
			s.uri())
		if strings.Contains(out, "fail") || strings.Contains(out, "error") {
			t.Fatalf("qemu-io: %s", out)
		}
		expect(t, f, 8<<20, bytes.Repeat([]byte{4}, 300<<10))
	})
}

func TestNBDInfoSeesWhatWeOffer(t *testing.T) {
	requires(t, "nbdinfo")
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20), Description: "first disk"},
		nbd.Export{Name: "ro", Device: newFile(t, 8192), ReadOnly: true})
	has := func(out string, lines ...string) {
		t.Helper()
		for _, l := range lines {
			if !strings.Contains(out, l) {
				t.Errorf("nbdinfo does not say %q:\n%s", l, out)
			}
		}
	}
	has(tool(t, "nbdinfo", s.uri()), "newstyle-fixed", "structured packets", "description: first disk", "export-size: 1048576", "base:allocation",
		"is_read_only: false", "can_cache: true", "can_df: true", "can_fast_zero: true", "can_flush: true", "can_fua: true",
		"can_multi_conn: true", "can_trim: true", "can_zero: true", "block_size_minimum: 1\n", "block_size_preferred: 4096", "block_size_maximum: 33554432")
	has(tool(t, "nbdinfo", s.uriOf("ro")), "is_read_only: true", "can_trim: false", "can_zero: false", "export-size: 8192")
	has(tool(t, "nbdinfo", "--list", s.uri()), `export="":`, `export="ro":`)
	has(tool(t, "nbdinfo", "--map", s.uri()), "1048576", "hole,zero")
}

func TestNBDCopyBothWays(t *testing.T) {
	requires(t, "nbdcopy")
	eachExport(t, 16<<20+512, func(t *testing.T, s service, f *block.File, want []byte) {
		copied := filepath.Join(t.TempDir(), "copy")
		tool(t, "nbdcopy", s.uri(), copied)
		got, err := os.ReadFile(copied)
		must(t, err)
		if !bytes.Equal(got, want) {
			t.Fatal("nbdcopy from us: content differs")
		}
		must(t, f.ZeroAt(0, f.Size(), true))
		tool(t, "nbdcopy", "--flush", copied, s.uri())
		expect(t, f, 0, want)
	})
}

// nbdsh runs a libnbd script against the service; h is connected.
func nbdsh(t *testing.T, s service, script string) {
	t.Helper()
	const python = "/usr/bin/python3" // the distribution's, which has libnbd
	if out, err := exec.Command(python, "-c", "import nbd").CombinedOutput(); err != nil {
		t.Skipf("needs python3-libnbd: %s", out)
	}
	head := `
import nbd, errno
def connect(strict=True):
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    if not strict: h.set_strict_mode(0)
    h.connect_unix(` + fmt.Sprintf("%q", s.socket) + `)
    return h
def refused(code, fn, *args):
    try:
        fn(*args)
    except nbd.Error as e:
        assert e.errnum == code, "got %s, want %s" % (e.errno, errno.errorcode[code])
        return
    raise AssertionError("not refused")
h = connect()
`
	tool(t, python, "-c", head+script)
}

func TestLibnbdDrivesEveryCommand(t *testing.T) {
	eachExport(t, 4<<20, func(t *testing.T, s service, f *block.File, _ []byte) {
		nbdsh(t, s, `
size = h.get_size()
assert size == 4 << 20 and h.can_multi_conn() and h.can_fua() and not h.is_read_only()
data = bytes(range(256)) * 16
h.pwrite(data, 4096)
assert h.pread(4096, 4096) == data
h.pwrite(data, 12288, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 12288) == data
h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(4096, 4096) == bytes(4096)
h.zero(4096, 12288)
assert h.pread(4096, 12288) == bytes(4096)
h.pwrite(data, 0)
h.trim(4096, 0, nbd.CMD_FLAG_FUA)
h.cache(65536, 0)
h.flush()
seen = []
def extent(ctx, off, entries, err):
    assert ctx == "base:allocation" and off == 0
    seen.append(entries)
h.block_status(size, 0, extent)
assert sum(seen[0][::2]) <= size and len(seen[0]) >= 2, seen
seen.clear()
h.block_status(size, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(seen[0]) == 2 and 0 < seen[0][0] <= size, seen
got = []
def chunk(buf, off, status, err): got.append((off, len(buf)))
h.pread_structured(2 << 20, 4096, chunk)
assert sum(n for _, n in got) == 2 << 20
got.clear()
h.pread_structured(2 << 20, 4096, chunk, nbd.CMD_FLAG_DF)
assert got == [(4096, 2 << 20)], got
# Many at once, out of order.
bufs = []
for i in range(200):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i] * 512)), i * 512)
while h.aio_in_flight() > 0: h.poll(-1)
for i in range(200):
    b = nbd.Buffer(512); bufs.append(b)
    h.aio_pread(b, i * 512)
while h.aio_in_flight() > 0: h.poll(-1)
for i in range(200): assert bytes(bufs[i].to_bytearray()) == bytes([i] * 512), i
# Two connections: a flush on one covers a write answered on the other.
h2 = connect()
h2.pwrite(data, 1 << 20); h.flush()
assert h.pread(4096, 1 << 20) == data
h2.shutdown(); h.shutdown()
`)
	})
}

func TestLibnbdIsRefusedWithTheRightError(t *testing.T) {
	s := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20)})
	nbdsh(t, s, `
h = connect(strict=False)
end = 1 << 20
refused(errno.EINVAL, h.pread, 512, end)
refused(errno.EINVAL, h.pread, 1024, end - 512)
refused(errno.ENOSPC, h.pwrite, bytes(512), end)
refused(errno.ENOSPC, h.zero, 512, end)
refused(errno.EINVAL, h.trim, 512, end)
refused(errno.EINVAL, h.cache, 512, end)
refused(errno.EINVAL, h.pwrite, bytes(512), 0, 1 << 14)
assert h.pread(512, 0) == bytes(512)
h.shutdown()
`)
	s = serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, 1<<20), ReadOnly: true})
	nbdsh(t, s, `
h = connect(strict=False)
assert h.is_read_only()
refused(errno.EPERM, h.pwrite, bytes(512), 0)
refused(errno.EPERM, h.zero, 512, 0)
refused(errno.EPERM, h.trim, 512, 0)
h.flush()
assert h.pread(512, 0) == bytes(512)
h.shutdown()
`)
}

func TestFioVerifies(t *testing.T) {
	requires(t, "fio")
	eachExport(t, 16<<20, func(t *testing.T, s service, _ *block.File, _ []byte) {
		out := tool(t, "fio", "--name=v", "--ioengine=nbd", "--verify_state_save=0", "--uri="+s.uri(), "--rw=randrw", "--bsrange=512-256k", "--size=16m",
			"--io_size=24m", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--randseed=1", "--fsync=32", "--group_reporting")
		if strings.Contains(out, "verify:") {
			t.Fatalf("fio: %s", out)
		}
	})
}

// nbdkit's nbd plugin is a client of ours and a server for qemu-img.
func TestNBDKitStandsOnTopOfUs(t *testing.T) {
	requires(t, "nbdkit")
	requires(t, "qemu-img")
	f, want := patterned(t, 8<<20)
	s := serve(t, nbd.Options{}, nbd.Export{Device: f})
	copied := filepath.Join(t.TempDir(), "copy")
	tool(t, "nbdkit", "-U", "-", "nbd", "socket="+s.socket, "--run",
		`qemu-img convert -f raw -O raw "$uri" `+copied+` && qemu-io -f raw -c "write -P 9 1M 1M" -c flush "$uri"`)
	got, err := os.ReadFile(copied)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatal("content differs through nbdkit")
	}
	expect(t, f, 1<<20, bytes.Repeat([]byte{9}, 1<<20))
}
