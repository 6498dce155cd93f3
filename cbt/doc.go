// Package cbt records which parts of a VM's disks changed, so that no changed
// block is ever missed, whatever fails and whenever it fails. One Group tracks
// all disks of one VM in one process; each Disk is a block.Device in front of
// the real one; an Epoch is one cut over all of them.
//
// # The rule
//
// Mark before write; clear only on proof. Before the first byte of a write is
// handed to the kernel, every 1 MiB region it touches is durably marked in the
// intent map (an fdatasync has returned), and every 4 KiB granule it touches
// has its bit in the active bitmap. Bits leave a bitmap in two ways only: a
// whole frozen bitmap is dropped when the replica acknowledged exactly that
// epoch, or a granule was compared with the replica's committed content and
// was not written since the comparison began. (What Epoch.Keep takes out of an
// epoch goes from the frozen bitmap to the active one: it stays dirty, and its
// region counts as written after the cut.) A region leaves the map only
// when none of its granules is dirty, nothing is in flight to it, the replica
// acknowledged the last epoch that wrote to it, the image was synced after
// that, and the acknowledged position is durable as the base.
//
// What a restart finds, best first: the exact set (clean stop), the exact set
// from a copy in boot-scoped shared memory (the process was killed), the
// marked regions (power loss), everything (any doubt). The cost of a doubt is
// reading, never data. A disk that was not tracked before is all dirty, and
// none of it suspect; the others are known as if nothing had been added or
// left out.
//
// # What the caller must do
//
//  1. Hold the image locks before Open and until after Close.
//  2. Route every write through the Disk; nothing else may touch the image.
//  3. Call CleanStep every 30 seconds, or the map only grows.
//  4. Call Ack with a position whose digest it verified against its own, or
//     Abandon, for every Epoch; after a handshake, Adopt.
//  5. After a start with suspect bytes: compare with the replica
//     (BeginCompare, EndCompare) or simply ship them.
//  6. Treat an error of Disk.Sync as final, as with any block.Device.
//
// # Size arithmetic
//
// A fine bitmap takes one bit per 4 KiB: 2^40 / 2^12 / 8 = 32 MiB per TiB,
// allocated page by page as regions are marked; two of them (active, frozen),
// and a third after an unclean start (suspect). Its summary takes one bit per
// 64 words of 64 granules: 8 KiB per TiB. The intent map takes one bit per
// 1 MiB: 128 KiB per TiB, twice on disk (a page of 4 KiB holds 504 words =
// 32,256 regions = 31.5 GiB). The last epoch that wrote to a region: 4 bytes
// per region = 4 MiB per TiB. Captured old content: Config.CaptureBytes.
//
// # Lock order
//
// cleanMu, cutMu, range locks, intent leader, metaMu, gate, then leaf mutexes.
// A write waits only in the order ranges, intent, tag, capture; nothing that
// holds a later one waits for an earlier one.
package cbt
