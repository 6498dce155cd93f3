package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/breakglass"
	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
)

// releaseTimeout bounds one VM's release.
const releaseTimeout = 2 * time.Minute

// hypervisor is what a release needs of libvirt.
type hypervisor interface {
	LookupName(ctx context.Context, name string) (uuid string, err error)
	DomainState(ctx context.Context, uuid string) (libvirt.State, libvirt.Reason, error)
	XML(ctx context.Context, uuid string, k libvirt.XMLKind) ([]byte, error)
	Define(ctx context.Context, doc []byte) (uuid string, err error)
	SetAutostart(ctx context.Context, uuid string, on bool) error
	Domain(ctx context.Context, uuid string) (libvirt.Domain, error)
	HasSaved(ctx context.Context, uuid string) (bool, error)
	Metadata(ctx context.Context, uuid string) (string, error)
}

// release gives domains their own disks back without any daemon.
func (c *command) release(names []string) error {
	if c.all == (len(names) > 0) {
		return fmt.Errorf("%w: release wants names of VMs, or --all", errUsage)
	}
	unlock, err := c.claim()
	if err != nil {
		return err
	}
	defer unlock()
	ctx := context.Background()
	host, err := libvirt.Dial(ctx, libvirt.Options{Socket: c.socket})
	if err != nil {
		return err
	}
	defer host.Close()
	all, damaged := records(c.stateDir)
	if c.all {
		errs := []error{damaged}
		for _, r := range all {
			errs = append(errs, c.releaseOne(ctx, host, r))
		}
		return errors.Join(errs...)
	}
	var errs []error
	for _, n := range names {
		r, err := find(all, n)
		if err != nil {
			if r, err = fromMetadata(ctx, host, n); err != nil {
				err = errors.Join(err, damaged)
			} else if !c.force {
				err = fmt.Errorf("release %s: its record is lost, so nobody knows whether this host owns the VM; when it certainly does, repeat with --force", n)
			}
		}
		if err == nil {
			err = c.releaseOne(ctx, host, r)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// claim makes sure that no daemon works on the same state, and keeps one from
// starting meanwhile.
func (c *command) claim() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(c.stateDir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("claim the state directory: %w (is --state-dir right?)", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if c.force && errors.Is(err, unix.EWOULDBLOCK) {
			fmt.Fprintln(c.out, "warning     replicad runs; what is released stays so until it is started again")
			return func() { _ = f.Close() }, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("replicad runs; use: replicactl vm disable NAME; or stop it: systemctl stop replicad; or release under it with --force")
		}
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// releaseOne releases one VM. Everything that can be refused is refused before
// anything is changed; the mark of distrust comes first of all changes.
func (c *command) releaseOne(ctx context.Context, h hypervisor, r vmRecord) error {
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	fail := func(err error) error { return fmt.Errorf("release %s: %w", r.Name, err) }
	id := string(r.VM)
	if err := c.mayRelease(r); err != nil {
		return fail(err)
	}
	if err := guestOff(ctx, h, r); err != nil {
		return fail(err)
	}
	if err := c.mark(r); err != nil {
		return fail(err)
	}
	gates := []string{filepath.Join(c.stateDir, "hook", id), filepath.Join(c.runDir, "hook", id)}
	if err := shutGate(gates); err != nil {
		return fail(err)
	}
	err := guestOff(ctx, h, r) // it may have been started before the gate was shut
	if err == nil {
		err = c.stopPlane(ctx, r)
	}
	if err == nil {
		err = restoreDomain(ctx, h, r)
	}
	if err == nil && r.Lineage.State == lineage.Replica {
		err = c.writeFirmware(ctx, h, r)
	}
	if err == nil {
		err = openGate(gates)
	}
	if err != nil {
		return fail(fmt.Errorf("%w; its start is refused until the release is repeated: replicafsck release %s", err, r.Name))
	}
	fmt.Fprintf(c.out, "released    %s stands on its own images; start it with: virsh start %s\n", r.Name, r.Name)
	fmt.Fprintf(c.out, "            it is not protected now; once replicad runs and the guest is off, protection resumes and compares by digest\n")
	return nil
}

// mayRelease refuses roles in which this host's images are not the VM's.
func (c *command) mayRelease(r vmRecord) error {
	switch r.Lineage.State {
	case lineage.Primary, lineage.Promoted:
	case lineage.Replica:
		if err := c.recovered(r); err != nil {
			return err
		}
	default:
		return fmt.Errorf("a failover was interrupted (this host is %s), so the VM may run on the other host; start replicad and run: replicactl failover resume %s", r.Lineage.State, r.Name)
	}
	if info, err := onTrial(c.storeOf(r)); err != nil {
		return err
	} else if info != nil {
		return fmt.Errorf("a failover to %v is not final: what its guest wrote is not in the images; first: replicafsck recover %s --in-place --keep-writes", info.Head.At, r.Name)
	}
	if d := r.Lineage.Diverged; d != nil && !c.force {
		return fmt.Errorf("both hosts changed this VM (%s); when this host's copy is the one to use, repeat with --force", d.Reason)
	}
	if r.Superseded != "" && !c.force {
		return fmt.Errorf("the other host may own this VM (%s); when this host's copy is the one to use, repeat with --force", r.Superseded)
	}
	if len(r.Disks) == 0 {
		return errors.New("its record names no disks")
	}
	for _, d := range r.Disks {
		// One that is being added may not stand on its export yet; one that is
		// away, or of which a replica has not all, never did.
		if d.Original == nil && d.State == "" && !d.Out {
			return fmt.Errorf("nothing is kept of the original source of disk %s: protection was never completed; the definition is unchanged", d.Name)
		}
	}
	state, err := fsx.OS(c.stateDir)
	if err != nil {
		return err
	}
	if j, err := failover.Load(fsx.Sub(state, "vms/"+string(r.VM)), planFile); err != nil || j != nil {
		fmt.Fprintf(c.out, "warning     a plan of %s was interrupted; replicad settles it when it runs again\n", r.Name)
	}
	return nil
}

// recovered refuses a replica that was not promoted.
func (c *command) recovered(r vmRecord) (err error) {
	c.images = map[string]string{}
	s, _, err := c.open(c.storeOf(r), true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if s.Status().State != points.Promoted {
		return fmt.Errorf("this host keeps a replica; when the primary is certainly lost, first: replicafsck recover %s --in-place", r.Name)
	}
	return nil
}

// guestOff refuses a guest that runs, and a saved state that would come back
// on the exports.
func guestOff(ctx context.Context, h hypervisor, r vmRecord) error {
	st, _, err := h.DomainState(ctx, string(r.VM))
	if errors.Is(err, libvirt.ErrNotFound) {
		return fmt.Errorf("libvirt has no such domain; define it (its description is in the record, its disks are %s), images need no release", paths(r))
	}
	if err != nil {
		return err
	}
	if st != libvirt.StateOff && st != libvirt.StateCrashed {
		return fmt.Errorf("the guest is %s; shut it down first: virsh shutdown %s (or virsh destroy %s when it hangs)", st, r.Name, r.Name)
	}
	saved, err := h.HasSaved(ctx, string(r.VM))
	if err != nil {
		return err
	}
	if saved {
		return fmt.Errorf("a managed save image would come back on the exports; drop it: virsh managedsave-remove %s", r.Name)
	}
	return nil
}

func paths(r vmRecord) string {
	s := ""
	for _, d := range r.Disks {
		s += fmt.Sprintf(" %s=%s", d.Name, d.Path)
	}
	return s[min(1, len(s)):]
}

// mark makes it durable that nobody tracks the images from now on.
func (c *command) mark(r vmRecord) error {
	state, err := fsx.OS(c.stateDir)
	if err != nil {
		return err
	}
	dir := "vms/" + string(r.VM)
	if err := state.MkdirAll(dir); err != nil {
		return err
	}
	return breakglass.Set(fsx.Sub(state, dir), breakglass.Mark{
		At: time.Now(), By: "replicafsck release", Recovered: r.Lineage.State == lineage.Replica,
	})
}

// shutGate keeps libvirt from starting the guest while its disks change.
func shutGate(files []string) error {
	for _, f := range files {
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(f, []byte("refuse it is being released\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func openGate(files []string) error {
	for _, f := range files {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// restoreDomain gives the definition its own disk sources and autostart back.
func restoreDomain(ctx context.Context, h hypervisor, r vmRecord) error {
	doc, err := h.XML(ctx, string(r.VM), libvirt.XMLPersistent)
	if err != nil {
		return err
	}
	was := string(doc)
	d, err := libvirt.ParseDomain(doc)
	if err != nil {
		return err
	}
	for _, k := range r.Disks {
		if now, ok := d.Disk(string(k.Name)); !ok || now.Kind != libvirt.SourceNBD || !strings.HasSuffix(now.Socket, "/vm/"+string(r.VM)+"/nbd.sock") {
			continue // released before, or changed by a person
		}
		if k.Original == nil {
			return fmt.Errorf("disk %s stands on its export and nothing is kept of its original source; give it its own source by hand: virsh edit %s", k.Name, r.Name)
		}
		if doc, err = libvirt.SwapOut(doc, *k.Original); err != nil {
			return err
		}
	}
	if doc, err = libvirt.RemoveMetadata(doc); err != nil {
		return err
	}
	if string(doc) != was {
		if _, err := h.Define(ctx, doc); err != nil {
			return err
		}
	}
	if r.Autostart {
		return h.SetAutostart(ctx, string(r.VM), true)
	}
	return nil
}
