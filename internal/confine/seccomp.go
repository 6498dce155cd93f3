package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// forbidden are the system calls that a confined process has no use for: they
// reach into other processes, into the kernel, into the tree of mounts, or
// change who the process is.
var forbidden = []uint32{
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD, unix.SYS_KCMP,
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_REBOOT,
	unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_SYSLOG, unix.SYS_QUOTACTL,
	unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT,
	unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, unix.SYS_OPEN_BY_HANDLE_AT,
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_MKNODAT,
	unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID, unix.SYS_SETRESGID, unix.SYS_SETGROUPS,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME, unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	unix.SYS_PERSONALITY,
}

// namespaces are clone's flags that make a namespace.
const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// Offsets in struct seccomp_data, on a little-endian machine.
const (
	dataNumber   = 0
	dataArch     = 4
	dataArgument = 16 // the first one's low word
)

// x32 marks system calls of another numbering on x86-64.
const x32 = 0x40000000

// filterCalls forbids the calling thread what it has no use for. What is
// forbidden fails, with EPERM.
func filterCalls(network bool) error {
	arch, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("nobody has written a filter for %s", runtime.GOARCH)
	}
	prog := program(arch, network)
	filter := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&filter))); errno != 0 {
		return errno
	}
	return nil
}

// program is the filter.
func program(arch uint32, network bool) []unix.SockFilter {
	var p []unix.SockFilter
	do := func(code uint16, k uint32, yes, no uint8) {
		p = append(p, unix.SockFilter{Code: code, Jt: yes, Jf: no, K: k})
	}
	load := func(at uint32) { do(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, at, 0, 0) }
	give := func(k uint32) { do(unix.BPF_RET|unix.BPF_K, k, 0, 0) }
	fail := func(e unix.Errno) { give(unix.SECCOMP_RET_ERRNO | uint32(e)) }
	// when does what follows only if the loaded word compares so; n is its length.
	when := func(cmp uint16, k uint32, n uint8) { do(unix.BPF_JMP|cmp|unix.BPF_K, k, 0, n) }

	load(dataArch)
	do(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, arch, 1, 0)
	fail(unix.EPERM)
	load(dataNumber)
	if arch == unix.AUDIT_ARCH_X86_64 {
		when(unix.BPF_JGE, x32, 1)
		fail(unix.EPERM)
	}
	for _, n := range forbidden {
		when(unix.BPF_JEQ, n, 1)
		fail(unix.EPERM)
	}
	// Its flags lie in memory, where a filter cannot look; libraries use clone then.
	when(unix.BPF_JEQ, unix.SYS_CLONE3, 1)
	fail(unix.ENOSYS)
	when(unix.BPF_JEQ, unix.SYS_CLONE, 4)
	load(dataArgument)
	when(unix.BPF_JSET, namespaces, 1)
	fail(unix.EPERM)
	give(unix.SECCOMP_RET_ALLOW)
	if !network {
		when(unix.BPF_JEQ, unix.SYS_SOCKET, 4)
		load(dataArgument)
		when(unix.BPF_JEQ, unix.AF_UNIX, 1)
		give(unix.SECCOMP_RET_ALLOW)
		fail(unix.EPERM)
	}
	give(unix.SECCOMP_RET_ALLOW)
	return p
}
