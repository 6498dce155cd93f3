// Package libvirt is the only part of the product that talks to libvirtd and
// to QEMU's monitor. Values go in, values come out, every call has a context
// and a deadline, and nothing of the product is imported.
//
// It guarantees that a call which outlives its deadline never blocks another
// one (the connection it hangs on is retired and replaced), that errors are
// told apart by number (KindOf, errors.Is), that a domain's own XML is changed
// only in the byte ranges a caller asked for, and that XML for a peer's domain
// is rendered from an allow-list and local policy only.
//
// The caller must: treat an *Error with Unknown set as "may have happened" and
// look again; never call Suspend, Quiesce or a save while its own NBD end does
// not answer (QEMU's main loop drains and hangs until it does); start the
// export before InsertDisks; and compare Graph after every start, resume and
// migration, because libvirt's own idea of a disk may be stale.
package libvirt
