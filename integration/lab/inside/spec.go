package inside

// Descriptors that process 1 and Enter inherit from the lab.
const (
	// FDGo carries one byte when the network of the host is wired.
	FDGo = 3
	// FDStatus takes one line: "ready", or why the host did not come up.
	FDStatus = 4
	// FDLifeline is open for as long as the host shall live; end of file on
	// it ends the host. Absent for hosts that outlive their maker.
	FDLifeline = 5
	// FDPid takes the process number of a command started by Enter.
	FDPid = 3
	// FDFailure takes the reason why Become could not start a program.
	FDFailure = 3
)

// Spec is what process 1 of a host is told, as JSON in its only argument.
type Spec struct {
	// Hostname is the host's name in its own uts namespace.
	Hostname string
	// Wire makes this process hold a network namespace and nothing else.
	Wire bool
	// Binds are the host's own directories, mounted over the machine's.
	Binds []Bind
	// BootID and MachineID replace the kernel's and the machine's, so that a
	// restart of the host looks like one and two hosts differ.
	BootID, MachineID string
	// Tied says that FDLifeline is there.
	Tied bool
	// ScratchDir is a directory of the host for files that process 1 writes.
	ScratchDir string
	// Libvirtd is the program to keep running; empty for none.
	Libvirtd string
}

// Bind mounts Source over Target. Target is made when it is missing.
type Bind struct{ Source, Target string }

// HoldLibvirtd is a file of the host: while it is there process 1 does not
// start libvirtd again.
const HoldLibvirtd = "/run/lab.hold-libvirtd"

// LibvirtSocket is where libvirtd listens, as seen inside a host.
const LibvirtSocket = "/run/libvirt/libvirt-sock"

// LibvirtPIDFile holds libvirtd's process number, as seen inside a host.
const LibvirtPIDFile = "/run/libvirt/libvirtd.pid"
