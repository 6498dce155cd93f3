package dataplane

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"sync"

	"golang.org/x/sync/errgroup"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// frozen is the one epoch that is held. Its tally outlives streams: a chunk is
// digested once and the digest is what Ack is compared with.
type frozen struct {
	cut  *cbt.Epoch
	head delta.Header
	info Epoch // Digest and Lost are filled in by snapshot

	// stream is held by the one stream that runs; cancel ends it.
	stream1 sync.Mutex
	tally   delta.Tally // guarded by stream1
	blobs   []delta.Blob
	config  delta.Digest

	mu      sync.Mutex
	cancel  context.CancelFunc // guarded by mu; nil when none streams
	started bool               // guarded by mu: a stream was asked for
	ended   bool               // guarded by mu
	pos     delta.Pos          // guarded by mu; zero until the manifest was made
	made    uint32             // guarded by mu; chunks counted in tally
}

// freeze cuts, unless an epoch is held already.
func (p *Plane) freeze(ctx context.Context, r FreezeRequest) (Epoch, error) {
	g, err := p.tracker()
	if err != nil {
		return Epoch{}, err
	}
	p.epochMu.Lock()
	defer p.epochMu.Unlock()
	if f := p.held.Load(); f != nil {
		return Epoch{}, &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("epoch %d is held already", f.info.Epoch)}
	}
	if !r.Parent.IsZero() && r.Parent.Digest == (delta.Digest{}) {
		return Epoch{}, invalid("the parent position has no digest")
	}
	if err := p.adopt(g, r.Parent); err != nil {
		return Epoch{}, err
	}
	limits, err := p.limits(r.Limits)
	if err != nil {
		return Epoch{}, err
	}
	at := p.parts.now()
	var cut *cbt.Epoch
	// The first epoch of a generation is one even when nothing changed: a
	// generation without a position of its own could not be sealed or promoted.
	if r.Force || r.App || r.Parent.IsZero() || r.Parent.Generation != g.Generation() {
		cut, err = g.FreezeForced(ctx)
	} else {
		cut, err = g.Freeze(ctx)
	}
	if err != nil {
		return Epoch{}, err
	}
	if err := keepBack(cut, limits); err != nil {
		return Epoch{}, fmt.Errorf("freeze: %w", joinAbandon(err, cut))
	}
	info := Epoch{
		Epoch: cut.Number(), Generation: cut.Generation(), Parent: r.Parent, Cut: at,
		Bytes: cut.DirtyBytes(), Empty: cut.Empty(), Nonce: nonce(), App: r.App, Limits: limits,
	}
	if info.Empty {
		return info, nil
	}
	f := &frozen{cut: cut, info: info, config: r.Config, head: p.header(limits)}
	f.head.Generation, f.head.Epoch, f.head.Nonce, f.head.Parent = info.Generation, info.Epoch, info.Nonce, info.Parent
	if err := f.head.Validate(); err != nil {
		return Epoch{}, fmt.Errorf("freeze on parent %v: %w", r.Parent, joinAbandon(err, cut))
	}
	p.held.Store(f)
	return info, nil
}

// adopt makes the replica's position the tracker's acknowledged one: after an
// ack that was lost. Nothing becomes clean by it.
func (p *Plane) adopt(g *cbt.Group, pos delta.Pos) error {
	if pos.IsZero() || deltaPos(g.Status().Acked) == pos {
		return nil
	}
	err := g.Adopt(cbtPos(pos))
	if errors.Is(err, cbt.ErrLostBase) {
		// The handshake could not know: what was cleared since is lost, too.
		return g.Rebase(cbtPos(pos), err.Error())
	}
	return err
}

func joinAbandon(err error, cut *cbt.Epoch) error {
	if aerr := cut.Abandon(); aerr != nil {
		return fmt.Errorf("%w (and: %w)", err, aerr)
	}
	return err
}

func nonce() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:]) | 1
}

// snapshot is what status tells of the epoch.
func (f *frozen) snapshot() Epoch {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.info
	e.Blobs = len(f.blobs) > 0
	if !f.pos.IsZero() {
		d := f.pos.Digest
		e.Digest = &d
	}
	if err := f.cut.Err(); err != nil {
		e.Lost = err.Error()
	}
	return e
}

// attach adds firmware state before anything was streamed.
func (p *Plane) attach(epoch uint64, blobs []delta.Blob) error {
	f, err := p.frozenEpoch(epoch, 0)
	if err != nil {
		return err
	}
	for _, b := range blobs {
		if (b.Kind == delta.BlobNVRAM && len(b.Data) > delta.MaxNVRAM) || (b.Kind == delta.BlobTPM && len(b.Data) > delta.MaxTPM) ||
			(b.Kind != delta.BlobNVRAM && b.Kind != delta.BlobTPM) {
			return invalid("firmware state %v of %d bytes", b.Kind, len(b.Data))
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.started {
		return &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("epoch %d is being shipped already", epoch)}
	}
	f.blobs = blobs
	return nil
}

// frozenEpoch returns the held epoch if it has that number and can be streamed
// from that chunk.
func (p *Plane) frozenEpoch(epoch uint64, from uint32) (*frozen, error) {
	f := p.held.Load()
	if f == nil || f.info.Epoch != epoch {
		return nil, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("epoch %d is not held here", epoch)}
	}
	if err := f.cut.Err(); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if from > f.made {
		return nil, invalid("epoch %d was encoded up to chunk %d, not %d", epoch, f.made, from)
	}
	return f, nil
}

// stream writes the epoch from chunk from on. A newer stream ends an older one.
func (f *frozen) stream(ctx context.Context, w *streamWriter, from uint32) error {
	ctx, err := f.enter(ctx)
	if err != nil {
		return err
	}
	defer f.leave()
	defer context.AfterFunc(ctx, w.interrupt)() // stopped before leave ends ctx
	f.release(from)
	enc := delta.NewEncoder(w, &f.tally)
	if err := enc.Header(f.head, from); err != nil {
		return err
	}
	if err := f.chunks(ctx, enc, from); err != nil {
		return err
	}
	pos, err := enc.Manifest(delta.ManifestInfo{Config: f.config, Cut: f.info.Cut, App: f.info.App, Firmware: f.blobs})
	if pos.IsZero() {
		return err
	}
	f.mu.Lock()
	f.pos = pos // known even if the last bytes did not get through
	f.mu.Unlock()
	return err
}

// release gives up what chunks before from took of the capture memory when that
// runs short: the replica has verified them. Should it lose them again, the
// epoch is lost.
func (f *frozen) release(from uint32) {
	if from == 0 || !f.cut.Pressed() {
		return
	}
	for spec, err := range delta.Plan(f.head.Disks, f.ranges) {
		if err != nil || spec.Index >= from {
			return
		}
		for _, r := range spec.Ranges {
			f.cut.Release(f.head.Disks[spec.Disk].Name, r)
		}
	}
}

// enter ends the stream that runs and takes its place.
func (f *frozen) enter(ctx context.Context) (context.Context, error) {
	f.mu.Lock()
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Unlock()
	f.stream1.Lock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		f.stream1.Unlock()
		return nil, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("epoch %d is not held any more", f.info.Epoch)}
	}
	ctx, f.cancel = context.WithCancel(ctx)
	f.started = true
	return ctx, nil
}

func (f *frozen) leave() {
	f.mu.Lock()
	f.cancel()
	f.cancel = nil
	f.mu.Unlock()
	f.stream1.Unlock()
}

// pipeline is how many chunks are in the making: one being written, one
// waiting, one being read and compressed.
const pipeline = 3

// chunks encodes ahead of the writer. Encoders are used in turn, so that a
// frame stays valid until pipeline-1 more were encoded.
func (f *frozen) chunks(ctx context.Context, enc *delta.Encoder, from uint32) error {
	var encs [pipeline]*delta.ChunkEncoder
	for i := range encs {
		var err error
		if encs[i], err = delta.NewChunkEncoder(delta.ChunkOptions{Discard: true}); err != nil {
			return err
		}
	}
	out := make(chan delta.Encoded, 1)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(out)
		n := 0
		for spec, err := range delta.Plan(f.head.Disks, f.ranges) {
			if err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if spec.Index < from {
				continue
			}
			c, err := encs[n%pipeline].Encode(spec, f.read(ctx))
			if err != nil {
				return err
			}
			n++
			select {
			case out <- c:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return f.cut.Err()
	})
	g.Go(func() error {
		for c := range out {
			if err := enc.Chunk(c); err != nil {
				return err
			}
			f.mu.Lock()
			f.made = max(f.made, c.Index+1)
			f.mu.Unlock()
		}
		return nil
	})
	return g.Wait()
}

func (f *frozen) ranges(disk int) iter.Seq[block.Range] { return f.cut.Ranges(f.head.Disks[disk].Name) }

func (f *frozen) read(ctx context.Context) delta.ReadFunc {
	return func(disk uint16, p []byte, off int64) (int, error) {
		return f.cut.ReadAt(ctx, f.head.Disks[disk].Name, p, off)
	}
}

// end makes sure that no stream runs and none starts.
func (f *frozen) end() {
	f.mu.Lock()
	f.ended = true
	if f.cancel != nil {
		f.cancel()
	}
	f.mu.Unlock()
	f.stream1.Lock() // waits for the stream to leave
	defer f.stream1.Unlock()
	f.blobs = nil
}

// ack ends the epoch as shipped. Only a digest made here is taken (I7).
func (p *Plane) ack(pos delta.Pos) error {
	g, err := p.tracker()
	if err != nil {
		return err
	}
	p.epochMu.Lock()
	defer p.epochMu.Unlock()
	f := p.held.Load()
	if f == nil || f.info.Epoch != pos.Epoch || f.info.Generation != pos.Generation {
		if deltaPos(g.Status().Acked) == pos {
			return nil
		}
		return &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("epoch %d is not held here", pos.Epoch)}
	}
	f.mu.Lock()
	own := f.pos
	f.mu.Unlock()
	switch {
	case own.IsZero():
		return &wire.Error{Kind: wire.KindCorrupt, Text: fmt.Sprintf("epoch %d was never encoded to its end, the replica cannot hold it", pos.Epoch)}
	case own != pos:
		return &wire.Error{Kind: wire.KindCorrupt, Text: fmt.Sprintf("the replica holds %v, the epoch shipped is %v", pos, own)}
	}
	f.end()
	if err := f.cut.Ack(cbtPos(pos)); err != nil {
		return err
	}
	p.held.Store(nil)
	return nil
}

// abandon ends the epoch unshipped; one that is not held is ended already.
func (p *Plane) abandon(epoch uint64) error {
	p.epochMu.Lock()
	defer p.epochMu.Unlock()
	f := p.held.Load()
	if f == nil || f.info.Epoch != epoch {
		return nil
	}
	f.end()
	if err := f.cut.Abandon(); err != nil {
		return err
	}
	p.held.Store(nil)
	return nil
}
