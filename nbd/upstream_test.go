package nbd_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/nbd"
)

// upstreams are other people's servers, each on an image and a socket.
func upstreams() map[string]func(img, sock string) []string {
	return map[string]func(img, sock string) []string{
		"qemu-nbd": func(img, sock string) []string {
			return []string{"qemu-nbd", "-t", "--shared=0", "-f", "raw", "-k", sock, "--discard=unmap", img}
		},
		"nbdkit": func(img, sock string) []string { return []string{"nbdkit", "-f", "-U", sock, "file", img} },
		"nbdkit with blocks of 4096": func(img, sock string) []string {
			return []string{
				"nbdkit", "-f", "-U", sock, "--filter=blocksize-policy", "file", img,
				"blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=256k", "blocksize-error-policy=error",
			}
		},
		"nbdkit without zeroes": func(img, sock string) []string {
			return []string{"nbdkit", "-f", "-U", sock, "--filter=nozero", "file", img}
		},
		"nbdkit without structured replies": func(img, sock string) []string {
			return []string{"nbdkit", "-f", "--no-sr", "-U", sock, "file", img}
		},
		"nbdkit of the old style's successor": func(img, sock string) []string {
			return []string{"nbdkit", "-f", "--mask-handshake=1", "-U", sock, "file", img}
		},
	}
}

func startUpstream(t *testing.T, args []string) {
	t.Helper()
	requires(t, args[0])
	cmd := exec.Command(args[0], args[1:]...)
	var said bytes.Buffer
	cmd.Stderr = &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s: %s", args[0], said.String())
		}
	})
}

func TestClientOfForeignServersConforms(t *testing.T) {
	for name, args := range upstreams() {
		if strings.Contains(name, "4096") {
			continue // has a test of its own: the suite's sizes do not fit
		}
		t.Run(name, func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T, size int64) block.Device {
				if size > 1<<30 && strings.Contains(name, "without zeroes") {
					t.Skip("writing that many zeros takes too long")
				}
				return upstream(t, args, size)
			})
		})
	}
}

func upstream(t *testing.T, args func(img, sock string) []string, size int64) *nbd.Client {
	t.Helper()
	img, sock := filepath.Join(t.TempDir(), "img"), filepath.Join(t.TempDir(), "s")
	must(t, os.WriteFile(img, nil, 0o600))
	must(t, os.Truncate(img, size))
	startUpstream(t, args(img, sock))
	return dialWhenUp(t, sock, nbd.ClientOptions{})
}

// What is not aligned is read, changed and written back; writers of
// neighbouring sectors in one block must not undo each other.
func TestSectorsOnAServerWithBlocksOf4096(t *testing.T) {
	const size = 256 << 10
	c := upstream(t, upstreams()["nbdkit with blocks of 4096"], size)
	var wg sync.WaitGroup
	for lane := range int64(8) { // lane i owns every sector i mod 8
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(lane + 1)}, 512)
			for off := lane * 512; off < size; off += 8 * 512 {
				if _, err := c.WriteAt(p, off); err != nil {
					t.Errorf("write at %d: %v", off, err)
				}
			}
		})
	}
	wg.Wait()
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i/512%8 + 1)
	}
	expect(t, c, 0, want)
	for _, z := range []block.Range{{Off: 100, Len: 5000}, {Off: 8192, Len: 8192}, {Off: 20000, Len: 60000}, {Off: size - 700, Len: 700}} {
		must(t, c.ZeroAt(z.Off, z.Len, true))
		clear(want[z.Off:z.End()])
	}
	expect(t, c, 0, want)
	expect(t, c, 4099, want[4099:70000])
	must(t, c.Map(5, size-10, func(e block.Extent) bool { return e.Len > 0 }))
}

// Through us to another server and back: what qemu-img sees is what the
// upstream holds.
func TestUpstreamServedOn(t *testing.T) {
	requires(t, "qemu-img")
	for name, args := range upstreams() {
		t.Run(name, func(t *testing.T) {
			f, want := patterned(t, 4<<20)
			path := f.Path()
			must(t, f.Close())
			sock := filepath.Join(t.TempDir(), "s")
			startUpstream(t, args(path, sock))
			c := dialWhenUp(t, sock, nbd.ClientOptions{})
			s := serve(t, nbd.Options{}, nbd.Export{Device: c})
			copied := filepath.Join(t.TempDir(), "copy")
			tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri(), copied)
			got, err := os.ReadFile(copied)
			must(t, err)
			if !bytes.Equal(got, want) {
				t.Fatal("content differs")
			}
		})
	}
}

func TestServerWithoutFlushIsNoPlaceForAGuest(t *testing.T) {
	requires(t, "nbdkit")
	img, sock := filepath.Join(t.TempDir(), "img"), filepath.Join(t.TempDir(), "s")
	must(t, os.WriteFile(img, make([]byte, 8192), 0o600))
	// A server that offers neither flush nor FUA: go-nbd's shape, by nbdkit.
	script := filepath.Join(t.TempDir(), "plugin")
	must(t, os.WriteFile(script, []byte("#!/bin/sh\ncase $1 in get_size) echo 8192;; can_write) exit 0;; pread) dd if="+img+
		" iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none;; pwrite) cat >/dev/null;; *) exit 2;; esac\n"), 0o700))
	startUpstream(t, []string{"nbdkit", "-f", "-U", sock, "sh", script})
	dialWhenUp(t, sock, nbd.ClientOptions{ReadOnly: true})
	if _, err := nbd.Dial(t.Context(), "unix", sock, nbd.ClientOptions{}); !errors.Is(err, nbd.ErrNoFlush) {
		t.Fatalf("writable without flush: %v", err)
	}
	c := dialWhenUp(t, sock, nbd.ClientOptions{AllowUnsafe: true})
	must(t, c.Sync())
}

// nbd-server keeps to the letter of older days: no GO sizes in INFO, no
// structured replies by default.
func TestNBDServerAsUpstream(t *testing.T) {
	requires(t, "nbd-server")
	dir := t.TempDir()
	img, sock, conf := filepath.Join(dir, "img"), filepath.Join(dir, "s"), filepath.Join(dir, "conf")
	must(t, os.WriteFile(img, make([]byte, 1<<20), 0o600))
	must(t, os.WriteFile(conf, []byte("[generic]\nunixsock="+sock+"\nallowlist=true\n[d]\nexportname="+img+"\nflush=true\nfua=true\ntrim=true\n"), 0o600))
	pidFile := filepath.Join(dir, "pid")
	tool(t, "nbd-server", "-C", conf, "-p", pidFile) // goes to the background by itself
	t.Cleanup(func() {
		text, err := os.ReadFile(pidFile)
		pid, err2 := strconv.Atoi(strings.TrimSpace(string(text)))
		if errors.Join(err, err2) == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	c := dialWhenUp(t, sock, nbd.ClientOptions{Export: "d"})
	want := make([]byte, 200<<10)
	fill(want, 8)
	_, err := c.WriteAt(want, 333)
	must(t, err)
	must(t, c.ZeroAt(4096, 8192, true))
	clear(want[4096-333 : 4096-333+8192])
	must(t, c.Sync())
	expect(t, c, 333, want)
	got, err := os.ReadFile(img)
	must(t, err)
	if !bytes.Equal(got[333:333+len(want)], want) {
		t.Fatal("image differs")
	}
	if err := c.Map(0, c.Size(), func(block.Extent) bool { return true }); err != nil {
		t.Error(err)
	}
}
