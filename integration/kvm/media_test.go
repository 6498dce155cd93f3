package kvm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"kvmreplica/integration/estate"
)

// A running guest's disks travel on an encrypted medium. A damaged one is
// refused and leaves no image; what the guest wrote since the export is found
// by digest, and the replica boots with all of it.
func TestAGuestsInitialCopyTravelsOnAnExternalMedium(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("carried", 71, 2, "")
	c := w.start(d)
	id, err := age.GenerateX25519Identity()
	w.must(err)
	host := func(h, path string) string { return w.Lab.Host(h).Path(path) }
	const medium, key = "/var/lib/libvirt/medium", "/var/lib/libvirt/medium.key"
	w.must(os.MkdirAll(host("A", medium), 0o755))
	w.must(os.WriteFile(host("B", key), []byte(id.String()+"\n"), 0o600))

	w.refused("A", 2, "vm", "export", d.Name)
	w.refused("A", 2, "vm", "export", d.Name, "--to", medium+"/none", "--recipient", id.Recipient().String())
	if out := w.ctl("A", "vm", "export", d.Name, "--to", medium, "--recipient", id.Recipient().String()); !strings.Contains(out, "vm import "+medium+"/"+d.UUID) {
		t.Errorf("the export does not name the next command:\n%s", out)
	}
	w.refused("A", 6, "vm", "export", d.Name, "--to", medium, "--recipient", id.Recipient().String())

	dir := medium + "/" + d.UUID
	w.must(os.CopyFS(host("B", dir), os.DirFS(host("A", dir))))
	w.refused("B", 6, "vm", "import", dir, "--from", estate.Peer("A"))
	damaged := filepath.Join(host("B", dir), "vdb-000000.krs")
	whole, err := os.ReadFile(damaged)
	w.must(err)
	w.must(os.WriteFile(damaged, append(append([]byte{}, whole[:len(whole)/2]...), whole[len(whole)/2+1:]...), 0o600))
	out, err := w.Ctl(w.step(), "B", "vm", "import", dir, "--from", estate.Peer("A"), "--identity", key)
	if err == nil || !strings.Contains(err.Error()+out, "vdb-000000.krs") {
		t.Errorf("a damaged medium: %v\n%s", err, out)
	}
	images := filepath.Dir(w.onReplica(d, "vda")) + "/existing"
	if there, _ := filepath.Glob(images + "/*.raw"); len(there) > 0 {
		t.Errorf("a damaged medium left %v", there)
	}
	w.must(os.WriteFile(damaged, whole, 0o600))
	w.ctl("B", "vm", "import", dir, "--from", estate.Peer("A"), "--identity", key)
	w.refused("B", 6, "vm", "import", dir, "--from", estate.Peer("A"), "--identity", key)

	_, err = c.WaitSynced(w.step(), c.Synced()+20)
	w.must(err)
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--initial", "existing", "--yes")
	v := w.replicating("A", d.Name)
	t.Logf("disks of %d bytes, %d bytes sent until the first copy", 2*(256<<20), v.Stats.SentBytes)
	if v.Stats.SentBytes > 64<<20 {
		t.Errorf("%d bytes were sent although the disks had travelled", v.Stats.SentBytes)
	}
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(b, last.Uint("n"))
	w.noErrors("A", d, false)
}
