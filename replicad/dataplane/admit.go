package dataplane

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"kvmreplica/replicad/wire"
)

// maxCmdline is more than the kernel lets QEMU's command line have in practice.
const maxCmdline = 1 << 20

// admit lets only the domain's own QEMU write (M5): NBD takes QEMU's image lock
// away, and whoever else writes through an export is a second writer. libvirt
// starts QEMU with "-uuid UUID", at a migration's destination too. A process
// that this one cannot see (another PID namespace) is admitted: nothing can be
// said of it. It keeps mistakes out, not an enemy: QEMU's user, who may open
// the socket, can write any command line.
func (p *Plane) admit(pid int) error {
	if p.cfg.AnyClient || pid == 0 {
		return nil
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("process %d is gone", pid)
		}
		return nil
	}
	defer f.Close() // reading only
	line, err := io.ReadAll(io.LimitReader(f, maxCmdline))
	if err != nil {
		return fmt.Errorf("process %d is gone", pid)
	}
	args := bytes.Split(line, []byte{0})
	for i, a := range args[:len(args)-1] {
		if string(a) == "-uuid" && string(args[i+1]) == string(p.cfg.VM) {
			return nil
		}
	}
	return &wire.Error{
		Kind: wire.KindRefused, Text: fmt.Sprintf("process %d (%.64q) is not the QEMU of %s, and nobody else may write to its disks", pid, args[0], p.cfg.Name),
		Hint: "for files: replicactl point mount; to let other programs write: any_client in replicad.toml",
	}
}
