// Package upgrade holds the campaign against the upgrade of a data plane: real
// processes hand a verified load of many connections on, and are killed at
// every step of it. The oracle judges the guest's disks and every epoch.
//
// A few upgrades run by default; KVMREPLICA_UPGRADES=N asks for N.
package upgrade
