// Package media carries the content of a VM's disks on an external medium: an
// export writes them into a directory, an import makes raw images of it on the
// replica's host, which the initial copy then compares with the disks.
//
// It guarantees that an interrupted export or import goes on at the first piece
// that was not complete, that whatever an import hands out was verified (BLAKE3
// of the content, and age's authentication when the medium is encrypted), that
// a damaged, foreign or incomplete medium is refused with the file's name, and
// that no image appears under its name before all of it is durable.
//
// An export is fuzzy: the guest may write meanwhile. Its caller must therefore
// never take an import for the disks' content at any moment, but compare it.
package media
