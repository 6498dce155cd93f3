package dataplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/wire"
)

// A data plane that may not look into other processes says that an image is in
// use; who asked it says by whom.
func TestWhoAsksNamesTheHolderOfAnImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.raw")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := block.OpenFile(path, block.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	unseen := &block.LockedError{Path: path, What: "exclusive lock", Class: "FLOCK"}
	refused := &wire.Error{Kind: wire.KindRefused, Text: "disk vda: " + unseen.Error(), Hint: "stop that program"}
	for _, err := range []error{fmt.Errorf("disk vda: %w", unseen), &inUse{refused, unseen}} {
		b, jerr := json.Marshal(newAnswer(err))
		if jerr != nil {
			t.Fatal(jerr)
		}
		var a answer
		if err := json.Unmarshal(b, &a); err != nil {
			t.Fatal(err)
		}
		got := a.named()
		if want := fmt.Sprintf("in use by process %d", os.Getpid()); got == nil || !strings.HasPrefix(got.Error(), "disk vda: ") || !strings.Contains(got.Error(), want) {
			t.Errorf("%v, want %q in it", got, want)
		}
		var we *wire.Error
		if !errors.As(got, &we) || we.Kind == wire.KindInternal {
			t.Errorf("the kind is lost: %#v", got)
		}
	}
	var none answer
	if err := json.Unmarshal([]byte("{}"), &none); err != nil || none.named() != nil {
		t.Errorf("an empty answer: %v, %v", none.named(), err)
	}
}
