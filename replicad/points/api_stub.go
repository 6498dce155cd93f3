package points

import (
	"context"
	"errors"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

var errTODO = errors.New("not built yet")

// Store is the replica store of one VM. Its methods are safe for concurrent use.
type Store struct{}

// Receive is one epoch on its way in. Not safe for concurrent use.
type Receive struct{}

// View is a committed state as read-only devices.
type View struct{}

// Create makes an empty store in state seeding; images may hold anything.
func Create(cfg Config, disks []delta.Disk) (*Store, error) { return nil, errTODO }

// CreateAt makes a store around images that are exactly at pos (the old
// primary's after a planned failover), without copying. A promoted store in
// the same directory is replaced.
func CreateAt(cfg Config, pos delta.Pos, disks []delta.Disk) (*Store, error) { return nil, errTODO }

// Open opens an existing store and repeats what a crash interrupted.
func Open(cfg Config) (*Store, error) { return nil, errTODO }

// Close ends the store; what was committed and not applied stays in the spool.
func (s *Store) Close() error { return errTODO }

// Status is a snapshot.
func (s *Store) Status() Status { return Status{} }

// Disks are the disks as of the committed position.
func (s *Store) Disks() []delta.Disk { return nil }

// Committed is the committed position, zero while seeding.
func (s *Store) Committed() delta.Pos { return delta.Pos{} }

// Begin starts or resumes receiving the epoch h opens.
func (s *Store) Begin(h delta.Header) (*Receive, error) { return nil, errTODO }

// Progress is the number of verified chunks kept of an epoch, 0 if unknown.
func (s *Store) Progress(g delta.Generation, epoch, nonce uint64) uint32 { return 0 }

// Forget drops the partial epoch, if any.
func (s *Store) Forget() error { return errTODO }

// Next is the first chunk wanted.
func (r *Receive) Next() uint32 { return 0 }

// Chunk verifies and keeps one chunk frame; it must be number Next.
func (r *Receive) Chunk(frame []byte) error { return errTODO }

// Commit verifies a manifest frame and makes the epoch durable.
func (r *Receive) Commit(frame []byte) (delta.Pos, error) { return delta.Pos{}, errTODO }

// CommitWait is Commit that waits while the backlog is at its limit.
func (r *Receive) CommitWait(ctx context.Context, frame []byte) (delta.Pos, error) {
	return delta.Pos{}, errTODO
}

// Stream feeds a whole stream, of which the header was read, and commits it.
func (r *Receive) Stream(ctx context.Context, d *delta.Decoder) (delta.Pos, error) {
	return delta.Pos{}, errTODO
}

// SeedChunk writes one chunk frame of a seed stream that h opened straight
// into the image; chunks of a disk come in ascending order from its cursor.
func (s *Store) SeedChunk(h *delta.Header, frame []byte) error { return errTODO }

// SeedFlush makes everything seeded durable and returns the cursors.
func (s *Store) SeedFlush() (map[string]int64, error) { return nil, errTODO }

// SeedCursor is the durable cursor of a disk.
func (s *Store) SeedCursor(disk string) (int64, error) { return 0, errTODO }

// SeedAssume declares an image's content to be a good seed as it is; the
// caller compares it by Digests with a zero position.
func (s *Store) SeedAssume(disk string) error { return errTODO }

// Step does one bounded piece of background work: apply a batch, close a
// point, thin points. did is false when there was nothing to do.
func (s *Store) Step(ctx context.Context) (did bool, err error) { return false, errTODO }

// Run steps until ctx ends, waiting when there is nothing to do.
func (s *Store) Run(ctx context.Context) error { return errTODO }

// ApplyAll applies everything committed.
func (s *Store) ApplyAll(ctx context.Context) error { return errTODO }

// Points lists the recovery points, oldest first.
func (s *Store) Points() []Point { return nil }

// View opens the state at pos: the committed position or a point's. It stays
// exact while epochs are applied, until it is closed.
func (s *Store) View(pos delta.Pos) (*View, error) { return nil, errTODO }

// Pos is the viewed position.
func (v *View) Pos() delta.Pos { return delta.Pos{} }

// Disk is one disk of the view, read-only; closing it does nothing.
func (v *View) Disk(name string) (block.Device, error) { return nil, errTODO }

// Close lets go of the state.
func (v *View) Close() error { return errTODO }

// Digests hashes ranges of a disk at pos, which must be the committed
// position (zero while seeding): BLAKE3 keyed, first 16 bytes.
func (s *Store) Digests(ctx context.Context, pos delta.Pos, disk string, key [32]byte, ranges []block.Range) ([][16]byte, error) {
	return nil, errTODO
}

// Promote durably ends the replica role at the committed position, which must
// be applied (ApplyAll), before the first guest write to the images.
func (s *Store) Promote(g delta.Generation, forced bool) (Seal, error) { return Seal{}, errTODO }

// PromoteAt rolls the images back to an older point and promotes there. After
// a crash it must be called again with the same arguments.
func (s *Store) PromoteAt(ctx context.Context, pos delta.Pos, g delta.Generation) (Seal, error) {
	return Seal{}, errTODO
}

// ChangedSince lists per disk the granules that differ, or may differ, between
// a point and the committed position; after PromoteAt, those rolled back.
func (s *Store) ChangedSince(pos delta.Pos) (map[string][]block.Range, error) { return nil, errTODO }

// Firmware is the firmware state at pos (a point's or the committed one).
func (s *Store) Firmware(pos delta.Pos) ([]delta.Blob, error) { return nil, errTODO }

// Pin keeps a point from being thinned or dropped, durably.
func (s *Store) Pin(pos delta.Pos) error { return errTODO }

// Unpin lets go of it.
func (s *Store) Unpin(pos delta.Pos) error { return errTODO }

// Discard ends the state suspect: the caller says the outside change counts
// for nothing. All points end and Status.VerifyAll is set.
func (s *Store) Discard() error { return errTODO }

// DropDamaged gives up committed epochs that cannot be read and goes back to
// the last good position; Status.VerifyAll is set.
func (s *Store) DropDamaged() error { return errTODO }

// Verified ends VerifyAll after the content was compared and mended.
func (s *Store) Verified() error { return errTODO }
