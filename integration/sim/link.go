package sim

import (
	"bytes"
	"context"
	"errors"
	"io"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

var errLink = errors.New("connection reset by peer")

// link is the way between the two hosts, both directions. Faults are armed and
// strike once, but for down.
type link struct {
	down      bool
	cut       int64 // the next body breaks after so many bytes; -1 = not
	loseCall  int   // the n-th call from now is lost on its way; 0 = none
	loseReply int   // the answer of the n-th call from now is lost
	twice     int   // the n-th call from now arrives twice
	keep      int   // the n-th body from now is kept, to arrive again later
	kept      []message
	calls     int
	bytes     int64
	cutAt     int64 // like cut, counted over all bodies; 0 = never
	record    bool  // keep every message
}

// message is a body that may arrive again at any time.
type message struct {
	from  *host
	epoch *wire.EpochKey
	start uint32
	seed  *wire.SeedRequest
	body  []byte
	call  func(to *host) // a message without a body
	kind  string
}

// fate is what happens to one call.
type fate struct {
	lost, mute, twice, keep bool
	cut                     int64
}

func (l *link) next(body bool) fate {
	l.calls++
	hit := func(n *int) bool {
		if *n == 0 {
			return false
		}
		*n--
		return *n == 0
	}
	f := fate{lost: l.down || hit(&l.loseCall), mute: hit(&l.loseReply), twice: hit(&l.twice), cut: -1}
	if body {
		f.cut, l.cut = l.cut, -1
		f.keep = hit(&l.keep)
	}
	return f
}

// call carries one message without a body.
func call[R any](from *host, kind string, f func(to *host) (R, error)) (R, error) {
	var zero R
	if from.w.link.record {
		from.w.link.kept = append(from.w.link.kept, message{from: from, kind: kind, call: func(to *host) { _, _ = f(to) }})
	}
	w, to := from.w, from.other()
	x := w.link.next(false)
	if x.lost || from.lost() || !to.up || to.lost() {
		w.count("link lost call")
		return zero, errLink
	}
	r, err := f(to)
	if x.twice && !to.lost() {
		w.count("link twice")
		r, err = f(to)
	}
	if to.lost() || from.lost() || x.mute {
		w.count("link lost answer")
		return zero, errLink
	}
	return r, err
}

// carry carries one message with a body.
func carry[R any](from *host, body io.Reader, m message, f func(to *host, r io.Reader) (R, error)) (R, error) {
	var zero R
	w, to := from.w, from.other()
	x := w.link.next(true)
	if x.lost || from.lost() || !to.up || to.lost() {
		w.count("link lost call")
		return zero, errLink
	}
	var copied bytes.Buffer
	r := &wire1{r: io.TeeReader(body, &copied), left: x.cut, w: w}
	a, err := f(to, r)
	if r.left == 0 {
		w.count("link cut in body")
	}
	if x.keep || w.link.record {
		_, _ = io.Copy(&copied, body) // what the receiver did not want to see
		m.from, m.body = from, copied.Bytes()
		w.link.kept = append(w.link.kept, m)
	}
	if to.lost() || from.lost() || x.mute || r.left == 0 {
		if x.mute {
			w.count("link lost answer")
		}
		return zero, errLink
	}
	return a, err
}

// wire1 breaks after left bytes.
type wire1 struct {
	r    io.Reader
	left int64 // -1 = never
	w    *World
}

// Read implements io.Reader.
func (c *wire1) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, errLink
	}
	if c.left > 0 && int64(len(p)) > c.left {
		p = p[:c.left]
	}
	if l := &c.w.link; l.cutAt > 0 && l.bytes+int64(len(p)) >= l.cutAt {
		p = p[:l.cutAt-l.bytes]
		c.left, l.cutAt = int64(len(p)), 0
		if c.left == 0 {
			return 0, errLink
		}
	}
	n, err := c.r.Read(p)
	if c.left > 0 {
		c.left -= int64(n)
	}
	c.w.link.bytes += int64(n)
	return n, err
}

// Handshake implements session.Replica.
func (l linked) Handshake(_ context.Context, q wire.HandshakeRequest) (wire.HandshakeReply, error) {
	return call(l.h, "handshake", func(to *host) (wire.HandshakeReply, error) { return to.serveHandshake(q) })
}

// PutSeed implements session.Replica.
func (c *courier) PutSeed(_ context.Context, q wire.SeedRequest, body io.Reader) (wire.SeedReply, error) {
	return carry(c.h, body, message{kind: "seed", seed: &q}, func(to *host, r io.Reader) (wire.SeedReply, error) { return to.serveSeed(q, r) })
}

// EpochProgress implements session.Replica.
func (c *courier) EpochProgress(_ context.Context, k wire.EpochKey) (uint32, error) {
	return call(c.h, "progress", func(to *host) (uint32, error) {
		s, err := to.receiving(k.Generation)
		if err != nil {
			return 0, err
		}
		return s.Progress(k.Generation, k.Epoch, k.Nonce), nil
	})
}

// PutEpoch implements session.Replica.
func (c *courier) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (delta.Pos, error) {
	return carry(c.h, body, message{kind: "epoch", epoch: &k, start: from}, func(to *host, r io.Reader) (delta.Pos, error) { return to.serveEpoch(ctx, k, from, r) })
}

// Beat implements session.Replica.
func (c *courier) Beat(_ context.Context, b wire.Beat) error {
	_, err := call(c.h, "beat", func(to *host) (struct{}, error) { return struct{}{}, to.serveBeat(b) })
	return err
}

// Digests implements session.Replica.
func (c *courier) Digests(ctx context.Context, q wire.DigestRequest) (wire.DigestReply, error) {
	return call(c.h, "digests", func(to *host) (wire.DigestReply, error) { return to.serveDigests(ctx, q) })
}

// failover carries a step of a role change.
func (l linked) failover(q wire.FailoverRequest) (wire.FailoverReply, error) {
	return call(l.h, "failover "+q.Step, func(to *host) (wire.FailoverReply, error) { return to.serveFailover(q) })
}

// status asks the other host for its role.
func (l linked) status() (wire.PeerVM, error) {
	return call(l.h, "status", func(to *host) (wire.PeerVM, error) { return to.serveStatus() })
}

// replay lets a kept body arrive once more, whatever has happened since; its
// answer reaches nobody.
func (w *World) replay(i int) error {
	m := w.link.kept[i]
	to := m.from.other()
	if !to.up || to.lost() {
		return nil
	}
	w.count("link replay " + m.kind)
	if m.call != nil {
		m.call(to)
		return nil
	}
	r := bytes.NewReader(m.body)
	if m.seed != nil {
		_, err := to.serveSeed(*m.seed, r)
		w.note("  replayed seed: %v", err)
		return nil
	}
	_, err := to.serveEpoch(context.Background(), *m.epoch, m.start, r)
	w.note("  replayed epoch %d: %v", m.epoch.Epoch, err)
	return nil
}
