package cbt

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// Sizes of the format. They stand in the superblock; other values are refused.
const (
	granuleShift = 12
	regionShift  = 20
	// GranuleSize is the unit of the exact bitmaps.
	GranuleSize = 1 << granuleShift
	// RegionSize is the unit of the durable intent map.
	RegionSize = 1 << regionShift
	// MaxDisks is the number of disks one Group can track.
	MaxDisks = 60
	// maxDiskSize bounds what a size, true or damaged, can make us allocate:
	// 64 TiB, of which the region table takes 256 MiB.
	maxDiskSize = 1 << 46

	granulesPerRegion = 1 << (regionShift - granuleShift)
)

// Defaults and limits, by name.
const (
	defaultCaptureBytes = 64 << 20
	defaultIdle         = 5 * time.Minute
	defaultIdleEpochs   = 5
	defaultRetry        = time.Second
	mtimeTick           = 20 * time.Millisecond
	zeroPiece           = 16 << 20
	copyRun             = 256 << 10
	maxReason           = 127
	spillAfter          = 2       // epochs lost in a row before the spill file is used
	spillReserve        = 1 << 30 // what the file leaves free on its file system
	maxName             = 31
	maxID               = 63
)

// Config describes the tracker of one VM.
type Config struct {
	// FS is the durable directory of this VM's tracker; nothing else may live
	// in it.
	FS fsx.FS
	// SecondFS is an independent place for the distrust marker (next to the
	// image); nil means none.
	SecondFS fsx.FS
	// SharedDir is a tmpfs directory for the boot-scoped exact copy; "" means
	// none: a kill then costs a digest pass over the marked regions.
	SharedDir string
	// BootID names this boot of the host (/proc/sys/kernel/random/boot_id). It
	// is required with SharedDir.
	BootID string
	// VMID and PeerID are at most 63 bytes of [A-Za-z0-9._:-].
	VMID, PeerID string
	// Writer is the product version, recorded for people.
	Writer string
	Log    *slog.Logger
	Disks  []DiskConfig
	// CaptureBytes bounds the memory for copy-before-write of all disks
	// together; 0 means 64 MiB.
	CaptureBytes int64
	// SpillDir holds a file, without a name, that takes what the memory cannot,
	// once spillAfter epochs in a row were lost for want of it; "" means none.
	SpillDir string
	// Idle and IdleEpochs say how long a clean region stays marked; 0 means 5
	// minutes and 5 epochs, negative means not at all.
	Idle       time.Duration
	IdleEpochs int
	// PremarkRegions is the most regions marked ahead of a sequential writer;
	// 0 means 64, negative means none.
	PremarkRegions int
	// TellPeer stores "verify everything" at the replica durably. It is the
	// last resort before first-touch writes are held; nil means none.
	TellPeer func(ctx context.Context, reason string) error
	// HoldOnFailure makes first-touch writes wait whenever an intent cannot be
	// recorded, even if "verify everything" could be made durable instead.
	HoldOnFailure bool
	// RetryEvery is the pause between attempts while writes are held; 0 means
	// one second.
	RetryEvery time.Duration
}

// DiskConfig is one disk of the VM.
type DiskConfig struct {
	// Name is the disk's target name, at most 31 bytes of [A-Za-z0-9._-].
	Name string
	// Device is the real disk. The Group never closes it.
	Device block.Device
	// Identity tells whether this is still the image we knew, untouched; nil
	// means that nobody can say and the clean flag alone is believed.
	Identity func() (block.Identity, error)
}

// Position is a place in the VM's history: the content of all its disks after
// Epoch of Generation was committed by the replica. The zero value is "none".
type Position struct {
	Generation [16]byte
	Epoch      uint64
	Digest     [32]byte
}

// IsZero reports whether p is "none".
func (p Position) IsZero() bool { return p == Position{} }

// String is short: eight digits of the generation, the epoch, eight of the
// digest.
func (p Position) String() string {
	return fmt.Sprintf("%s/%d/%s", hex.EncodeToString(p.Generation[:4]), p.Epoch, hex.EncodeToString(p.Digest[:4]))
}

// Dirty says what a new tracker takes as different from the replica.
type Dirty int

// The values of Dirty.
const (
	// DirtyAll is the safe zero value: nothing is known to be equal.
	DirtyAll Dirty = iota
	// DirtyNone is for a side just promoted, whose disks are exactly Base, and
	// for a tracker without a replica, which counts from its creation.
	DirtyNone
)

// Start is what a new tracker begins with.
type Start struct {
	Generation [16]byte
	// Base is the position the dirty set is relative to; zero while seeding.
	Base Position
	// Parent is where Generation branched off; zero for a first generation.
	Parent Position
	Dirty  Dirty
	// Highest is an epoch number that is at least as high as any ever frozen in
	// Generation; not 0 only when an earlier tracker of it was lost.
	Highest uint64
	// Again replaces a tracker of the same generation: what a Create that failed
	// has left behind, with nothing written since. The caller must know that; a
	// tracker that served would lose what it has marked.
	Again bool
}

// Source says where a restart took the dirty set from, best first.
type Source string

// The sources.
const (
	SourceExact   Source = "exact"   // clean stop
	SourceShared  Source = "shared"  // killed; memory of this boot was exact
	SourceRegions Source = "regions" // power loss; marked regions
	SourceAll     Source = "all"     // verify everything
	SourceSealed  Source = "sealed"  // planned hand-over; nothing dirty, writes refused
)

// OpenReport tells what Open found and decided.
type OpenReport struct {
	Source Source
	// Reason says in words why the source is not a better one.
	Reason string
	// SuspectBytes per disk: dirty only because nobody knows better.
	SuspectBytes map[string]int64
	// DirtyBytes per disk, suspect ones included.
	DirtyBytes map[string]int64
	// Soft lists disks whose change time moved while the content probably did
	// not (an owner or label was changed): check samples, scrub early.
	Soft []string
	// Alarms are single faults that were tolerated and repaired.
	Alarms []string
}

// Errors of the package. Test with errors.Is.
var (
	// ErrEpochOpen: the previous epoch has neither been acked nor abandoned.
	ErrEpochOpen = errors.New("an epoch is still open")
	// ErrEpochEnded: the epoch was acked or abandoned already.
	ErrEpochEnded = errors.New("the epoch has ended")
	// ErrOverrun: the guest overwrote more frozen blocks than the capture
	// memory holds; the epoch is lost, the guest did not wait.
	ErrOverrun = errors.New("capture memory exhausted by the guest's writes, epoch abandoned")
	// ErrNotFrozen: the range is not part of the epoch, or was released.
	ErrNotFrozen = errors.New("range does not belong to the frozen epoch")
	// ErrNotDrained: writes of the epoch are still in flight.
	ErrNotDrained = errors.New("writes of the epoch are still in flight")
	// ErrSealed: the VM was handed over in a planned failover.
	ErrSealed = errors.New("disk is sealed after a planned failover; take it back first: replicactl failover take-back NAME")
	// ErrDirty: Seal while something is not replicated yet.
	ErrDirty = errors.New("not everything has been replicated yet")
	// ErrPosition: a position that is not on this tracker's history.
	ErrPosition = errors.New("position is not on the tracker's history")
	// ErrLostBase: a damaged superblock may have held a base later than the
	// position; it comes with ErrPosition. Only this host can know: Rebase.
	ErrLostBase = errors.New("a damaged superblock may have held a later base")
	// ErrStale: a comparison was overtaken by a freeze, an ack or a mark;
	// nothing was cleared.
	ErrStale = errors.New("comparison is out of date")
	// ErrNoTracker: the directory holds no tracker.
	ErrNoTracker = errors.New("no change tracker here")
	// ErrCorrupt: no superblock can be read. The generation and its highest
	// epoch are lost: start a new generation with everything dirty.
	ErrCorrupt = errors.New("both superblocks are damaged")
	// ErrFeature: written by a newer version.
	ErrFeature = errors.New("tracker was written by a newer version; install that version or start a new generation: replicactl vm resync NAME")
	// ErrMismatch: the tracker belongs to another VM or to other disks.
	ErrMismatch = errors.New("tracker does not belong to this VM")
)

func (c *Config) validate() error {
	if c.FS == nil {
		return errors.New("tracker: no directory given")
	}
	if !validID(c.VMID, maxID) || (c.PeerID != "" && !validID(c.PeerID, maxID)) {
		return fmt.Errorf("tracker: VM id %.80q or peer id %.80q: want up to %d bytes of [A-Za-z0-9._:-]", c.VMID, c.PeerID, maxID)
	}
	if c.SharedDir != "" && !validID(c.BootID, maxID) {
		return fmt.Errorf("tracker: boot id %.80q is needed with a shared directory", c.BootID)
	}
	if len(c.Disks) == 0 || len(c.Disks) > MaxDisks {
		return fmt.Errorf("tracker: %d disks, want 1 to %d", len(c.Disks), MaxDisks)
	}
	seen := map[string]bool{}
	for _, d := range c.Disks {
		if err := d.validate(); err != nil {
			return err
		}
		if seen[d.Name] {
			return fmt.Errorf("tracker: disk %q is named twice", d.Name)
		}
		seen[d.Name] = true
	}
	if c.CaptureBytes < 0 {
		return fmt.Errorf("tracker: capture memory of %d bytes", c.CaptureBytes)
	}
	return nil
}

func (d *DiskConfig) validate() error {
	if !validID(d.Name, maxName) {
		return fmt.Errorf("tracker: disk name %.80q: want up to %d bytes of [A-Za-z0-9._:-]", d.Name, maxName)
	}
	if d.Device == nil {
		return fmt.Errorf("tracker: disk %q has no device", d.Name)
	}
	if n := d.Device.Size(); n < 0 || n > maxDiskSize {
		return fmt.Errorf("tracker: disk %q: size %d is outside 0 to %d bytes", d.Name, n, int64(maxDiskSize))
	}
	return nil
}

// withDefaults returns c with every zero value replaced.
func (c Config) withDefaults() Config {
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if c.CaptureBytes == 0 {
		c.CaptureBytes = defaultCaptureBytes
	}
	if c.Idle == 0 {
		c.Idle = defaultIdle
	}
	if c.IdleEpochs == 0 {
		c.IdleEpochs = defaultIdleEpochs
	}
	if c.PremarkRegions == 0 {
		c.PremarkRegions = 64
	}
	if c.RetryEvery <= 0 {
		c.RetryEvery = defaultRetry
	}
	c.Log = c.Log.With("vm", c.VMID)
	return c
}

func validID(s string, limit int) bool {
	if s == "" || len(s) > limit || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '.', c == '_', c == '-', c == ':':
		default:
			return false
		}
	}
	return true
}
