package delta

import (
	"fmt"
	"io"
	"time"
)

type stage uint8

const (
	stageHeader stage = iota
	stageChunks
	stageDone
	stageFailed
)

// Encoder writes one stream: Header, then Chunk for every chunk from the first
// one wanted, then Manifest (not for a seed). Calls out of order are refused;
// after an error the stream is dead. It does not buffer: one Write per frame.
type Encoder struct {
	w     io.Writer
	tally *Tally
	head  Header
	next  uint32
	stage stage
}

// NewEncoder writes to w and counts in tally, which belongs to the epoch, not
// to the stream: pass the same one when the epoch is sent again. nil means a
// fresh one.
func NewEncoder(w io.Writer, tally *Tally) *Encoder {
	if tally == nil {
		tally = new(Tally)
	}
	return &Encoder{w: w, tally: tally}
}

func (e *Encoder) write(b []byte) error {
	if _, err := e.w.Write(b); err != nil {
		e.stage = stageFailed
		return err
	}
	return nil
}

func (e *Encoder) due(s stage, what string) error {
	if e.stage != s {
		return fmt.Errorf("encode %s: %w", what, ErrOrder)
	}
	return nil
}

// Header writes the header; the next chunk must be number from, which may not
// exceed the chunks counted in earlier attempts.
func (e *Encoder) Header(h Header, from uint32) error {
	if err := e.due(stageHeader, "header"); err != nil {
		return err
	}
	if from > e.tally.Len() {
		return fmt.Errorf("resume at chunk %d, only %d were encoded: %w", from, e.tally.Len(), ErrOrder)
	}
	b, err := h.AppendFrame(nil)
	if err != nil {
		return err
	}
	e.head, e.next, e.stage = h, from, stageChunks
	return e.write(b)
}

// Chunk writes one chunk; they come in order without gaps.
func (e *Encoder) Chunk(c Encoded) error {
	if err := e.due(stageChunks, "chunk"); err != nil {
		return err
	}
	if c.Index != e.next {
		return fmt.Errorf("encode chunk %d where %d is due: %w", c.Index, e.next, ErrOrder)
	}
	if err := e.tally.Add(c.Index, c.Digest, c.Covered); err != nil {
		e.stage = stageFailed
		return err
	}
	e.next++
	return e.write(c.Frame)
}

// ManifestInfo is what the manifest says besides the chunks.
type ManifestInfo struct {
	Config   Digest
	Cut      time.Time // for display only
	App      bool      // cut while the guest's file systems were frozen
	Firmware []Blob    // only what changed, NVRAM before TPM
}

// Manifest ends the stream and returns the position that the receiver must
// answer with.
func (e *Encoder) Manifest(info ManifestInfo) (Pos, error) {
	if err := e.due(stageChunks, "manifest"); err != nil {
		return Pos{}, err
	}
	if e.head.Seed || e.next != e.tally.Len() {
		return Pos{}, fmt.Errorf("encode manifest after chunk %d of %d: %w", e.next, e.tally.Len(), ErrOrder)
	}
	m := NewManifest(&e.head, e.tally, info)
	b, err := m.AppendFrame(nil)
	if err != nil {
		return Pos{}, err
	}
	e.stage = stageDone
	return m.Pos(), e.write(b)
}

// NewManifest builds the manifest of the epoch that h opened and t counted.
func NewManifest(h *Header, t *Tally, info ManifestInfo) Manifest {
	m := Manifest{
		VM: h.VM, Generation: h.Generation, Epoch: h.Epoch, Nonce: h.Nonce, Parent: h.Parent, Header: h.Digest(),
		Chunks: t.Len(), Covered: t.Covered(), Total: t.Total(), App: info.App, Config: info.Config, Cut: info.Cut, Firmware: info.Firmware,
	}
	for _, d := range h.Disks {
		m.Sizes = append(m.Sizes, d.Size)
	}
	return m
}
