package libvirt

import (
	"fmt"
	"slices"
	"strings"
)

// Reason codes of Refuse; stable.
const (
	RefuseLUKS       = "encrypted"
	RefuseCopyOnRead = "copy-on-read"
	RefuseThrottle   = "throttled"
	RefuseIOThreadVQ = "iothread-mapping"
	RefuseBacking    = "backing-chain"
	RefuseFormat     = "format"
	RefuseBlockJob   = "block-job"
	RefuseShareable  = "shareable"
	RefuseReadOnly   = "read-only"
	RefuseTransient  = "transient"
	RefuseSource     = "source"
	RefuseBus        = "bus"
	RefuseSlices     = "slices"
	RefuseDomain     = "domain"
)

// RefuseReason says why a disk cannot be put on an export under a running
// guest, and the way out.
type RefuseReason struct {
	Target string
	Code   string
	Text   string
	Remedy string
}

// String is one line for a person.
func (r RefuseReason) String() string {
	s := r.Text
	if r.Target != "" {
		s = "disk " + r.Target + ": " + s
	}
	if r.Remedy != "" {
		s += "; " + r.Remedy
	}
	return s
}

// Refuse lists everything that speaks against inserting an export under the
// given disks of a running domain (live document). Nothing proven is missing
// from this list on purpose: whatever was not tried on a running guest is
// refused.
func Refuse(d Domain, targets ...string) []RefuseReason {
	var out []RefuseReason
	for _, note := range d.Notes {
		if note == "launchSecurity" {
			out = append(out, RefuseReason{Code: RefuseDomain, Text: "the guest's memory is encrypted (launchSecurity); this was not tried", Remedy: "enable it while the guest is off"})
		}
	}
	for _, t := range targets {
		k, ok := d.Disk(t)
		if !ok {
			out = append(out, RefuseReason{Target: t, Code: RefuseSource, Text: "the domain has no such disk"})
			continue
		}
		out = append(out, refuseDisk(k)...)
	}
	return out
}

func refuseDisk(k Disk) []RefuseReason {
	const off = "shut the guest down and enable it while it is off"
	var out []RefuseReason
	no := func(cond bool, code, text, remedy string) {
		if cond {
			out = append(out, RefuseReason{Target: k.Target, Code: code, Text: text, Remedy: remedy})
		}
	}
	no(k.Device != "disk", RefuseReadOnly, fmt.Sprintf("it is a %s", k.Device), "leave it out")
	no(k.ReadOnly, RefuseReadOnly, "it is read-only", "leave it out; copy its image to the replica once")
	no(k.Kind != SourceFile && k.Kind != SourceBlock, RefuseSource, fmt.Sprintf("its source is %q, not a file or a block device", k.Kind), "")
	no(k.Format != "raw", RefuseFormat, fmt.Sprintf("its format is %q, not raw", k.Format), "move it to raw live: virsh blockcopy --format raw --pivot")
	no(k.Backing > 0, RefuseBacking, fmt.Sprintf("it has a backing chain of %d", k.Backing), "merge it: virsh blockcommit or blockpull")
	no(k.Encrypted, RefuseLUKS, "QEMU encrypts it", "encrypt inside the guest or below the image instead")
	no(k.CopyOnRead, RefuseCopyOnRead, "copy_on_read is on", "remove copy_on_read from its driver and restart the guest")
	no(k.Throttled, RefuseThrottle, "it has I/O limits (iotune)", "clear them: virsh blkdeviotune with zeros, then restart the guest; limit in replicad instead")
	no(k.IOThreadMapping, RefuseIOThreadVQ, "its queues are spread over several iothreads", off)
	no(k.Mirror, RefuseBlockJob, "a block job is running on it", "wait for it or abort it: virsh blockjob --abort")
	no(k.Shareable, RefuseShareable, "it is shareable: another writer would not be seen", "")
	no(k.Transient, RefuseTransient, "it is transient: its changes are thrown away", "leave it out")
	no(k.Slices, RefuseSlices, "only a slice of its image is used", off)
	no(!slices.Contains(liveBuses(), k.Bus), RefuseBus, fmt.Sprintf("inserting under a running %s disk was not proven", k.Bus), off)
	no(k.Bus == "scsi" && k.ControllerModel != "virtio-scsi", RefuseBus, fmt.Sprintf("its SCSI controller is %q; only virtio-scsi was proven", k.ControllerModel), off)
	no(k.ControllerIOThread != 0, RefuseBus, "its SCSI controller has an iothread; this was not proven", off)
	no(len(k.Target) > 16, RefuseSource, "its target name is too long", "")
	return out
}

// liveBuses are those on which inserting and removing under load was proven.
func liveBuses() []string { return []string{"virtio", "scsi"} }

// RefusedError is returned when InsertDisks does not even begin.
type RefusedError struct{ Reasons []RefuseReason }

// Error lists all reasons.
func (e *RefusedError) Error() string {
	var l []string
	for _, r := range e.Reasons {
		l = append(l, r.String())
	}
	return "the disks cannot be protected under the running guest: " + strings.Join(l, "; ")
}

// Is makes errors.Is(err, ErrState) true.
func (e *RefusedError) Is(target error) bool { return target == ErrState }
