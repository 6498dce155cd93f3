// Package kvm tests the whole product as a person uses it: two hosts with real
// libvirtd and QEMU, real Linux guests that append fsynced records, replicactl
// and virsh as the only levers.
//
// It guarantees nothing to anybody: it holds tests only. They need root and
// the tools of "make deps", and skip with the reason where those are missing.
package kvm
