// Package delta is the format in which changes travel, lie in the spool and
// leave on external disks: a header frame, chunk frames, and a manifest frame
// that names the resulting position. The bytes are specified in
// docs/formats/delta.md.
//
// It guarantees that the chunks of an epoch depend on the frozen ranges and
// their content alone, so that a stream cut at chunk k can be sent again from
// chunk k; that whatever a decoder returns was bounded before it was allocated
// and verified (CRC32C of the frame, BLAKE3-256 of the content); and that a
// position names one history, because a manifest's digest covers its parent's.
//
// The caller must (1) hand ChunkEncoder reads of one cut only, (2) keep the
// Tally of an epoch across link cuts, (3) treat every error as the end of that
// stream, and (4) compare the position the receiver returns with its own.
package delta
