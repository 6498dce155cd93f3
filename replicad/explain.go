package replicad

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/wire"
)

// explain gives an error that a person can mend its kind and the next command.
// The innermost cause knows nothing of commands, and whoever passed it on does
// not know what it was.
func (d *Daemon) explain(err error, vm string) error {
	var w *wire.Error
	if err == nil || errors.As(err, &w) && w.Hint != "" {
		return err
	}
	as := func(k wire.Kind, format string, a ...any) error {
		return &wire.Error{Kind: k, Text: err.Error(), Hint: fmt.Sprintf(format, a...)}
	}
	switch {
	case errors.Is(err, libvirt.ErrUnavailable):
		return as(wire.KindUnavailable, "systemctl status libvirtd virtqemud")
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return as(wire.KindNoSpace, "free space for %s: df -h %s", d.cfg.StateDir, d.cfg.StateDir)
	case errors.Is(err, peer.ErrExpired), errors.Is(err, peer.ErrNotYetValid):
		return as(wire.KindRefused, "renew the certificate, check both clocks, then: replicactl peer test PEER")
	case errors.Is(err, libvirt.ErrNotFound) && vm != "":
		return as(wire.KindNotFound, "virsh list --all; is the domain still defined?")
	}
	return err
}
