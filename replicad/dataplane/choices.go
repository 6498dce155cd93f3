package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"sync"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/wire"
)

// choicesFile is what was decided through the control socket and must survive
// a restart of the process and of the host.
const choicesFile = "choices.json"

// choices are the durable decisions.
type choices struct {
	Version int `json:"version"`
	// Exported disks are opened again at every start.
	Exported map[wire.DiskName]bool `json:"exported,omitempty"`
	// QemuLock overrides the configuration.
	QemuLock map[wire.DiskName]bool `json:"qemu_lock,omitempty"`
	// Refuse keeps every export closed.
	Refuse string `json:"refuse,omitempty"`
}

func (c choices) clone() choices {
	c.Exported, c.QemuLock = maps.Clone(c.Exported), maps.Clone(c.QemuLock)
	if c.Exported == nil {
		c.Exported = map[wire.DiskName]bool{}
	}
	if c.QemuLock == nil {
		c.QemuLock = map[wire.DiskName]bool{}
	}
	return c
}

// choiceStore keeps them: memory never says what the disk does not.
type choiceStore struct {
	fs fsx.FS

	mu  sync.Mutex
	now choices // guarded by mu
}

func openChoices(f fsx.FS) (*choiceStore, error) {
	s := &choiceStore{fs: f, now: choices{Version: 1}}
	err := fsx.ReadJSON(f, choicesFile, maxConfig, &s.now)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", choicesFile, err)
	}
	if s.now.Version != 1 {
		return nil, fmt.Errorf("%s has version %d, this build reads 1", choicesFile, s.now.Version)
	}
	return s, nil
}

func (s *choiceStore) get() choices {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now.clone()
}

// change makes a decision durable before it counts.
func (s *choiceStore) change(edit func(*choices)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.now.clone()
	edit(&next)
	if err := fsx.WriteJSON(s.fs, choicesFile, next); err != nil {
		return fmt.Errorf("record the decision: %w", err)
	}
	s.now = next
	return nil
}
