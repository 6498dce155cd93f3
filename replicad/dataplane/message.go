package dataplane

import (
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Status is what the data plane says of itself.
type Status struct {
	VM      wire.VMID
	PID     int
	Started time.Time
	// Version is the program's; Outdated says that another program is installed
	// in its place, for the data plane and for its keeper (pid 0: none).
	Version        string
	Outdated       bool `json:",omitempty"`
	KeeperPID      int  `json:",omitempty"`
	KeeperOutdated bool `json:",omitempty"`
	// Instance is random per process: another value means that it restarted
	// and every frozen epoch of before is gone.
	Instance string
	// Tracker is false until CreateTracker or an earlier run made one.
	Tracker    bool
	Generation delta.Generation
	// Base is the durable base of the tracker; zero means seeding.
	Base delta.Pos
	// Acked is the last acknowledged position; zero = none known.
	Acked delta.Pos
	// Highest epoch number ever frozen in Generation.
	Highest uint64
	// Pending is what an epoch frozen now would carry, an upper bound in bytes.
	Pending int64
	// Suspect bytes are marked without proof of a change (after an unclean
	// start); they are best compared before they are shipped.
	Suspect int64
	// Recovered says where the dirty set came from at the last open and why.
	Recovered string
	// TrackerLost says why an existing tracker cannot be read; Tracker is false
	// then, and no export opens until CreateTracker makes another.
	TrackerLost string `json:",omitempty"`
	// TrackingLost is non-empty when changes cannot be recorded durably.
	TrackingLost string
	Sealed       bool
	// Refuse is the durable reason why exports stay closed; empty = allowed.
	Refuse string
	Disks  []DiskStatus
	// Frozen is the epoch held now, nil when none.
	Frozen *Epoch
	// Overlay is set while the guest's writes lie beside the images, and until
	// the data plane is started without.
	Overlay *OverlayStatus `json:",omitempty"`
	// Abandoned counts epochs given up for want of capture memory.
	Abandoned int64
}

// OverlayStatus says how far a failover has come that is not final yet.
type OverlayStatus struct {
	// Phase is running, committed or done.
	Phase string
	// At is the state that the guest began with.
	At delta.Pos
	// Bytes are beside the images, Moved were written into them since the
	// process started.
	Bytes, Moved int64
	// Failure is why bringing the images up to date stopped; it is tried again.
	Failure string `json:",omitempty"`
}

// HistoryReply is what a commit of the overlay will end.
type HistoryReply struct {
	// Points there are, Pinned of them; Since is the oldest's time in words.
	Points, Pinned int
	Since          string `json:",omitempty"`
	// Undo bytes belong to the points, Spool bytes are not in the images yet.
	Undo, Spool int64
}

// KeepRequest copies the recovery points, images and all, into Dir, which must
// not exist. An empty Dir only waits until no copy is under way.
type KeepRequest struct{ Dir string }

// KeepReply is what was copied: Bytes, and whether the images share blocks.
type KeepReply struct {
	Points int
	Bytes  int64
	Shared bool
}

// DiskStatus is one disk's part.
type DiskStatus struct {
	Name wire.DiskName
	Size int64
	// Grown is what the image has behind Size: it became longer and nobody has
	// taken that up yet (see ResizeRequest).
	Grown int64
	// Late: the server the disk is on may still carry out what was asked of it on
	// a connection that ended.
	Late     bool `json:",omitempty"`
	Pending  int64
	Suspect  int64
	Exported bool
	QemuLock bool
	// Clients is the number of open NBD connections, ClientPID the process
	// behind them (0 = none or unknown).
	Clients      int
	ClientPID    int
	Requests     uint64
	Errors       uint64
	ReadBytes    uint64
	WrittenBytes uint64
	LastActivity time.Time
}

// ResizeRequest gives a disk another size, image and all. Making it longer may
// be done under a running guest, whose connections end and learn the size when
// they come back; what is new is marked.
type ResizeRequest struct {
	Disk wire.DiskName
	// Size in bytes, a multiple of 512; 0 = what the image has by now.
	Size int64
	// Shrink lets the image become shorter; nobody may be connected then.
	Shrink bool
}

// ResizeReply is the disk's size before and now.
type ResizeReply struct{ Was, Size int64 }

// CreateRequest makes the tracker. It is refused when one exists with another
// generation, and a no-op when it exists with this one.
type CreateRequest struct {
	Generation delta.Generation
	// Base is what the marks are relative to; zero = seeding.
	Base delta.Pos
	// Parents are the ancestors of Generation, nearest first (stored for display
	// and break-glass only).
	Parents []delta.Pos `json:",omitempty"`
	// DirtyAll marks everything (nothing is known of the difference).
	DirtyAll bool
	// Lost says why an earlier tracker of Generation cannot be read; not empty
	// only with DirtyAll. Everything is then compared before it is sent, and
	// epochs are numbered from Highest on, above any that was frozen before.
	Lost    string `json:",omitempty"`
	Highest uint64 `json:",omitempty"`
	// Replace discards an existing tracker of another generation first (a role
	// change: the caller has decided that its marks are taken over or void).
	Replace bool
	// Dirty are ranges to mark, e.g. those a failback must compare.
	Dirty map[wire.DiskName][]wire.Range `json:",omitempty"`
}

// Epoch is one frozen cut.
type Epoch struct {
	Epoch      uint64
	Generation delta.Generation
	Nonce      uint64
	Parent     delta.Pos
	// Cut is when it was frozen (monotone within the process).
	Cut time.Time
	// Bytes in frozen granules, before compression.
	Bytes int64
	// Empty: nothing had changed since the last acknowledged position. No
	// number was used and nothing is held; there is nothing to end.
	Empty bool `json:",omitempty"`
	// App says that the cut is application-consistent.
	App bool `json:",omitempty"`
	// Blobs says that firmware state was attached.
	Blobs bool `json:",omitempty"`
	// Digest is known once every frame was produced.
	Digest *delta.Digest `json:",omitempty"`
	// Limits are the sizes with which the epoch lists the disks it was frozen
	// with a limit for; 0 = it does not list the disk.
	Limits map[wire.DiskName]int64 `json:"limits,omitempty"`
	// Lost says why the epoch can no longer be captured; it must be abandoned.
	Lost string `json:",omitempty"`
}

// Key names the attempt for the replica.
func (e Epoch) Key(vm wire.VMID) wire.EpochKey {
	return wire.EpochKey{VM: vm, Generation: e.Generation, Epoch: e.Epoch, Nonce: e.Nonce}
}

// FreezeRequest asks for a cut on top of Parent.
type FreezeRequest struct {
	// Parent is the replica's committed position; zero for the first epoch
	// after seeding.
	Parent delta.Pos
	// Force makes an epoch of a cut in which nothing changed, e.g. to carry
	// firmware state. A zero Parent implies it.
	Force bool
	// App says that the guest's file systems are frozen: the epoch is
	// application-consistent. It implies Force, so that there is one to say so.
	App bool `json:",omitempty"`
	// Config is the digest of the VM's description, bound into the position.
	Config delta.Digest
	// Limits bound what the epoch has of disks that are joining: such a disk is
	// listed with this size, or with its own if that is less, and what lies
	// behind stays marked for the next cut. 0 leaves the disk out. Multiples of
	// delta.Granule, or the disk's size.
	Limits map[wire.DiskName]int64 `json:"limits,omitempty"`
}

// SeedRequest positions a seed stream.
type SeedRequest struct {
	Disk   wire.DiskName
	Offset int64
	// Max ends the stream after about that many bytes of content; 0 = at the
	// end of the disk.
	Max int64
	// Holes permits SEEK_DATA; only for a replica's base known to be all zero.
	Holes bool
}

// RangesRequest lists dirty ranges of a disk from Offset on.
type RangesRequest struct {
	Disk   wire.DiskName
	Offset int64
	// Bytes bounds the sum of what is returned, Max the number of ranges.
	Bytes int64
	Max   int
	// Suspect lists only what is marked without proof.
	Suspect bool
}

// RangesReply lists them in ascending order. Next is where to go on; Done says
// that nothing follows.
type RangesReply struct {
	Ranges []wire.Range
	Next   int64
	Done   bool
}

// CompareRequest opens a window: the ranges are read and hashed while every
// write into them is noticed. One window may be open at a time; opening one
// closes the other without effect.
type CompareRequest struct {
	// Pos is the replica's position that is compared with.
	Pos  delta.Pos
	Disk wire.DiskName
	Key  [32]byte
	// Ranges ascend: at most wire.MaxDigestRanges, at most 1 MiB each, from the
	// first to the last byte at most 64 MiB.
	Ranges []wire.Range
}

// CompareReply is what the live image holds.
type CompareReply struct {
	Window  uint64
	Digests [][16]byte
}

// CompareEnd closes a window. Equal ranges lose their marks where nothing was
// written since the window opened; Differ ranges are marked where they were not
// marked before and were not written since (a mismatch: tracking had missed
// them, or a side rotted).
type CompareEnd struct {
	Window uint64
	Equal  []wire.Range
	Differ []wire.Range
}

// CompareResult says what became of the window.
type CompareResult struct {
	Cleared    int64 // bytes whose mark was dropped
	Mismatched int64 // bytes newly marked: must be 0 in a healthy pair
}

// ExportRequest switches one disk's export, or all with an empty name. The
// choice is durable.
type ExportRequest struct {
	Disk wire.DiskName
	On   bool
}

// RefuseRequest keeps every export closed, durably, while Reason is non-empty.
type RefuseRequest struct{ Reason string }

// LockRequest names the disk whose image is locked against QEMU, or let go;
// empty means all.
type LockRequest struct{ Disk wire.DiskName }

// SealRequest ends the generation here: Pos is the final position.
type SealRequest struct{ Pos delta.Pos }

// MarkRequest marks ranges of a disk, or everything when Disk is empty.
type MarkRequest struct {
	// Pos, with an empty Disk, is the replica's position everything is relative
	// to from now on (the tracker did not cover it).
	Pos    delta.Pos
	Disk   wire.DiskName
	Ranges []wire.Range
	Reason string
}

// CleanReply is what a clean step did.
type CleanReply struct {
	Base    delta.Pos
	Cleared int64 // regions dropped from the intent map
	Marked  int64 // regions still marked
}

// Counters are numbers for people who debug; names may change.
type Counters map[string]int64
