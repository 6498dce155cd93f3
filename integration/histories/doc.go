// Package histories plays random failover histories on the real product: two
// hosts of the lab with their own libvirtd, a replicad on each, replicactl and
// virsh as the only levers, and a QEMU guest that writes a record at every tick
// of its clock.
//
// A history is drawn from a seed: kills, power cuts, a cut link, planned and
// unplanned failovers, trials committed and cancelled, returns, hosts put back
// to an earlier state. Then the faults stop, and an operator does what status
// and health tell him until one host owns the VM and the other has a complete
// copy. All along these must hold: two guests never run unless a person forced
// it; whatever a guest finds on its disk is exactly what some line of writers
// had written up to one record; it has everything that its host was known to
// hold; a fork is shown by both hosts.
//
// The guest (testdata/recorder.S) is one sector of machine code, so that a start
// takes a second. Its console, which survives every crash, is the record of
// what was answered. The order of steps is the seed's, timing is the machine's.
package histories
