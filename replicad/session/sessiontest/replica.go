// Package sessiontest joins a session to a real replica store without a network
// between them, for tests.
package sessiontest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// Replica answers a session from a points.Store as the daemon's replica role
// does.
type Replica struct {
	// Get returns the open store, or why there is none.
	Get func() (*points.Store, error)
	// Generation is claimed while the store is seeding.
	Generation delta.Generation

	commits, hashed atomic.Int64
}

var _ session.Replica = (*Replica)(nil)

// Commits is the number of epochs received to their end.
func (r *Replica) Commits() int64 { return r.commits.Load() }

// Hashed is the number of bytes compared by digest.
func (r *Replica) Hashed() int64 { return r.hashed.Load() }

func mapped(err error) error {
	var pm *delta.PosMismatchError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &pm):
		return &wire.Error{Kind: wire.KindPosMismatch, Text: err.Error(), Have: &pm.Have}
	case errors.Is(err, delta.ErrChecksum), errors.Is(err, delta.ErrFormat):
		return &wire.Error{Kind: wire.KindCorrupt, Text: err.Error()}
	}
	return err
}

// asked names the store's wish to have everything compared.
const asked = 1

// Handshake says where the store stands.
func (r *Replica) Handshake(_ context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	s, err := r.Get()
	if err != nil {
		return wire.HandshakeReply{}, err
	}
	st := s.Status()
	if st.State == points.Replica && st.VerifyAll != "" && q.Compared == asked && q.CommittedAt == st.Committed {
		if err := s.Verified(); err != nil {
			return wire.HandshakeReply{}, err
		}
		st = s.Status()
	}
	h := wire.HandshakeReply{VM: q.VM, Role: "replica", Generation: r.Generation, VerifyAll: st.VerifyAll}
	if st.State == points.Seeding {
		h.Seeding = map[wire.DiskName]int64{}
		for d, c := range st.Seeded {
			h.Seeding[wire.DiskName(d)] = c
		}
		return h, nil
	}
	h.Committed, h.Generation = st.Committed, st.Committed.Generation
	h.Sizes = map[wire.DiskName]int64{}
	for _, d := range st.Disks {
		h.Sizes[wire.DiskName(d.Name)] = d.Size
	}
	if st.VerifyAll != "" {
		h.Asked = asked
	}
	return h, nil
}

// PutSeed takes seed chunks in.
func (r *Replica) PutSeed(_ context.Context, q wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	s, err := r.Get()
	if err != nil {
		return wire.SeedReply{}, err
	}
	d := delta.NewDecoder(body)
	h, err := d.Header()
	for err == nil {
		var frame []byte
		if frame, _, err = d.Next(); err == nil {
			err = s.SeedChunk(&h, frame)
		}
	}
	if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	cursors, ferr := s.SeedFlush()
	return wire.SeedReply{Cursor: cursors[string(q.Disk)]}, mapped(errors.Join(err, ferr))
}

// EpochProgress says how much of an epoch is there.
func (r *Replica) EpochProgress(_ context.Context, k wire.EpochKey) (uint32, error) {
	s, err := r.Get()
	if err != nil {
		return 0, err
	}
	return s.Progress(k.Generation, k.Epoch, k.Nonce), nil
}

// PutEpoch receives and commits an epoch.
func (r *Replica) PutEpoch(ctx context.Context, _ wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	s, err := r.Get()
	if err != nil {
		return delta.Pos{}, err
	}
	d := delta.NewDecoder(body)
	h, err := d.Header()
	if err != nil {
		return delta.Pos{}, mapped(err)
	}
	rcv, err := s.Begin(h)
	if err != nil {
		return delta.Pos{}, mapped(err)
	}
	if n := rcv.Next(); n != from {
		return delta.Pos{}, fmt.Errorf("stream from chunk %d, want %d", from, n)
	}
	p, err := rcv.Stream(ctx, d)
	if err != nil {
		return p, mapped(err)
	}
	r.commits.Add(1)
	return p, nil
}

// Beat takes note of an empty cut.
func (r *Replica) Beat(_ context.Context, b wire.Beat) error {
	s, err := r.Get()
	if err != nil {
		return err
	}
	if have := s.Committed(); have != b.Pos {
		return &wire.Error{Kind: wire.KindPosMismatch, Text: "beat elsewhere", Have: &have}
	}
	return nil
}

// Digests hashes the committed content.
func (r *Replica) Digests(ctx context.Context, q wire.DigestRequest) (wire.DigestReply, error) {
	s, err := r.Get()
	if err != nil {
		return wire.DigestReply{}, err
	}
	rs := make([]block.Range, len(q.Ranges))
	for i, x := range q.Ranges {
		rs[i] = block.Range{Off: x.Off, Len: x.Len}
		r.hashed.Add(x.Len)
	}
	ds, err := s.Digests(ctx, q.Pos, string(q.Disk), q.Key, rs)
	return wire.DigestReply{Digests: ds}, mapped(err)
}
