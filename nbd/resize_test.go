package nbd_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// A client learns a new size by connecting again; the server ends the
// connection for that, and serves both sizes right in between.
func TestAResizedExportIsSeenByWhoConnectsAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "img")
	must(t, os.WriteFile(path, make([]byte, 8192), 0o600))
	dev, err := block.OpenFile(path, block.FileOptions{})
	must(t, err)
	t.Cleanup(func() { _ = dev.Close() })
	s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
	for _, size := range []int64{16384, 4096} {
		c := s.dial(t, nbd.ClientOptions{})
		was := c.Size()
		must(t, dev.Resize(size))
		must(t, s.srv.Resized(""))
		until(t, "the connection ends", func() bool { return c.Sync() != nil })
		c = s.dial(t, nbd.ClientOptions{})
		if c.Size() != size {
			t.Errorf("%d bytes, want %d (it had %d)", c.Size(), size, was)
		}
		if _, err := c.WriteAt([]byte{1}, size-1); err != nil {
			t.Error(err)
		}
		r := s.connect(t)
		r.enter(true)
		r.request(0, cmdRead, 7, uint64(size), 512)
		if cookie, errno := r.answer(); cookie != 7 || errno == 0 {
			t.Errorf("a read behind the end: cookie %d, error %d", cookie, errno)
		}
	}
	if err := s.srv.Resized("other"); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("an unknown export: %v", err)
	}
}

// qemuMonitor is a QEMU without a machine that has an export as a block node.
type qemuMonitor struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Scanner
}

func startQEMU(t *testing.T, node string) *qemuMonitor {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed: ", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	cmd := exec.CommandContext(ctx, bin, "-machine", "none", "-nodefaults", "-nographic", "-S", "-qmp", "stdio", "-blockdev", node)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })
	m := &qemuMonitor{t: t, in: in, out: bufio.NewScanner(out)}
	m.do(`{"execute":"qmp_capabilities"}`)
	return m
}

// do runs a command and returns the line that answers it.
func (m *qemuMonitor) do(command string) string {
	m.t.Helper()
	_, err := io.WriteString(m.in, command+"\n")
	must(m.t, err)
	for m.out.Scan() {
		if s := m.out.Text(); strings.HasPrefix(s, `{"return"`) || strings.HasPrefix(s, `{"error"`) {
			return s
		}
	}
	m.t.Fatalf("QEMU ended: %v", m.out.Err())
	return ""
}

// QEMU cannot be told a larger size; it learns one with a new connection, and
// lets its block node be resized then, whether it waits for lost servers or not.
func TestQEMULearnsASizeWithANewConnection(t *testing.T) {
	for _, delay := range []int{0, 86400} {
		path := filepath.Join(t.TempDir(), "img")
		must(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
		dev, err := block.OpenFile(path, block.FileOptions{})
		must(t, err)
		t.Cleanup(func() { _ = dev.Close() })
		s := serve(t, nbd.Options{}, nbd.Export{Device: dev})
		q := startQEMU(t, fmt.Sprintf(`{"driver":"raw","node-name":"top","file":{"driver":"nbd","node-name":"ours","server":{"type":"unix","path":%q},"reconnect-delay":%d}}`, s.socket, delay))
		const resize = `{"execute":"block_resize","arguments":{"node-name":"top","size":3145728}}`
		must(t, dev.Resize(3<<20))
		if a := q.do(resize); !strings.Contains(a, "error") {
			t.Errorf("delay %d: QEMU grows an export whose size it does not know: %s", delay, a)
		}
		must(t, s.srv.Resized(""))
		until(t, "QEMU takes the size", func() bool {
			q.do(`{"execute":"human-monitor-command","arguments":{"command-line":"qemu-io top \"read -q 0 512\""}}`)
			return !strings.Contains(q.do(resize), "error")
		})
		if a := q.do(`{"execute":"query-named-block-nodes","arguments":{"flat":true}}`); strings.Count(a, `"virtual-size": 3145728`) != 2 {
			t.Errorf("delay %d: the nodes have other sizes: %s", delay, a)
		}
	}
}
