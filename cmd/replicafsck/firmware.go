package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

// The firmware state of a promotion lies in these files, beside the record,
// until it is written where libvirt looks for it. The daemon uses the same.
const (
	nvramFile = "promoted.nvram"
	tpmFile   = "promoted.tpm"
)

func blobFile(k delta.BlobKind) string {
	return map[delta.BlobKind]string{delta.BlobNVRAM: nvramFile, delta.BlobTPM: tpmFile}[k]
}

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
	for _, n := range []string{nvramFile, tpmFile} { // of an earlier promotion
		if err := dir.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, b := range blobs {
		if name := blobFile(b.Kind); name != "" {
			if err := fsx.WriteAtomic(dir, name, b.Data); err != nil {
				return fmt.Errorf("keep the firmware state: %w", err)
			}
			fmt.Fprintf(c.out, "firmware    %d bytes kept in %s/%s; release writes them back\n", len(b.Data), c.vmDir, name)
		}
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
	var fw libvirt.FirmwareState
	for _, f := range []struct {
		name  string
		limit int64
		to    *[]byte
	}{{nvramFile, libvirt.MaxNVRAM, &fw.NVRAM}, {tpmFile, libvirt.MaxTPM, &fw.TPM}} {
		b, err := fsx.ReadFile(dir, f.name, f.limit)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("read the kept firmware state: %w", err)
		}
		*f.to = b
	}
	if fw.NVRAM == nil && fw.TPM == nil {
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
	if err := libvirt.WriteFirmware(paths, fw); err != nil {
		return fmt.Errorf("write the firmware state back: %w", err)
	}
	for _, n := range []string{nvramFile, tpmFile} {
		if err := dir.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	fmt.Fprintf(c.out, "firmware    %d bytes written back\n", len(fw.NVRAM)+len(fw.TPM))
	return nil
}
