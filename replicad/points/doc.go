// Package points is the replica store of one VM: it receives epochs into a
// spool, commits them with one sync, applies them to plain raw images behind a
// first-touch undo, and offers every recovery point, and the newest committed
// state, as read-only devices.
//
// It guarantees, through any crash: the committed content R(c) of all disks is
// exact; what Commit acknowledged is never missing; every listed point reads
// bit for bit as it was committed; damage is reported, never read as data. The
// files are specified in docs/formats/points.md; everything can be rebuilt
// from them and the images alone.
//
// The caller must (1) let nobody else write the images, (2) call Step (or run
// Run) so that what was committed is applied, (3) close a store after ErrFailed
// and open it again, which repeats whatever was under way, and (4) stop
// receiving before Promote.
package points
