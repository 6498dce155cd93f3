// Package guest makes the lab's guest: a kernel and an initramfs to boot by
// themselves, disk images, and the libvirt definition that goes with them.
//
// Build guarantees a kernel of Debian's cloud flavour (fetched once with
// apt-get and kept in the lab's cache) and an initramfs with the modules it
// needs, labinit as process 1, busybox, e2fsck, mke2fs and the guest agent. The
// result's names carry a digest of the content, so that a change of labinit is
// never missed and two test runs may build at the same time.
//
// The caller runs the guest under QEMU without KVM (type 'qemu'), with at
// least 128 MiB, and follows it with package console.
package guest
