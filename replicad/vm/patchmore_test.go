package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/replicad/wire"
)

// What the first epoch of a return overwrites goes into the patch first. A patch
// that cannot be read now refuses the epoch, with the way out; one that a person
// deleted, or that is damaged, holds nothing up.
func TestAPatchThatCannotBeReadRefusesTheEpoch(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.b.vm()
	must(t, v.update(func(r *Record) error { r.Given = "back"; return nil }))
	file := v.patchFile("back")
	if err := v.keepReplaced(t.Context(), nil); err != nil {
		t.Errorf("a deleted patch: %v", err)
	}
	must(t, os.MkdirAll(filepath.Dir(file), 0o700))
	must(t, os.WriteFile(file, []byte("nonsense"), 0o600))
	if err := v.keepReplaced(t.Context(), nil); err != nil {
		t.Errorf("a damaged patch: %v", err)
	}
	must(t, os.Remove(file))
	must(t, os.Mkdir(file, 0o700)) // opens, and cannot be read
	err := v.keepReplaced(t.Context(), nil)
	if !kindIs(err, wire.KindUnavailable) || !strings.Contains(err.Error(), "failover patch delete web back") {
		t.Errorf("a patch that cannot be read: %v", err)
	}
}
