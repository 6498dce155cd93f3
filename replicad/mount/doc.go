// Package mount shows disks that must not change - a recovery point's - to NBD
// clients of this machine: read-only, or with a scratch overlay of a bounded
// size that ends with the mount.
//
// It guarantees that the disks below are only read, that nothing listens but a
// unix socket of root or the loopback interface, and that Close leaves neither
// connections nor files.
//
// The caller must keep the disks open until Close returned, and call Clean at
// its start for what a killed process left.
package mount
