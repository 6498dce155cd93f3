// Package overlay puts a guest's writes beside a disk instead of into it:
// copy-on-write devices over any read-only block.Device, such as a view of a
// replica's state.
//
// Scratch is for what may be lost: a test failover, a mount for writing. It
// lives in a file without a name, so that nothing of it outlives the process,
// or (OpenKept) in two files that outlive the process but not the boot.
//
// It guarantees that the device below is only read, that a granule of 4 KiB
// never reads as a mixture of below and above, and that a write beyond the
// quota fails with ErrQuota and leaves what was there.
//
// The caller must keep the device below open and unchanging until Close of the
// overlay returned; Close leaves it open.
package overlay
