package session_test

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx/fsxtest"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/session/sessiontest"
	"kvmreplica/replicad/wire"
)

// replica is a host that keeps one VM in a real store, without a network.
type replica struct {
	t     testing.TB
	fs    *fsxtest.Mem
	bases map[string]*block.Mem

	*sessiontest.Replica

	mu    sync.Mutex
	store *points.Store // guarded by mu; nil while down
}

// kept is a base whose Close leaves it usable for the next run of the store.
type kept struct{ block.Device }

func (kept) Close() error { return nil }

func (r *replica) config() points.Config {
	vm, err := delta.ParseVM(string(dt.ID))
	if err != nil {
		r.t.Fatal(err)
	}
	return points.Config{FS: r.fs, VM: vm, Set: func([]delta.Disk) error { return nil }, Bases: func(disk string, size int64) (block.Device, error) {
		if r.bases[disk] == nil {
			r.bases[disk] = block.NewMem(size)
		}
		return kept{r.bases[disk]}, nil
	}}
}

func newReplica(t testing.TB, gen delta.Generation, disks ...delta.Disk) *replica {
	t.Helper()
	r := &replica{t: t, fs: fsxtest.NewMem(), bases: map[string]*block.Mem{}}
	r.Replica = &sessiontest.Replica{Get: r.get, Generation: gen}
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
