package nbd_test

import (
	"errors"
	"os"
	"path/filepath"
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
