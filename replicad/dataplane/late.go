package dataplane

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
)

// A write whose connection to another NBD server ended before its answer may
// still be carried out there, at any time: neither a new connection nor a flush
// on it ends what the old one asked for. It was sent again meanwhile, and what
// was written since may have been shipped and its bits dropped. So all that was
// under way is marked again and again for a while, with growing pauses: what
// comes late is shipped late. The guest's own disk has it all the same: only the
// server could prevent that, and we do not tell a late write from one of the
// guest's.
const (
	latePiece = 64 << 10 // what is marked is a multiple of it
	latePeak  = 4096     // pieces; with more, everything is compared in the end
	lateFirst = time.Second
	lateLast  = 512 * time.Second // some 17 minutes in all
)

// late is what a server may still do to one disk.
type late struct {
	kick chan struct{} // capacity 1: there is more
	keep func()        // makes it durable; set before requests come, nil = nobody does

	mu     sync.Mutex
	next   int                 // guarded by mu
	flying map[int]block.Range // guarded by mu; changes that are not answered
	pieces map[int64]struct{}  // guarded by mu
	all    bool                // guarded by mu; too much for pieces
	pause  time.Duration       // guarded by mu; 0: nothing is late
}

// lateness is late as a successor is told of it.
type lateness struct {
	Pieces []int64       `json:"pieces,omitempty"`
	All    bool          `json:"all,omitempty"`
	Pause  time.Duration `json:"pause"`
}

func newLate() *late {
	return &late{kick: make(chan struct{}, 1), flying: map[int]block.Range{}, pieces: map[int64]struct{}{}}
}

// begin notes a change that is asked for; end, with what begin returned, that it
// was answered. Neither allocates: they are on the way of every write.
func (l *late) begin(off, n int64) (id int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next++
	l.flying[l.next] = block.Range{Off: off, Len: n}
	return l.next
}

func (l *late) end(id int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.flying, id)
}

// lost takes down what is under way: its connection has ended. When it returns
// that is durable, and what was under way may be sent again.
func (l *late) lost() {
	l.mu.Lock()
	for _, r := range l.flying {
		l.add(r)
	}
	l.mu.Unlock()
	if l.keep != nil {
		l.keep()
	}
}

// add needs mu.
func (l *late) add(r block.Range) {
	if r.Len <= 0 {
		return
	}
	for p := r.Off / latePiece; p <= (r.End()-1)/latePiece && !l.all; p++ {
		l.pieces[p] = struct{}{}
		l.all = len(l.pieces) > latePeak
	}
	if l.all {
		clear(l.pieces)
	}
	l.pause = lateFirst
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// found takes down what a killed process left: which of it was under way nobody
// knows, but all of that was marked.
func (l *late) found(g *cbt.Group, disk string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for r := range g.Dirty(disk) {
		l.add(r)
	}
}

func (l *late) handed() *lateness {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pause == 0 {
		return nil
	}
	h := &lateness{All: l.all, Pause: l.pause}
	for p := range l.pieces {
		h.Pieces = append(h.Pieces, p)
	}
	slices.Sort(h.Pieces)
	return h
}

func (l *late) adopt(h *lateness) {
	if h == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range h.Pieces {
		l.pieces[p] = struct{}{}
	}
	l.all, l.pause = h.All, h.Pause
}

// wait returns when something is to be marked.
func (l *late) wait(ctx context.Context) error {
	for {
		l.mu.Lock()
		pause := l.pause
		l.mu.Unlock()
		var due <-chan time.Time
		if pause > 0 {
			due = time.After(pause)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-l.kick:
		case <-due:
			return nil
		}
	}
}

// mark marks what may have come since; after the last time it is forgotten.
func (l *late) mark(g *cbt.Group, disk, uri string) (err error) {
	h := l.handed()
	if d := g.Disk(disk); h != nil && d != nil {
		for _, p := range h.Pieces {
			off := p * latePiece
			if n := min(latePiece, d.Size()-off); n > 0 {
				err = errors.Join(err, d.Mark(off, n))
			}
		}
		if h.All && h.Pause >= lateLast {
			err = errors.Join(err, g.MarkAll("the connection to "+uri+" had been lost; what was under way may have come late"))
		}
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case h == nil || l.pause != h.Pause: // there is more since
	case l.pause >= lateLast:
		l.all, l.pause = false, 0
		clear(l.pieces)
	default:
		l.pause *= 2
	}
	return nil
}

// remark marks what another server may carry out late until ctx ends.
func (p *Plane) remark(ctx context.Context, i *image) {
	for i.upstream.late.wait(ctx) == nil {
		leave, err := p.calls.enter(ctx)
		if err != nil {
			return
		}
		if g := p.group.Load(); g != nil && !p.left.Load() {
			if err := i.upstream.late.mark(g, string(i.cfg.Name), i.upstream.uri); err != nil {
				p.log.Error("what a server may carry out late should be marked", "disk", i.cfg.Name, "err", err)
			}
			p.saveLate() // it may be over
		}
		leave()
	}
}
