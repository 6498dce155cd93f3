package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvmreplica/nbd"
)

const patience = 2 * time.Minute

func requires(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		t.Skipf("needs %s: %v", tool, err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sparse(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	return path
}

// Without them two syncs of 10 ms stop every disk of a host with two CPUs.
func TestProcessorsAreSparedForSystemCalls(t *testing.T) {
	if os.Getenv("GOMAXPROCS") != "" {
		t.Setenv("GOMAXPROCS", "") // the rest of the process is as it was
	}
	before := runtime.GOMAXPROCS(runtime.NumCPU())
	defer runtime.GOMAXPROCS(before)
	serveImage(t, sparse(t, 1<<20))
	if n := runtime.GOMAXPROCS(0); n < runtime.NumCPU()+syncsAtOnce+nbd.DefaultLines {
		t.Fatalf("a server of disks runs with %d processors on %d CPUs", n, runtime.NumCPU())
	}
}

// served is "replicad nbd" running in this process.
type served struct {
	t      *testing.T
	socket string
	cancel context.CancelFunc
	done   chan error
	log    bytes.Buffer // complete when it has ended
}

// serveImage starts "replicad nbd IMAGE --socket ... ARGS" and waits until it
// serves.
func serveImage(t *testing.T, image string, args ...string) *served {
	t.Helper()
	dir, err := os.MkdirTemp("", "rnbd")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ctx, cancel := context.WithCancel(t.Context())
	s := &served{t: t, socket: filepath.Join(dir, "s"), cancel: cancel, done: make(chan error, 1)}
	out, in := io.Pipe()
	cmd := newNBDCommand()
	cmd.SetArgs(append([]string{image, "--socket", s.socket}, args...))
	cmd.SetOut(in)
	cmd.SetErr(&s.log)
	go func() {
		err := cmd.ExecuteContext(ctx)
		_ = in.CloseWithError(io.EOF)
		s.done <- err
	}()
	if line, err := io.ReadAll(io.LimitReader(out, 8)); err != nil || string(line) != "serving " {
		t.Fatalf("replicad nbd says %q (%v): %v", line, err, <-s.done)
	}
	go io.Copy(io.Discard, out) //nolint:errcheck // ends with the command
	t.Cleanup(cancel)
	return s
}

func (s *served) uri() string { return "nbd+unix:///?socket=" + s.socket }

// stop ends it as a signal would.
func (s *served) stop() {
	s.t.Helper()
	s.cancel()
	must(s.t, s.wait())
}

func (s *served) wait() error {
	s.t.Helper()
	select {
	case err := <-s.done:
		return err
	case <-time.After(patience):
		s.t.Fatal("replicad nbd does not end")
		return nil
	}
}

func qemuIO(t *testing.T, image, format string, commands ...string) {
	t.Helper()
	requires(t, "qemu-io")
	args := []string{"-f", format}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := exec.Command("qemu-io", append(args, image)...).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) {
		t.Fatalf("qemu-io %v: %v\n%s", commands, err, out)
	}
}

func TestNBDServesARawImageUntilStopped(t *testing.T) {
	img := sparse(t, 8<<20)
	s := serveImage(t, img)
	qemuIO(t, s.uri(), "raw", "write -P 5 1M 3M", "flush", "read -P 5 1M 3M")
	if st, err := os.Stat(s.socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", img).CombinedOutput(); err == nil || !strings.Contains(string(out), "lock") {
		t.Errorf("QEMU may write to the image we serve: %s", out)
	}
	s.stop()
	qemuIO(t, img, "raw", "read -P 5 1M 3M")
}

// After a clean stop the next run knows exactly what was written, and nothing
// else is dirty: neither what nobody touched nor the rest of a touched region.
func TestNBDKeepsATrackerUnderState(t *testing.T) {
	img, state := sparse(t, 8<<20), t.TempDir()
	for i, begins := range []string{"new change tracker", "source=exact", "source=exact"} {
		s := serveImage(t, img, "--state", state)
		pattern := strconv.Itoa(i + 1)
		qemuIO(t, s.uri(), "raw", "write -P "+pattern+" 1M 64k", "flush", "read -P "+pattern+" 1M 64k")
		if i == 1 {
			qemuIO(t, s.uri(), "raw", "write -P 9 5M 4k")
		}
		s.stop()
		dirty := []string{"", "dirty=65536", "dirty=69632"}[i]
		if said := s.log.String(); !strings.Contains(said, begins) || !strings.Contains(said, dirty) {
			t.Errorf("run %d: want %q and %q: %s", i, begins, dirty, said)
		}
	}
	qemuIO(t, img, "raw", "read -P 3 1M 64k", "read -P 9 5M 4k")
}

func TestNBDServesQCOW2ThroughAChild(t *testing.T) {
	requires(t, "qemu-nbd")
	requires(t, "qemu-img")
	img := filepath.Join(t.TempDir(), "a,b.qcow2") // a comma is QEMU's separator
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", img, "64M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := serveImage(t, img, "--format", "qcow2")
	qemuIO(t, s.uri(), "raw", "write -P 7 1M 3M", "flush", "read -P 7 1M 3M")
	s.stop()
	qemuIO(t, img, "qcow2", "read -P 7 1M 3M")
}

// childOf finds the qemu-nbd that serves an image.
func childOf(t *testing.T, image string) int {
	t.Helper()
	out, err := exec.Command("pgrep", "-P", strconv.Itoa(os.Getpid()), "-f", filepath.Base(image)).Output()
	must(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	must(t, err)
	return pid
}

func TestNBDEndsWithAnErrorWhenTheChildDies(t *testing.T) {
	requires(t, "qemu-nbd")
	requires(t, "pgrep")
	img := filepath.Join(t.TempDir(), "victim.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", img, "64M").CombinedOutput(); err != nil {
		t.Skipf("needs qemu-img: %v: %s", err, out)
	}
	s := serveImage(t, img, "--format", "qcow2")
	must(t, syscall.Kill(childOf(t, img), syscall.SIGKILL))
	if err := s.wait(); err == nil || !strings.Contains(err.Error(), "qemu-nbd ended") {
		t.Fatalf("ended with %v", err)
	}
}

func TestNBDPassesAnotherServerOn(t *testing.T) {
	img := sparse(t, 8<<20)
	below := serveImage(t, img, "--export", "deep")
	s := serveImage(t, "nbd+unix:///deep?socket="+below.socket)
	qemuIO(t, s.uri(), "raw", "write -P 3 1M 3M", "write -z -u 2M 64k", "flush", "read -P 0 2M 64k")
	s.stop()
	below.stop()
	qemuIO(t, img, "raw", "read -P 3 1M 1M", "read -P 0 2M 64k")
}

func TestNBDEndsWithAnErrorWhenTheOtherServerDoes(t *testing.T) {
	below := serveImage(t, sparse(t, 1<<20))
	s := serveImage(t, "nbd+unix:///?socket="+below.socket)
	below.stop()
	if err := s.wait(); !errors.Is(err, nbd.ErrDisconnected) {
		t.Fatalf("ended with %v", err)
	}
}

func TestNBDRefusesWhatCannotWork(t *testing.T) {
	img := sparse(t, 1<<20)
	busy := serveImage(t, img)
	stale := filepath.Join(t.TempDir(), "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale})
	must(t, err)
	ln.SetUnlinkOnClose(false)
	must(t, ln.Close())
	file := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(file, nil, 0o600))
	fresh := func() string { return filepath.Join(t.TempDir(), "s") }
	for _, c := range []struct {
		title string
		args  []string
		want  string
	}{
		{"no socket", []string{img}, "required flag"},
		{"no image", []string{"--socket", fresh()}, "accepts 1 arg"},
		{"absent image", []string{img + ".no", "--socket", fresh()}, "no such file"},
		{"image in use", []string{img, "--socket", fresh()}, "is in use"},
		{"socket in use", []string{sparse(t, 512), "--socket", busy.socket}, "is in use"},
		{"a file where the socket shall be", []string{sparse(t, 512), "--socket", file}, "address already in use"},
		{"unknown format", []string{sparse(t, 512), "--format", "vmdk", "--socket", fresh()}, "not supported"},
		{"nobody upstream", []string{"nbd+unix:///?socket=/nonexistent", "--socket", fresh()}, "connect"},
		{"TLS upstream", []string{"nbds://host/x", "--socket", fresh()}, "TLS"},
		{"raw as qcow2", []string{sparse(t, 1<<20), "--format", "qcow2", "--socket", fresh()}, "qemu-nbd"},
	} {
		t.Run(c.title, func(t *testing.T) {
			cmd := newNBDCommand()
			cmd.SetArgs(c.args)
			cmd.SetOut(io.Discard)
			cmd.SetErr(io.Discard)
			if err := cmd.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want something with %q", err, c.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cmd := newNBDCommand()
	cmd.SetArgs([]string{sparse(t, 512), "--socket", stale})
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	if err := cmd.ExecuteContext(ctx); err != nil {
		t.Errorf("a stale socket is not replaced: %v", err)
	}
}
