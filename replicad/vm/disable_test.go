package vm

import (
	"testing"

	"kvmreplica/libvirt"
)

// A VM is disabled where it came by a failover, under its running guest: the
// guest goes on, on the images of this host, and nothing is left of the plan.
func TestAVMIsDisabledUnderItsGuestOnTheHostItFailedOverTo(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	w.rest()
	must(t, w.a.do(planned))
	if o := w.rest(); o != w.b {
		t.Fatal("B does not own the VM")
	}
	image := w.b.vm().record().Disks[0].Path
	must(t, w.b.do(disable(DisableOptions{})))
	if w.b.vm() != nil {
		t.Fatal("B still knows the VM")
	}
	d, err := w.b.hyper.Domain(t.Context(), string(testVM))
	must(t, err)
	if d.State != libvirt.StateRunning {
		t.Errorf("the guest is %s", d.State)
	}
	doc, err := w.b.hyper.XML(t.Context(), string(testVM), libvirt.XMLPersistent)
	must(t, err)
	d, err = libvirt.ParseDomain(doc)
	must(t, err)
	if k, _ := d.Disk("vda"); k.Kind != libvirt.SourceFile || k.Path != image {
		t.Errorf("the disk stands on %+v, want %s", k, image)
	}
}
