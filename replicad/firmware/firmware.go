// Package firmware keeps the firmware state of a promotion, NVRAM and TPM, in
// the VM's state directory until it is written where libvirt looks for it.
//
// What is read is what was kept: a file that was damaged since is an error that
// says what to do, never a guest that starts with other variables. Callers are
// the daemon and the offline tool, which may take over from one another at any
// step; each writes the state back before it starts the guest.
package firmware

import (
	"errors"
	"fmt"
	"io/fs"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// File is the state's name in a VM's state directory.
const File = "firmware.json"

const (
	version = 1
	// maxFile is the largest state in base64, and some.
	maxFile = (delta.MaxNVRAM+delta.MaxTPM)/3*4 + 4096
)

// State is a guest's firmware state; what it does not have is nil.
type State struct {
	NVRAM []byte `json:"nvram,omitempty"`
	TPM   []byte `json:"tpm,omitempty"`
}

// None reports that the guest has none.
func (s State) None() bool { return s.NVRAM == nil && s.TPM == nil }

type file struct {
	Version int `json:"version"`
	State
}

// Keep makes the state durable in place of an earlier promotion's. A guest that
// has none leaves no file.
func Keep(fsys fsx.FS, blobs []delta.Blob) (State, error) {
	f := file{Version: version}
	for _, b := range blobs {
		switch b.Kind {
		case delta.BlobNVRAM:
			f.NVRAM = b.Data
		case delta.BlobTPM:
			f.TPM = b.Data
		}
	}
	if f.None() {
		return f.State, Drop(fsys)
	}
	if err := fsx.WriteJSON(fsys, File, f); err != nil {
		return State{}, fmt.Errorf("keep the firmware state: %w", err)
	}
	return f.State, nil
}

// Kept returns what Keep was given last; nothing kept is the zero State.
func Kept(fsys fsx.FS) (State, error) {
	var f file
	err := fsx.ReadJSON(fsys, File, maxFile, &f)
	if errors.Is(err, fs.ErrNotExist) {
		return State{}, nil
	}
	if err == nil && f.Version != version {
		err = fmt.Errorf("it has version %d, this program knows %d", f.Version, version)
	}
	if err == nil && (f.None() || len(f.NVRAM) > delta.MaxNVRAM || len(f.TPM) > delta.MaxTPM) {
		err = errors.New("it holds no firmware state, or too much")
	}
	if err != nil {
		return State{}, fmt.Errorf("read the kept firmware state %s: %w; to start the guest without it, move that file away", File, err)
	}
	return f.State, nil
}

// Drop forgets the state, durably.
func Drop(fsys fsx.FS) error {
	err := fsys.Remove(File)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = fsys.SyncDir(".")
	}
	if err != nil {
		return fmt.Errorf("drop the kept firmware state: %w", err)
	}
	return nil
}
