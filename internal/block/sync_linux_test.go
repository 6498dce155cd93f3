package block_test

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"kvmreplica/internal/block"
)

// syncVictim makes this test binary the program under strace.
const syncVictim = "BLOCK_SYNC_VICTIM"

// The kernel reports a failed write-back once; a second fdatasync succeeds
// although the data is gone. Ours goes on failing.
func TestFailedSyncIsFinal(t *testing.T) {
	if path := os.Getenv(syncVictim); path != "" {
		f, err := block.OpenFile(path, block.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte{1}, 0); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			if err := f.Sync(); !errors.Is(err, block.ErrSyncFailed) || !errors.Is(err, syscall.EIO) {
				t.Fatalf("Sync %d: %v", i, err)
			}
		}
		return
	}
	requires(t, "strace")
	cmd := exec.Command("strace", "-f", "-qq", "-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=1",
		os.Args[0], "-test.run=^TestFailedSyncIsFinal$", "-test.v")
	cmd.Env = append(os.Environ(), syncVictim+"="+image(t, 4096))
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "(INJECTED)") {
		t.Fatalf("%v\n%s", err, out)
	}
}
