package points

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// fwDir holds firmware blobs named by their digest. A blob is in place before
// anything durable refers to it, and removed once nothing does.
const fwDir = "firmware"

func blobName(d delta.Digest) string { return fwDir + "/" + d.String() }

// storeFirmware puts the blobs that the state m refers to in place.
func (s *Store) storeFirmware(todo []*epoch, m mark) error {
	for _, want := range []delta.Digest{m.nvram, m.tpm} {
		if want.IsZero() || want == s.sup.applied.nvram || want == s.sup.applied.tpm {
			continue
		}
		for i := len(todo) - 1; i >= 0; i-- {
			data, err := blobOf(todo[i], want)
			if err != nil {
				return err
			}
			if data == nil {
				continue
			}
			if err := fsx.WriteAtomic(s.cfg.FS, blobName(want), data); err != nil {
				return noSpace("store firmware state", err)
			}
			break
		}
	}
	return nil
}

// blobOf reads a blob from an epoch's manifest, nil if it is not there.
func blobOf(e *epoch, want delta.Digest) ([]byte, error) {
	frame := make([]byte, e.manifest.len)
	if err := e.slot.readFrame(frame, e.manifest.off); err != nil {
		return nil, err
	}
	m, err := delta.ParseManifest(frame)
	if err == nil && m.Pos() != e.mark.pos {
		err = delta.ErrChecksum
	}
	if err != nil {
		return nil, &DamageError{File: slotName(e.slot.number), Text: err.Error()}
	}
	for _, b := range m.Firmware {
		if b.Digest() == want {
			return append([]byte{}, b.Data...), nil
		}
	}
	return nil, nil
}

// Firmware is the firmware state at pos, a point's or the committed one;
// empty when the VM has none.
func (s *Store) Firmware(pos delta.Pos) ([]delta.Blob, error) {
	s.mu.Lock()
	m, ok := s.markAt(pos)
	var layers []*epoch
	for _, e := range s.epochs {
		if e.ordinal <= m.ordinal {
			e.refs++
			layers = append(layers, e)
		}
	}
	s.mu.Unlock()
	defer s.unref(layers)
	if !ok {
		return nil, fmt.Errorf("firmware at %v: %w", pos, ErrNoPoint)
	}
	var out []delta.Blob
	for _, b := range []struct {
		kind delta.BlobKind
		want delta.Digest
	}{{delta.BlobNVRAM, m.nvram}, {delta.BlobTPM, m.tpm}} {
		if b.want.IsZero() {
			continue
		}
		data, err := s.blob(layers, b.want)
		if err != nil {
			return nil, fmt.Errorf("firmware at %v: %w", pos, err)
		}
		out = append(out, delta.Blob{Kind: b.kind, Data: data})
	}
	return out, nil
}

// blob finds a blob in the given spools or in its file, verified.
func (s *Store) blob(layers []*epoch, want delta.Digest) ([]byte, error) {
	for i := len(layers) - 1; i >= 0; i-- {
		if data, err := blobOf(layers[i], want); data != nil || err != nil {
			return data, err
		}
	}
	data, err := fsx.ReadFile(s.cfg.FS, blobName(want), delta.MaxTPM)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &DamageError{File: blobName(want), Text: "is missing"}
	}
	if err != nil {
		return nil, err
	}
	if (delta.Blob{Data: data}).Digest() != want {
		return nil, &DamageError{File: blobName(want), Text: "does not match its digest"}
	}
	return data, nil
}

// markAt finds the mark of a viewable state; s.mu is held.
func (s *Store) markAt(pos delta.Pos) (mark, bool) {
	if pos.IsZero() {
		return mark{}, false
	}
	if pos == s.committed.pos {
		return s.committed, true
	}
	if pos == s.sup.applied.pos {
		return s.sup.applied, true
	}
	for _, g := range s.segs {
		if g.start.pos == pos {
			return g.start, true
		}
	}
	return mark{}, false
}

// collectFirmware removes blobs that nothing refers to.
func (s *Store) collectFirmware() error {
	names, err := s.cfg.FS.List(fwDir)
	if err != nil {
		return fmt.Errorf("list firmware: %w", err)
	}
	s.mu.Lock()
	used := map[string]bool{}
	marks := []mark{s.sup.applied, s.committed}
	for _, g := range s.segs {
		marks = append(marks, g.start)
	}
	bad := len(s.damage) > 0
	for _, g := range s.segs {
		bad = bad || g.damage != nil
	}
	s.mu.Unlock()
	if bad {
		return nil // who knows what the unreadable files refer to
	}
	for _, m := range marks {
		used[m.nvram.String()], used[m.tpm.String()] = true, true
	}
	for _, n := range names {
		if used[strings.TrimSuffix(n, fsx.TempSuffix)] && !strings.HasSuffix(n, fsx.TempSuffix) {
			continue
		}
		if err := s.cfg.FS.Remove(fwDir + "/" + n); err != nil {
			return fmt.Errorf("remove firmware state: %w", err)
		}
	}
	return nil
}
