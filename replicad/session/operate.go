package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// Deadlines of operations.
const (
	peerTimeout   = 30 * time.Second // a control call to the peer
	digestTimeout = 2 * time.Minute
	// stallTimeout ends a transfer whose body nobody reads, and one whose
	// answer does not come after the last byte: a commit syncs a disk.
	stallTimeout  = 45 * time.Second
	commitTimeout = 3 * time.Minute
)

// seedPiece bounds one seed transfer, so that pausing, progress and the durable
// cursor are never far away.
const seedPiece = 256 << 20

// advance is how much must have been sent for a broken transfer to count as
// progress (and the back-off to begin anew).
const advance = 1 << 20

// sideError says whose fault an error is.
type sideError struct {
	source bool
	err    error
}

func (e *sideError) Error() string { return e.err.Error() }
func (e *sideError) Unwrap() error { return e.err }

func fromSource(err error) error {
	if err == nil {
		return nil
	}
	return &sideError{source: true, err: err}
}

// operate runs one operation to its end. On an error the returned event is nil
// or an EvFailed with what is known of the transfer.
func (s *Session) operate(ctx context.Context, a Action) (Event, error) {
	switch a := a.(type) {
	case DoHandshake:
		return s.handshake(ctx, a)
	case DoMark:
		return s.mark(ctx, a.Decision)
	case DoSeed:
		return s.seed(ctx, a)
	case DoVerify:
		return s.verify(ctx, a)
	case DoFreeze:
		return s.freeze(ctx, a)
	case DoShip:
		return s.ship(ctx, a)
	case DoAck:
		if err := s.cfg.Source.Ack(ctx, a.Pos); err != nil {
			return nil, fromSource(err)
		}
		st, err := s.cfg.Source.Status(ctx)
		return EvAcked{st}, fromSource(err)
	case DoAbandon:
		return EvAbandoned{}, fromSource(s.cfg.Source.Abandon(ctx, a.Epoch))
	case DoBeat:
		ctx, cancel := context.WithTimeout(ctx, peerTimeout)
		defer cancel()
		return EvBeaten{}, s.cfg.Replica.Beat(ctx, wire.Beat{VM: s.cfg.VM, Pos: a.Pos, Interval: a.Interval})
	case DoScrub:
		return s.scrub(ctx, a)
	}
	return nil, fmt.Errorf("unknown operation %T", a)
}

// Perform runs one operation in the caller's goroutine and returns its end, for
// whoever steps a Machine without Run: the simulation, tests.
func (s *Session) Perform(ctx context.Context, a Action) Event {
	ev, err := s.operate(ctx, a)
	if err != nil {
		return s.failed(ctx, ev, err)
	}
	return ev
}

// failed turns an error into the event that names whose fault it is.
func (s *Session) failed(ctx context.Context, ev Event, err error) EvFailed {
	f, _ := ev.(EvFailed)
	f.Text = err.Error()
	f.Class = classify(err)
	var we *wire.Error
	if f.Class == ClassSuspect && errors.As(err, &we) {
		f.Text = we.Text // what to do is the condition's remedy
	}
	if ctx.Err() != nil && context.Cause(ctx) == context.Canceled {
		f.Class = ClassCancelled
	}
	return f
}

func classify(err error) Class {
	var side *sideError
	source := errors.As(err, &side) && side.source
	var we *wire.Error
	kind := wire.KindUnavailable
	if errors.As(err, &we) {
		kind = we.Kind
	}
	if source {
		switch kind {
		case wire.KindConflict, wire.KindInvalid:
			return ClassEpochLost
		case wire.KindCorrupt:
			return ClassCorrupt
		}
		return ClassSource
	}
	var pm *delta.PosMismatchError
	switch {
	case kind == wire.KindPosMismatch || errors.As(err, &pm):
		return ClassMismatch
	case kind == wire.KindCorrupt:
		return ClassCorrupt
	case kind == wire.KindSuspect:
		return ClassSuspect
	case kind == wire.KindNoSpace:
		return ClassNoSpace
	case kind == wire.KindRefused || kind == wire.KindDiverged || kind == wire.KindNotFound ||
		kind == wire.KindVersion || kind == wire.KindInvalid:
		return ClassRefused
	}
	return ClassLink
}

func (s *Session) handshake(ctx context.Context, a DoHandshake) (Event, error) {
	st, err := s.cfg.Source.Status(ctx)
	if err != nil {
		return nil, fromSource(err)
	}
	if !st.Tracker {
		return nil, fromSource(&wire.Error{Kind: wire.KindUnavailable, Text: "the data plane has no tracker yet", Hint: "replicactl vm enable " + s.cfg.Name})
	}
	req := wire.HandshakeRequest{
		VM: s.cfg.VM, Generation: st.Generation, Base: st.Base, Acked: st.Acked, Highest: st.Highest, Running: true,
		Compared: a.Compared, CommittedAt: a.At,
	}
	for _, d := range st.Disks {
		req.Disks = append(req.Disks, wire.Disk{Name: d.Name, Size: d.Size, Format: "raw"})
	}
	if e := st.Frozen; e != nil && e.Digest != nil {
		req.Known = append(req.Known, delta.Pos{Generation: e.Generation, Epoch: e.Epoch, Digest: *e.Digest})
	}
	if s.cfg.Complete != nil {
		s.cfg.Complete(&req)
	}
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	reply, err := s.cfg.Replica.Handshake(ctx, req)
	return EvHandshake{Request: req, Reply: reply, Source: st}, err
}

func (s *Session) mark(ctx context.Context, d lineage.Decision) (Event, error) {
	if d.Outcome == lineage.VerifyUnion && s.cfg.Union != nil {
		return EvMarked{}, s.cfg.Union(ctx, d)
	}
	return EvMarked{}, fromSource(s.cfg.Source.Mark(ctx, dataplane.MarkRequest{Pos: d.Parent, Reason: d.Reason}))
}

func (s *Session) freeze(ctx context.Context, a DoFreeze) (Event, error) {
	req := dataplane.FreezeRequest{Parent: a.Parent, Limits: a.Limits}
	if s.cfg.Describe != nil {
		req.Config = s.cfg.Describe()
	}
	e, why, err := s.cut(ctx, req, a.App)
	if err != nil {
		return nil, fromSource(err)
	}
	blobs := s.firmware(ctx)
	if len(blobs) > 0 && e.Empty {
		// Nothing but the firmware changed. It is read again after the cut
		// that carries it.
		req.Force = true
		if e, err = s.cfg.Source.Freeze(ctx, req); err != nil {
			return nil, fromSource(err)
		}
		blobs = s.firmware(ctx)
	}
	if len(blobs) == 0 {
		return EvFrozen{e, why}, nil
	}
	if err := s.cfg.Source.Attach(ctx, e.Epoch, blobs); err != nil {
		return nil, fromSource(err)
	}
	e.Blobs = true
	return EvFrozen{e, why}, nil
}

// cut makes a cut, with app between a freeze and a thaw of the guest's file
// systems. When that does not work the cut is crash-consistent, and why says so.
func (s *Session) cut(ctx context.Context, req dataplane.FreezeRequest, app bool) (e dataplane.Epoch, why string, err error) {
	if app && s.cfg.Quiesce != nil {
		var done bool
		if e, why, done, err = s.quietCut(ctx, req); done || err != nil {
			return e, "", err
		}
		if why != "" {
			s.log.Warn("this cut is crash-consistent only", "err", why)
		}
	}
	e, err = s.cfg.Source.Freeze(ctx, req)
	return e, why, err
}

// quietCut freezes, cuts and thaws. A cut during which the guest was thawed by
// somebody else is given back.
func (s *Session) quietCut(ctx context.Context, req dataplane.FreezeRequest) (e dataplane.Epoch, why string, done bool, err error) {
	thaw, err := s.cfg.Quiesce(ctx)
	if err != nil {
		return e, err.Error(), false, nil
	}
	if thaw == nil {
		return e, "", false, nil
	}
	thawed := false
	defer func() {
		if !thawed { // a panic in between
			_, _ = thaw()
		}
	}()
	req.App = true
	e, err = s.cfg.Source.Freeze(ctx, req)
	held, terr := thaw()
	thawed = true
	switch {
	case err != nil:
		return e, "", false, err
	case terr == nil && held:
		return e, "", true, nil
	case terr != nil:
		why = "thaw the guest: " + terr.Error()
	default:
		why = "the guest thawed before the cut was made"
	}
	return e, why, false, s.cfg.Source.Abandon(ctx, e.Epoch)
}

// firmware is the changed firmware state. The disks are worth more than the
// boot order: when it cannot be read it is tried again with the next epoch.
func (s *Session) firmware(ctx context.Context) []delta.Blob {
	if s.cfg.Firmware == nil {
		return nil
	}
	blobs, err := s.cfg.Firmware(ctx)
	if err != nil {
		s.log.Warn("firmware state cannot be read", "err", err)
		return nil
	}
	return blobs
}

func (s *Session) ship(ctx context.Context, a DoShip) (Event, error) {
	key := a.Epoch.Key(s.cfg.VM)
	var from uint32
	if a.Resume {
		var err error
		if from, err = s.progress(ctx, key); err != nil {
			return nil, err
		}
	}
	frames, err := s.cfg.Source.Frames(ctx, a.Epoch.Epoch, from)
	if err != nil {
		return nil, fromSource(err)
	}
	total := a.Epoch.Bytes
	s.track("delta", "", int64(from)*delta.MaxRaw, total)
	var pos delta.Pos
	b, err := s.transfer(ctx, frames, func(ctx context.Context, r io.Reader) (err error) {
		pos, err = s.cfg.Replica.PutEpoch(ctx, key, from, r)
		return err
	})
	if err != nil {
		return EvFailed{Sent: b, From: from, Advanced: b >= advance}, err
	}
	if pos.Generation != key.Generation || pos.Epoch != key.Epoch {
		return EvFailed{Sent: b}, &wire.Error{Kind: wire.KindCorrupt, Text: fmt.Sprintf("the replica answers with position %v to epoch %d", pos, key.Epoch)}
	}
	return EvShipped{Pos: pos, Sent: b, From: from}, nil
}

func (s *Session) progress(ctx context.Context, key wire.EpochKey) (uint32, error) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	return s.cfg.Replica.EpochProgress(ctx, key)
}

func (s *Session) seed(ctx context.Context, a DoSeed) (Event, error) {
	frames, err := s.cfg.Source.SeedFrames(ctx, dataplane.SeedRequest{
		Disk: a.Disk, Offset: a.Offset, Max: seedPiece, Holes: a.Holes,
	})
	if err != nil {
		return nil, fromSource(err)
	}
	s.track("seed", a.Disk, a.Done, a.Total)
	var reply wire.SeedReply
	b, err := s.transfer(ctx, frames, func(ctx context.Context, r io.Reader) (err error) {
		reply, err = s.cfg.Replica.PutSeed(ctx, wire.SeedRequest{
			VM: s.cfg.VM, Generation: a.Generation, Disk: a.Disk, Offset: a.Offset,
		}, r)
		return err
	})
	if err != nil {
		return EvFailed{Sent: b, Advanced: b >= advance}, err
	}
	return EvSeeded{Disk: a.Disk, Cursor: reply.Cursor, Sent: b}, nil
}

// transfer hands a body to put and returns the bytes that went. It ends when
// nobody reads the body for stallTimeout, or when the answer does not come
// within commitTimeout of its end. An error of the body itself is the source's.
func (s *Session) transfer(ctx context.Context, frames io.ReadCloser, put func(context.Context, io.Reader) error) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	b := &body{r: frames, s: s}
	b.stall = time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	defer b.stall.Stop()
	var r io.Reader = b
	if s.cfg.Limit != nil {
		r = s.cfg.Limit(ctx, b)
	}
	err := put(ctx, r)
	// Before the body is closed: whoever carried it may still be reading, and
	// what the close does to that read is not the source's fault.
	n, src := b.result()
	_ = frames.Close() // reading only; the reply decides
	switch {
	case err == nil:
		return n, nil
	case src != nil:
		return n, fromSource(src)
	case errors.Is(context.Cause(ctx), errStalled):
		return n, errStalled
	}
	return n, err
}

var errStalled = errors.New("the transfer stands still")

// body counts what is read, watches for a stall and remembers the source's error.
type body struct {
	r     io.Reader
	s     *Session
	stall *time.Timer

	mu  sync.Mutex
	n   int64 // guarded by mu
	err error // guarded by mu
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.mu.Lock()
	b.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	b.mu.Unlock()
	if errors.Is(err, io.EOF) {
		b.stall.Reset(commitTimeout)
	} else {
		b.stall.Reset(stallTimeout)
	}
	b.s.sent(int64(n))
	return n, err
}

func (b *body) result() (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.n, b.err
}

// sent moves the progress of a delta, whose size on the wire is not known
// before: an estimate that ends where it should.
func (s *Session) sent(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.prog.Phase != "" {
		s.prog.Done = min(s.prog.Done+n, s.prog.Total)
	}
}
