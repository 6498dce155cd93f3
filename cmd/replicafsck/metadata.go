package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// fromMetadata rebuilds what a release needs from the domain's own definition:
// the state directory may be what was lost.
func fromMetadata(ctx context.Context, h hypervisor, name string) (vmRecord, error) {
	id, err := h.LookupName(ctx, name)
	if errors.Is(err, libvirt.ErrNotFound) {
		id = name
	} else if err != nil {
		return vmRecord{}, err
	}
	text, err := h.Metadata(ctx, id)
	if errors.Is(err, libvirt.ErrNotFound) || errors.Is(err, libvirt.ErrInvalid) {
		return vmRecord{}, fmt.Errorf("%w: %q is neither in the state directory nor a protected domain of libvirt", errUnknown, name)
	}
	if err != nil {
		return vmRecord{}, err
	}
	var m struct {
		Role  lineage.State `json:"role"`
		Disks []vmDisk      `json:"disks"`
		// Autostart is missing in definitions of earlier builds.
		Autostart bool `json:"autostart"`
	}
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		return vmRecord{}, fmt.Errorf("read the metadata of %s: %w", name, err)
	}
	return vmRecord{VM: wire.VMID(id), Name: name, Lineage: lineage.Lineage{State: m.Role}, Disks: m.Disks, Autostart: m.Autostart}, nil
}
