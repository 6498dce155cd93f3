// Package dataplane is the process that stands between one virtual machine and
// its disks: it serves them over NBD, tracks what changes (cbt), and hands
// frozen epochs, seed chunks and digests to whoever ships them.
//
// Two roles of the same binary share the work. The keeper owns the listening
// sockets and starts the data plane again whenever it dies, so that a client's
// connect() never fails; it holds no data and outlives the daemon. The data
// plane holds the image locks, the tracker and the exports.
//
// It guarantees that no export serves before the image locks are held and the
// tracker is open, that a durable refusal keeps exports closed across restarts,
// that an epoch's frames are the same bytes of content however often they are
// asked for (or the epoch is lost: the guest overwrote more than was kept), and that Ack takes only a digest the data plane computed itself.
//
// Callers talk to it through Client, on a socket only its owner may open; every
// method may be repeated. Errors are *wire.Error. See docs/formats/control.md.
package dataplane
