// Package kvm tests the whole product with real guests: two hosts of package
// lab, a replicad on each, and a guest that writes, is replicated, and is
// failed over while power, links and processes are taken away.
//
// Every test ends by booting a copy and reading the guest's own verdict (see
// packages record and console of the lab): no gap, no damage, and nothing
// missing that was acknowledged as replicated. A test here takes 20 to 60
// seconds; at most two guests run at once.
package kvm
