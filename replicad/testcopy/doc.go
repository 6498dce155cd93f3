// Package testcopy runs test failovers: copies of a protected VM that start from
// any recovery point on the replica's host, beside the replication that goes on.
//
// It guarantees that a copy has its own name, UUID, addresses, firmware state
// and disks (its writes go into a scratch overlay with a quota, and end with
// it); that its guest does not run an instruction before the network it is in
// is proven to lead nowhere, unless the caller asked for a network of this
// host, and that it is destroyed when that stops being true; that whatever is
// made for a copy is in a journal before it is made, so that Stop, or the next
// start of the daemon, takes everything away again, however far it got; and
// that neither the replica, its points nor the host's storage suffer from it.
//
// Callers open one Manager per state directory, call Run, and end it before
// they close the stores the copies read from.
package testcopy
