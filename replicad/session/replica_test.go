package session_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// replica is a host that keeps one VM in a real store, without a network.
type replica struct {
	t     testing.TB
	fs    *fsxtest.Mem
	bases map[string]*block.Mem
	gen   delta.Generation

	mu      sync.Mutex
	store   *points.Store // guarded by mu; nil while down
	commits int           // guarded by mu
	digests int64         // guarded by mu; bytes hashed
}

var _ session.Replica = (*replica)(nil)

// kept is a base whose Close leaves it usable for the next run of the store.
type kept struct{ block.Device }

func (kept) Close() error { return nil }

func (r *replica) config() points.Config {
	vm, err := delta.ParseVM(string(dt.ID))
	if err != nil {
		r.t.Fatal(err)
	}
	return points.Config{FS: r.fs, VM: vm, Bases: func(disk string, size int64) (block.Device, error) {
		if r.bases[disk] == nil {
			r.bases[disk] = block.NewMem(size)
		}
		return kept{r.bases[disk]}, nil
	}}
}

func newReplica(t testing.TB, gen delta.Generation, disks ...delta.Disk) *replica {
	t.Helper()
	r := &replica{t: t, fs: fsxtest.NewMem(), bases: map[string]*block.Mem{}, gen: gen}
	s, err := points.Create(r.config(), disks)
	if err != nil {
		t.Fatal(err)
	}
	r.store = s
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *replica) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.store == nil {
		return
	}
	if err := r.store.Close(); err != nil {
		r.t.Error(err)
	}
	r.store = nil
}

// restart ends the store and opens it again, as a new process would.
func (r *replica) restart() {
	r.t.Helper()
	r.stop()
	s, err := points.Open(r.config())
	if err != nil {
		r.t.Error(err)
		return
	}
	r.mu.Lock()
	r.store = s
	r.mu.Unlock()
}

var errDown = &wire.Error{Kind: wire.KindUnavailable, Text: "the host is down"}

func (r *replica) get() (*points.Store, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.store == nil {
		return nil, errDown
	}
	return r.store, nil
}

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

func (r *replica) Handshake(_ context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	s, err := r.get()
	if err != nil {
		return wire.HandshakeReply{}, err
	}
	st := s.Status()
	h := wire.HandshakeReply{VM: q.VM, Role: "replica", Generation: r.gen, VerifyAll: st.VerifyAll}
	if st.State == points.Seeding {
		h.Seeding = map[wire.DiskName]int64{}
		for d, c := range st.Seeded {
			h.Seeding[wire.DiskName(d)] = c
		}
		return h, nil
	}
	h.Committed, h.Generation = st.Committed, st.Committed.Generation
	return h, nil
}

func (r *replica) PutSeed(_ context.Context, q wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	s, err := r.get()
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

func (r *replica) EpochProgress(_ context.Context, k wire.EpochKey) (uint32, error) {
	s, err := r.get()
	if err != nil {
		return 0, err
	}
	return s.Progress(k.Generation, k.Epoch, k.Nonce), nil
}

func (r *replica) PutEpoch(ctx context.Context, _ wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	s, err := r.get()
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
	r.mu.Lock()
	r.commits++
	r.mu.Unlock()
	return p, nil
}

func (r *replica) Beat(_ context.Context, b wire.Beat) error {
	s, err := r.get()
	if err != nil {
		return err
	}
	if have := s.Committed(); have != b.Pos {
		return &wire.Error{Kind: wire.KindPosMismatch, Text: "beat elsewhere", Have: &have}
	}
	return nil
}

func (r *replica) Digests(ctx context.Context, q wire.DigestRequest) (wire.DigestReply, error) {
	s, err := r.get()
	if err != nil {
		return wire.DigestReply{}, err
	}
	rs := make([]block.Range, len(q.Ranges))
	for i, x := range q.Ranges {
		rs[i] = block.Range{Off: x.Off, Len: x.Len}
		r.mu.Lock()
		r.digests += x.Len
		r.mu.Unlock()
	}
	ds, err := s.Digests(ctx, q.Pos, string(q.Disk), q.Key, rs)
	return wire.DigestReply{Digests: ds}, mapped(err)
}

// counted is how many epochs were committed and how many bytes were hashed.
func (r *replica) counted() (commits int, digests int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.commits, r.digests
}

// content reads a disk at the committed position.
func (r *replica) content(disk string) []byte {
	r.t.Helper()
	s, err := r.get()
	if err != nil {
		r.t.Fatal(err)
	}
	v, err := s.View(s.Committed())
	if err != nil {
		r.t.Fatal(err)
	}
	defer v.Close()
	d, err := v.Disk(disk)
	if err != nil {
		r.t.Fatal(err)
	}
	return dt.Content(r.t, d)
}

// line is a network that fails on command. Every field's zero value is a good
// line.
type line struct {
	session.Replica
	mu sync.Mutex
	// cut, if not nil, says after how many bytes the n-th bulk transfer breaks;
	// negative: it does not.
	cut func(n int) int64
	// loseReply, if not nil, says whether the answer to the n-th transfer is
	// lost although the other side did its work.
	loseReply func(n int) bool
	// after runs after the n-th transfer.
	after func(n int)
	n     int
	bytes int64 // carried; guarded by mu
}

var errCut = errors.New("connection reset")

// cutReader ends with an error after left bytes.
type cutReader struct {
	r    io.Reader
	l    *line
	left int64 // negative = no limit
}

func (c *cutReader) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, errCut
	}
	if c.left > 0 && int64(len(p)) > c.left {
		p = p[:c.left]
	}
	n, err := c.r.Read(p)
	if c.left > 0 {
		c.left -= int64(n)
	}
	c.l.mu.Lock()
	c.l.bytes += int64(n)
	c.l.mu.Unlock()
	return n, err
}

// carried is how many bytes went over the line; it counts on from n.
func (l *line) carried(n int64) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.bytes
	l.bytes = n
	return was
}

func (l *line) begin(body io.Reader) (int, *cutReader) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.n
	l.n++
	c := &cutReader{r: body, l: l, left: -1}
	if l.cut != nil {
		c.left = l.cut(n)
	}
	return n, c
}

func (l *line) end(n int, err error) error {
	if err == nil && l.loseReply != nil && l.loseReply(n) {
		err = errCut
	}
	if l.after != nil {
		l.after(n)
	}
	return err
}

func (l *line) PutSeed(ctx context.Context, q wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	n, c := l.begin(body)
	a, err := l.Replica.PutSeed(ctx, q, c)
	return a, l.end(n, err)
}

func (l *line) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	n, c := l.begin(body)
	p, err := l.Replica.PutEpoch(ctx, k, from, c)
	return p, l.end(n, err)
}
