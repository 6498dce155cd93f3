// Package lab makes two pretend KVM hosts, A and B, on one machine, for tests
// and for the demonstration.
//
// Each host has its own process, mount, network, uts and ipc namespaces, its
// own /etc/libvirt, /var/lib/libvirt, /var/cache/libvirt, /var/log/libvirt,
// /etc/replicad and /var/lib/replicad (kept over a restart), its own /run and
// /dev/shm (lost with it), its own boot id, machine id and host UUID, and a
// libvirtd of the machine's distribution. A virtual switch joins them:
// A is 10.77.0.1, B is 10.77.0.2. Nothing of that is visible in the machine's own
// network namespace, so labs never disturb each other or the machine.
//
// Host.Crash is a power cut of everything that runs in a host, with one
// exception: the machine's page cache survives it, since there is one kernel.
//
// The caller must be root on Linux (Missing says what else is needed) and must
// call Down. A lab that is not kept (Options.Keep) ends by itself when the
// process that made it dies. The mount points /etc/replicad and
// /var/lib/replicad are made when absent and stay behind, empty.
package lab
