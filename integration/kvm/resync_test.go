package kvm_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

// A comparison in the background says first what it costs, finds what the
// tracker never saw, sends just that with an ordinary epoch while cuts go on,
// survives the death of the host, and leaves recovery points as they were.
func TestAComparisonInTheBackgroundFindsWhatTheTrackerNeverSaw(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	d := w.smallGuest("resync", 70, 40<<20)
	image := w.Lab.Host("A").Path(d.Disks[0].File)
	w.must(w.Define(w.step(), "A", d))
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.replicating("A", d.Name)
	w.ctl("B", "point", "pin", d.Name, "latest")
	before, err := os.ReadFile(image)
	w.must(err)

	if out := w.ctl("A", "vm", "resync", d.Name, "--rate", "8M", "--window", "00:00-23:59", "--dry-run"); !strings.Contains(out, "41943040 bytes are compared") || !strings.Contains(out, "about 6s of reading") {
		t.Errorf("the plan does not say what it costs:\n%s", out)
	}
	w.refused("A", 6, "vm", "resync", d.Name, "--stop")
	w.refused("B", 6, "vm", "resync", d.Name, "--background")

	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	w.must(err)
	for _, off := range []int64{4096, 39 << 20} {
		_, err = f.WriteAt(bytes.Repeat([]byte{0x77}, 4096), off)
		w.must(err)
	}
	w.must(f.Close())

	w.ctl("A", "vm", "resync", d.Name, "--rate", "4M")
	_, err = w.WaitStatus(w.step(), "A", d.Name, "comparing", func(v status.VM) bool {
		return v.Compare != nil && v.Compare.Ended.IsZero() && v.Compare.Done > 0
	})
	w.must(err)
	w.must(w.Lab.Host("A").Crash())
	w.restart("A")
	w.poke("A", d, "vda", 20<<20, 8192, 0x44)
	v, err := w.WaitStatus(w.step(), "A", d.Name, "compared", func(v status.VM) bool {
		return v.Compare != nil && !v.Compare.Ended.IsZero()
	})
	w.must(err)
	if v.Compare.Differs < 4096 || v.Compare.Differs > 8192 {
		t.Errorf("%d bytes are said to have differed", v.Compare.Differs)
	}
	w.same(image, w.onReplica(d, "vda"))

	to := "/var/lib/libvirt/exports"
	w.must(os.MkdirAll(w.Lab.Host("B").Path(to), 0o755))
	w.ctl("B", "point", "export", d.Name, "--point", "oldest", "--to", to)
	after, err := os.ReadFile(w.Lab.Host("B").Path(to + "/" + d.Name + "-vda.raw"))
	w.must(err)
	if !bytes.Equal(before, after) {
		t.Error("the pinned point is not what it was")
	}
}
