// Package breakglass keeps the mark that a virtual machine was taken out of
// the daemon's hands: its domain was given its own disks back, and what its
// guest writes there is seen by nobody.
//
// The mark is durable before anything else of a release happens, and goes away
// only after everything was marked for comparison. Its presence alone counts:
// one that cannot be read is a mark. Callers are the offline tool, which writes
// it, and the daemon, which must not believe a tracker while it is there.
package breakglass

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"kvmreplica/internal/fsx"
)

// File is the mark's name in a VM's state directory.
const File = "released.json"

const (
	markVersion = 1
	maxMark     = 64 << 10
)

// Mark says who released the VM and when; for people, its presence decides.
type Mark struct {
	Version int       `json:"version"`
	At      time.Time `json:"at"`
	By      string    `json:"by"`
	// Recovered: this host kept a replica, which was promoted offline before.
	Recovered bool `json:"recovered,omitempty"`
}

// Set makes the mark durable.
func Set(fsys fsx.FS, m Mark) error {
	m.Version = markVersion
	if err := fsx.WriteJSON(fsys, File, m); err != nil {
		return fmt.Errorf("mark the VM as released: %w", err)
	}
	return nil
}

// Read returns the mark and whether there is one. One that cannot be read, or
// is damaged, counts.
func Read(fsys fsx.FS) (Mark, bool) {
	m, there, err := Look(fsys)
	if err != nil {
		return unreadable(err), true
	}
	return m, there
}

// Look is Read for who can look again: the error says that the system failed
// to answer, which may pass.
func Look(fsys fsx.FS) (Mark, bool, error) {
	m := Mark{}
	err := fsx.ReadJSON(fsys, File, maxMark, &m)
	var sys syscall.Errno
	switch {
	case err == nil:
		return m, true, nil
	case errors.Is(err, fs.ErrNotExist):
		return Mark{}, false, nil
	case errors.As(err, &sys):
		return Mark{}, false, err
	}
	return unreadable(err), true, nil
}

func unreadable(err error) Mark {
	return Mark{By: "somebody (the mark cannot be read: " + err.Error() + ")"}
}

// Clear takes the mark away, durably.
func Clear(fsys fsx.FS) error {
	err := fsys.Remove(File)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = fsys.SyncDir(".")
	}
	if err != nil {
		return fmt.Errorf("take the mark of a released VM away: %w", err)
	}
	return nil
}
