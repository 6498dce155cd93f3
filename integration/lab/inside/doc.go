// Package inside is the part of the lab that runs within a pretend host: its
// process 1, which builds the host's view of the machine and keeps libvirtd
// alive, and the door through which a command enters a running host.
//
// It guarantees that everything of a host ends with its process 1: the host
// has a pid namespace of its own, so killing that process is a power cut.
//
// The caller starts process 1 with new mount, pid, uts, ipc and network
// namespaces and the descriptors named in Spec; package lab does.
package inside
