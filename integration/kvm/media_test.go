package kvm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
)

const mediumDir = "/var/lib/libvirt/medium"

// carry copies a VM's export from one host to the other.
func (w *world) carry(d guest.Domain) (dir string) {
	w.t.Helper()
	dir = mediumDir + "/" + d.UUID
	w.must(os.CopyFS(w.Lab.Host("B").Path(dir), os.DirFS(w.Lab.Host("A").Path(dir))))
	return dir
}

// A running guest's disks travel on an encrypted medium; what the guest wrote
// since the export is found by digest, and the replica boots with all of it.
func TestAGuestsInitialCopyTravelsOnAnExternalMedium(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("carried", 71, 2, "")
	c := w.start(d)
	id, err := age.GenerateX25519Identity()
	w.must(err)
	const key = "/var/lib/libvirt/medium.key"
	w.must(os.MkdirAll(w.Lab.Host("A").Path(mediumDir), 0o755))
	w.must(os.WriteFile(w.Lab.Host("B").Path(key), []byte(id.String()+"\n"), 0o600))
	w.ctl("A", "vm", "export", d.Name, "--to", mediumDir, "--recipient", id.Recipient().String())
	w.ctl("B", "vm", "import", w.carry(d), "--from", estate.Peer("A"), "--identity", key)
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

// A medium that is damaged, needs a key, or was not completed is refused with
// the way out and leaves no image; mended, the import goes on and the copy is
// exactly the disk, although that was written to meanwhile.
func TestAMediumThatIsNotWholeIsRefusedAndGoesOnWhenMended(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	d := w.smallGuest("medium", 72, 4<<20)
	image := w.Lab.Host("A").Path(d.Disks[0].File)
	w.must(w.Define(w.step(), "A", d))
	const pass = "/var/lib/libvirt/medium.pass"
	for _, h := range []string{"A", "B"} {
		w.must(os.MkdirAll(w.Lab.Host(h).Path(filepath.Dir(pass)), 0o755))
		w.must(os.WriteFile(w.Lab.Host(h).Path(pass), []byte("correct horse battery\n"), 0o600))
	}
	w.refused("A", 2, "vm", "export", d.Name)
	w.refused("A", 2, "vm", "export", d.Name, "--to", mediumDir, "--passphrase-file", "/nowhere")
	w.says("A", "mount the medium", "vm", "export", d.Name, "--to", mediumDir, "--passphrase-file", pass)
	w.must(os.MkdirAll(w.Lab.Host("A").Path(mediumDir), 0o755))
	if out := w.ctl("A", "vm", "export", d.Name, "--to", mediumDir, "--passphrase-file", pass); !strings.Contains(out, "vm import "+mediumDir+"/"+d.UUID) {
		t.Errorf("the export does not name the next command:\n%s", out)
	}
	w.says("A", "a complete export", "vm", "export", d.Name, "--to", mediumDir, "--passphrase-file", pass)

	dir := w.carry(d)
	take := []string{"vm", "import", dir, "--from", estate.Peer("A"), "--passphrase-file", pass}
	w.says("B", "--identity FILE or --passphrase-file FILE", take[:5]...)
	w.says("B", "holds no export", "vm", "import", mediumDir, "--from", estate.Peer("A"))
	piece := w.Lab.Host("B").Path(dir + "/vda-000000.krs")
	whole, err := os.ReadFile(piece)
	w.must(err)
	w.must(os.WriteFile(piece, append(append([]byte{}, whole[:len(whole)/2]...), whole[len(whole)/2+1:]...), 0o600))
	w.says("B", "vda-000000.krs: the medium is damaged", take...)
	images := w.Lab.Host("B").Path(replicaRoot + "/" + d.UUID + "/existing")
	if there, _ := filepath.Glob(images + "/*.raw"); len(there) > 0 {
		t.Errorf("a damaged medium left %v", there)
	}
	w.must(os.WriteFile(piece, whole, 0o600))
	w.ctl("B", take...)
	w.says("B", "it is never overwritten", take...)

	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	w.must(err)
	_, err = f.WriteAt([]byte("written while the medium travelled"), 2<<20)
	w.must(err)
	w.must(f.Close())
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--initial", "existing", "--yes")
	w.poke("A", d, "vda", 3<<20, 8192, 0x5a)
	v := w.replicating("A", d.Name)
	w.same(image, w.onReplica(d, "vda"))
	if v.Stats.SentBytes > 1<<20 {
		t.Errorf("%d bytes were sent although the disk had travelled", v.Stats.SentBytes)
	}
	w.says("B", "here already", take...)
	w.ctl("A", "vm", "limit", d.Name, "20M")
	if v := w.status("A", d.Name); v.Rate != 20<<20 {
		t.Errorf("the limit is shown as %d", v.Rate)
	}
}

// says runs replicactl, which must fail and say that.
func (w *world) says(host, what string, args ...string) {
	w.t.Helper()
	out, err := w.Ctl(w.step(), host, args...)
	if err == nil || !strings.Contains(err.Error()+out, what) {
		w.t.Errorf("replicactl %v on %s should fail and say %q: %v\n%s", args, host, what, err, out)
	}
}
