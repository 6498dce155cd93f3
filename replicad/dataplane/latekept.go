package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"reflect"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/wire"
)

// lateFile keeps what other servers may still carry out: the process may be
// killed again before it has come, or stopped, or the host may go down.
const (
	lateFile    = "late.json"
	maxLateFile = 16 << 20
)

type lateRecord struct {
	Version int                        `json:"version"`
	Disks   map[wire.DiskName]lateDisk `json:"disks"`
}

// lateDisk is what is late on one disk; for how long is not kept, the pauses
// begin anew.
type lateDisk struct {
	Pieces []int64 `json:"pieces,omitempty"` // of latePiece bytes
	All    bool    `json:"all,omitempty"`
}

// again takes over what an earlier process knew to be late.
func (l *late) again(d lateDisk) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range d.Pieces {
		l.add(block.Range{Off: p * latePiece, Len: latePiece})
	}
	if d.All {
		clear(l.pieces)
		l.all, l.pause = true, lateFirst
	}
}

func readLate(f fsx.FS) (lateRecord, error) {
	r := lateRecord{Version: 1}
	err := fsx.ReadJSON(f, lateFile, maxLateFile, &r)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return lateRecord{Version: 1}, nil
	case err == nil && r.Version != 1:
		err = fmt.Errorf("%s has version %d, this build reads 1", lateFile, r.Version)
	}
	for name, d := range r.Disks {
		for _, p := range d.Pieces {
			if err == nil && (p < 0 || p > wire.MaxDiskSize/latePiece) {
				err = fmt.Errorf("%s: piece %d of disk %s", lateFile, p, name)
			}
		}
	}
	return r, err
}

// recallLate brings back what an earlier process knew to be late, and what it
// had under way when it was killed, before anything is written again.
func (p *Plane) recallLate() {
	p.keepLate()
	kept, err := readLate(p.state)
	if err != nil {
		p.log.Error("what servers may carry out late is not known; everything will be compared", "err", err)
	}
	for _, i := range p.images {
		if i.upstream == nil {
			continue
		}
		if d, ok := kept.Disks[i.cfg.Name]; err != nil {
			i.upstream.late.again(lateDisk{All: true})
		} else if ok {
			i.upstream.late.again(d)
		}
		if g, r := p.group.Load(), p.report.Load(); g != nil && unclean(r) {
			i.upstream.late.found(g, string(i.cfg.Name))
		}
	}
	if err == nil {
		p.lateSaved = &kept
	}
	p.saveLate()
}

// keepLate has losses noted in the file before anything is sent again.
func (p *Plane) keepLate() {
	for _, i := range p.images {
		if i.upstream != nil {
			i.upstream.late.keep = p.saveLate
		}
	}
}

// saveLate makes what is late durable, if it is news. The guest goes on when
// that fails: then a second kill forgets it.
func (p *Plane) saveLate() {
	p.lateMu.Lock()
	defer p.lateMu.Unlock()
	r := lateRecord{Version: 1}
	for _, i := range p.images {
		if i.upstream == nil {
			continue
		}
		if h := i.upstream.late.handed(); h != nil {
			if r.Disks == nil {
				r.Disks = map[wire.DiskName]lateDisk{}
			}
			r.Disks[i.cfg.Name] = lateDisk{Pieces: h.Pieces, All: h.All}
		}
	}
	if p.lateSaved != nil && (reflect.DeepEqual(r, *p.lateSaved) || len(r.Disks) == 0 && len(p.lateSaved.Disks) == 0) {
		return
	}
	if err := fsx.WriteJSON(p.state, lateFile, r); err != nil {
		p.lateSaved = nil // what the file says is not known
		p.log.Error("what servers may carry out late is forgotten by the next kill", "err", err)
		return
	}
	p.lateSaved = &r
}
