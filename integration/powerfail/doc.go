// Package powerfail cuts the power of real kernels. A host's role runs inside a
// throw-away machine (package micro) whose disk sits on package cutdisk, with
// ext4, XFS or btrfs on it. QEMU is killed in the middle of the work, the disk
// keeps one legal subset of what was not flushed, the machine boots again from
// that, the role recovers, and the oracle judges.
//
// Two roles are cut:
//
//   - primary: the product's data plane (replicad keeper, replicad dataplane)
//     serves and tracks an image in the guest. Load, session and replica store
//     are on the host and outlive the cut. Checked after each cut: nothing that
//     was flushed is missing; the replica holds a legal cut; wherever image and
//     replica differ, the tracker says dirty; what is then shipped makes both
//     equal, and the comparison found nothing that tracking had missed.
//   - replica: the product's store (cutstore) keeps images, spool and points in
//     the guest; the host plays the primary. Checked after each cut: every
//     acknowledged epoch is there, every point listed before is listed and
//     reads as it was, nothing is damaged, and the next epoch is accepted.
//
// One seed makes one life: a new disk, a role, a file system, a few cuts. The
// moments of the cuts are the machine's; everything else follows from the seed.
package powerfail
