package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// vmRecord is the part of a VM's record that breaking the glass needs. The
// daemon's own type is not used: it would bring the daemon along.
type vmRecord struct {
	Version   int             `json:"version"`
	VM        wire.VMID       `json:"vm"`
	Name      string          `json:"name"`
	Lineage   lineage.Lineage `json:"lineage"`
	Disks     []vmDisk        `json:"disks"`
	Native    bool            `json:"native"`
	Autostart bool            `json:"autostart"`
	// Superseded says that the other host was promoted.
	Superseded string `json:"superseded"`
}

// vmDisk is one disk of the record.
type vmDisk struct {
	Name     wire.DiskName         `json:"name"`
	Kind     string                `json:"kind"`
	Path     string                `json:"path"`
	Original *libvirt.DiskOriginal `json:"original"`
	Size     int64                 `json:"size"`
	// State is empty for a disk that is protected and whole; Out says that the
	// state the VM was failed over to did not have it.
	State string `json:"state"`
	Out   bool   `json:"out"`
	// Joins are the commits of the store in which the disk was not whole.
	Joins []struct {
		From uint64 `json:"from"`
		To   uint64 `json:"to"` // 0: the daemon has not seen the one with all of it
	} `json:"joins"`
}

// partial reports that a state of the store, in which the disk has size bytes,
// has only a part of it.
func (d vmDisk) partial(ordinal uint64, size int64) bool {
	for _, j := range d.Joins {
		if j.From <= ordinal && (j.To == 0 && size != d.Size || ordinal < j.To) {
			return true
		}
	}
	return false
}

const (
	recordVersion = 1
	recordFile    = "record.json"
	planFile      = "plan.json"
	maxRecord     = 4 << 20
)

// errUnknown: no such VM in the state directory.
var errUnknown = errors.New("no such VM")

// records reads every VM's record; what cannot be read is an error beside the
// others, named by its directory.
func records(stateDir string) ([]vmRecord, error) {
	state, err := fsx.OS(stateDir)
	if err != nil {
		return nil, fmt.Errorf("%w (is --state-dir right?)", err)
	}
	names, err := state.List("vms")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	sort.Strings(names)
	var out []vmRecord
	var errs []error
	for _, n := range names {
		r, err := readRecord(fsx.Sub(state, "vms/"+n))
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err == nil && string(r.VM) != n:
			errs = append(errs, fmt.Errorf("%s/vms/%s holds the record of %s", stateDir, n, r.VM))
		case err != nil:
			errs = append(errs, fmt.Errorf("%s/vms/%s: %w", stateDir, n, err))
		default:
			out = append(out, r)
		}
	}
	return out, errors.Join(errs...)
}

func readRecord(dir fsx.FS) (vmRecord, error) {
	var r vmRecord
	if err := fsx.ReadJSON(dir, recordFile, maxRecord, &r); err != nil {
		return r, fmt.Errorf("read the VM's record: %w", err)
	}
	if r.Version != recordVersion {
		return r, fmt.Errorf("the VM's record has version %d, this build knows %d", r.Version, recordVersion)
	}
	return r, r.Lineage.Validate()
}

// find picks a VM by name or UUID.
func find(all []vmRecord, name string) (vmRecord, error) {
	i := slices.IndexFunc(all, func(r vmRecord) bool { return r.Name == name || string(r.VM) == strings.ToLower(name) })
	if i < 0 {
		return vmRecord{}, fmt.Errorf("%w: %q", errUnknown, name)
	}
	return all[i], nil
}

// storeOf is where a VM's replica store lies, with its images.
func (c *command) storeOf(r vmRecord) string {
	for _, d := range r.Disks {
		if _, ok := c.images[string(d.Name)]; !ok && d.Path != "" {
			c.images[string(d.Name)] = d.Path
		}
	}
	return filepath.Join(c.stateDir, "vms", string(r.VM), "store")
}

// remember takes what the record beside a store says of disks that were being
// added. A store without one, such as a copy of recovery points, knows of none.
func (c *command) remember(dir string) {
	if filepath.Base(dir) != "store" {
		return
	}
	vm, err := fsx.OS(filepath.Dir(dir))
	var r vmRecord
	if err == nil {
		r, err = readRecord(vm)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(c.out, "warning     whether a disk was still being added is not known: %v\n", err)
	}
	c.known = r.Disks
}

// whole leaves out of the disks of a state those that were still being added,
// and says so.
func (c *command) whole(disks []delta.Disk, ordinal uint64) []delta.Disk {
	return slices.DeleteFunc(slices.Clone(disks), func(k delta.Disk) bool {
		i := slices.IndexFunc(c.known, func(d vmDisk) bool { return string(d.Name) == k.Name })
		if i < 0 || !c.known[i].partial(ordinal, k.Size) {
			return false
		}
		fmt.Fprintf(c.out, "left out    %s was still being added: the replica has only a part of it\n", k.Name)
		return true
	})
}

// replicaDir turns the name of a VM into the directory of its store; a
// directory stays what it is.
func (c *command) replicaDir(target string) (string, error) {
	if _, err := os.Stat(target); err == nil || strings.Contains(target, "/") {
		return target, nil
	}
	all, err := records(c.stateDir)
	r, ferr := find(all, target)
	if ferr != nil {
		return "", errors.Join(fmt.Errorf("%q is neither a directory nor a VM of %s", target, c.stateDir), err)
	}
	c.vmDir = filepath.Join(c.stateDir, "vms", string(r.VM))
	return c.storeOf(r), nil
}
