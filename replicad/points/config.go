package points

import (
	"io"
	"log/slog"
	"math"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// Config is what a store needs. FS and Bases are required.
type Config struct {
	// FS is the store's own directory.
	FS fsx.FS
	// Bases opens the raw image of a disk, creating or growing it to size
	// (new parts read as zeros); it never shrinks one. The store closes it,
	// and closes it first when a disk grew and it is opened again. It is asked
	// for the image of a disk that joins when that is applied, and for that of a
	// removed disk when a point is read in it.
	Bases func(disk string, size int64) (block.Device, error)
	// Set is asked by Begin whether the disks may become another set of names:
	// some join, some leave, some come back. Nil, or an error, refuses the epoch
	// with ErrDisks. It is asked again when the epoch begins again, and must not
	// use the store (but for Absent).
	Set func(disks []delta.Disk) error
	// Identity tells whether an image is still the one the store left; nil
	// means the check is somebody else's.
	Identity func(disk string) (Identity, error)
	// Free is the free space in bytes of the file system of FS; nil = unknown,
	// and Limits.Reserve is not kept.
	Free func() (int64, error)
	// Sync makes a spool file durable; nil means File.Sync. A group committer
	// puts itself here: one call per commit.
	Sync func(fsx.File) error
	// VM is checked by Open unless zero.
	VM delta.VM
	// ReadOnly opens for inspection: nothing is written or repaired.
	ReadOnly bool
	Policy   Policy
	Limits   Limits
	Log      *slog.Logger     // nil: none
	Now      func() time.Time // nil: time.Now; orders nothing, spaces points
	Rand     io.Reader        // nil: crypto/rand
}

// Identity of an image. File changes when it is another object or size, State
// whenever its content may have been written (modification times).
//
// Numbered is File with the number of its file system's device, which stores of
// earlier versions recorded; they are taken for the same.
type Identity struct{ File, State, Numbered string }

// Limits bound a store. Zero fields mean the defaults in brackets.
type Limits struct {
	BacklogBytes int64         // committed, unapplied spool (8 GiB)
	BacklogAge   time.Duration // age of the oldest unapplied commit (10 min)
	SpoolBytes   int64         // one epoch in the spool; 0 = no limit but space
	UndoBytes    int64         // all undo together; 0 = no limit but space
	Reserve      int64         // kept free on the file system; 0 = nothing
	SpoolStep    int64         // preallocation step of a spool file (16 MiB)
	KeepSpool    int64         // largest spool file kept for reuse (256 MiB)
	SeedStep     int64         // seed bytes between durable cursors (64 MiB)
}

// Policy says when recovery points are made and which are kept. Zero fields
// mean the defaults in brackets.
type Policy struct {
	MinDistance time.Duration // between two points (15 s)
	Max         int           // points kept at most (500)
	// Grid is evaluated row by row; a point stays if any row wants it. Default:
	// every point of the last hour, hourly ones for 24 hours. Empty and not nil:
	// no points, and no undo but for what is pinned or viewed.
	Grid []Row
}

// KeepAll makes points as the default policy does and drops none: for whoever
// applies what is left without being the one who decides what is kept.
func KeepAll() Policy {
	return Policy{Max: math.MaxInt32, Grid: []Row{{For: maxPolicyFor}}}
}

// Row keeps one point per Every (0: all of them) for the time For.
type Row struct{ Every, For time.Duration }

const (
	defaultMinDistance  = 15 * time.Second
	defaultMaxPoints    = 500
	defaultBacklogBytes = 8 << 30
	defaultBacklogAge   = 10 * time.Minute
	defaultSpoolStep    = 16 << 20
	defaultKeepSpool    = 256 << 20
	defaultSeedStep     = 64 << 20
)

func (p Policy) withDefaults() Policy {
	if p.MinDistance <= 0 {
		p.MinDistance = defaultMinDistance
	}
	if p.Max <= 0 {
		p.Max = defaultMaxPoints
	}
	if p.Grid == nil {
		p.Grid = []Row{{Every: 0, For: time.Hour}, {Every: time.Hour, For: 24 * time.Hour}}
	}
	return p
}

func (l Limits) withDefaults() Limits {
	set := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	set(&l.BacklogBytes, defaultBacklogBytes)
	set(&l.SpoolStep, defaultSpoolStep)
	set(&l.KeepSpool, defaultKeepSpool)
	set(&l.SeedStep, defaultSeedStep)
	if l.BacklogAge <= 0 {
		l.BacklogAge = defaultBacklogAge
	}
	return l
}
