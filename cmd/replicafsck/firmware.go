package main

import (
	"context"
	"fmt"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/firmware"
	"kvmreplica/replicad/points"
)

// keepFirmware saves the firmware state of the position that is about to be
// promoted: sealing ends it. A guest that has none leaves nothing.
func (c *command) keepFirmware(s *points.Store, pos delta.Pos) error {
	if c.vmDir == "" {
		return nil // a bare directory: there is no record to keep it beside
	}
	blobs, err := s.Firmware(pos)
	if err != nil {
		return fmt.Errorf("read the firmware state: %w", err)
	}
	dir, err := fsx.OS(c.vmDir)
	if err != nil {
		return err
	}
	fw, err := firmware.Keep(dir, blobs)
	if err != nil {
		return err
	}
	if !fw.None() {
		fmt.Fprintf(c.out, "firmware    %d bytes kept in %s/%s; release writes them back\n", len(fw.NVRAM)+len(fw.TPM), c.vmDir, firmware.File)
	}
	return nil
}

// writeFirmware gives a recovered guest its UEFI variables and TPM state; once
// written they are the guest's own, so that the files go.
func (c *command) writeFirmware(ctx context.Context, h hypervisor, r vmRecord) error {
	state, err := fsx.OS(c.stateDir)
	if err != nil {
		return err
	}
	dir := fsx.Sub(state, "vms/"+string(r.VM))
	fw, err := firmware.Kept(dir)
	if err != nil {
		return err
	}
	if fw.None() {
		return nil
	}
	d, err := h.Domain(ctx, string(r.VM))
	if err != nil {
		return err
	}
	paths, err := d.FirmwarePaths(c.libvirtState)
	if err != nil {
		return err
	}
	if err := libvirt.WriteFirmware(paths, libvirt.FirmwareState(fw)); err != nil {
		return fmt.Errorf("write the firmware state back: %w", err)
	}
	if err := firmware.Drop(dir); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "firmware    %d bytes written back\n", len(fw.NVRAM)+len(fw.TPM))
	return nil
}
