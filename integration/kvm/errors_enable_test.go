package kvm_test

import (
	"context"
	"os"
	"strings"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
)

// variant defines a domain made of the free one and gives the way back.
func variant(n int, change func(*guest.Domain, *string)) func(w *errorWorld) func() {
	return func(w *errorWorld) func() {
		d := w.smallGuest("variant", n, 1<<20)
		text := ""
		change(&d, &text)
		doc, err := d.XML()
		w.must(err)
		if from, to, ok := strings.Cut(text, " => "); ok {
			if !strings.Contains(doc, from) {
				w.t.Fatalf("%q is not in the definition", from)
			}
			doc = strings.Replace(doc, from, to, 1)
		}
		w.must(w.Lab.Host("A").PutFile("/etc/libvirt/variant.xml", []byte(doc), 0o644))
		w.virsh("A", "define", "/etc/libvirt/variant.xml")
		return func() {
			_, _ = w.Lab.Host("A").Virsh(w.step(), "managedsave-remove", d.Name)
			_, _ = w.Lab.Host("A").Virsh(w.step(), "destroy", d.Name)
			w.virsh("A", "undefine", d.Name)
			w.must(os.RemoveAll(w.Lab.Host("A").Path(d.Disks[0].File)))
		}
	}
}

func enableErrors() []errorCase {
	on := "variant"
	return []errorCase{
		{id: "domain-missing", args: enable("nosuch"), code: 1, words: []string{`libvirt has no domain "nosuch"`, "virsh list --all"}},
		{id: "already-protected", args: enable(keptVM), code: 6, words: []string{"is primary here already", "replicactl vm status " + keptVM}},
		{id: "image-missing", args: enable(on), code: 6, words: []string{"Disk vda", "does not exist", "virsh domblklist"}, setup: func(w *errorWorld) func() {
			undo := variant(10, func(*guest.Domain, *string) {})(w)
			w.must(os.Remove(w.Lab.Host("A").Path("/var/lib/libvirt/images/variant.raw")))
			return undo
		}},
		{id: "image-empty", args: enable(on), code: 6, words: []string{"is empty", "qemu-img resize"}, setup: func(w *errorWorld) func() {
			undo := variant(11, func(*guest.Domain, *string) {})(w)
			w.must(os.Truncate(w.Lab.Host("A").Path("/var/lib/libvirt/images/variant.raw"), 0))
			return undo
		}},
		{id: "disk-qcow2", args: enable(on), code: 6, words: []string{`its format is "qcow2"`, "qemu-img convert -O raw"}, setup: variant(12, func(d *guest.Domain, _ *string) { d.Disks[0].Format = "qcow2" })},
		{id: "disk-shareable", args: enable(on), code: 6, words: []string{"it is shareable", "virsh edit"}, setup: variant(13, func(_ *guest.Domain, x *string) { *x = "<target dev='vda' => <shareable/><target dev='vda'" })},
		{id: "disk-unknown", args: enable(freeVM, "--disk", "vdz"), code: 6, words: []string{"Disk vdz", "no such disk", "virsh domblklist " + freeVM}},
		{id: "domain-transient", args: enable(on), code: 6, words: []string{"is transient", "virsh define"}, setup: transient},
		{id: "saved-image", args: enable(on), code: 6, words: []string{"a managed save image", "virsh managedsave-remove variant"}, setup: func(w *errorWorld) func() {
			undo := variant(15, func(*guest.Domain, *string) {})(w)
			w.virsh("A", "start", "--paused", on)
			w.virsh("A", "managedsave", on)
			return undo
		}},
		{id: "image-in-use", args: enable(freeVM), code: 6, words: []string{"free.raw is in use by process", "qemu-nbd", "stop that program"}, setup: holdImage},
		{id: "peer-unknown", args: []string{"vm", "enable", freeVM, "--to", "nobody", "--yes"}, code: 1, words: []string{`no paired host "nobody"`, "replicactl peer list"}},
		{id: "peer-may-not-send", args: enable(freeVM), code: 6, words: []string{"may not send replicas to", "replicactl peer allow kvm-a --may-send"}, setup: func(w *errorWorld) func() {
			w.ctl("B", "peer", "allow", estate.Peer("A"))
			return func() { w.ctl("B", "peer", "allow", estate.Peer("A"), "--may-send") }
		}},
		{id: "peer-not-receiving", args: enable(freeVM), code: 6, words: []string{"does not receive replicas", "receiving = true"}, setup: func(w *errorWorld) func() {
			w.reconfigure("B", "receiving = true", "receiving = false")
			return func() { w.reconfigure("B", "receiving = false", "receiving = true") }
		}},
		{id: "peer-away", args: enable(freeVM), code: 6, words: []string{"Replica host", "cannot reach", "replicactl peer test"}, setup: func(w *errorWorld) func() {
			w.must(w.Daemon("B").Stop(w.step()))
			return func() { w.must(w.StartDaemon(w.step(), "B")) }
		}},
		{id: "name-taken", args: enable(freeVM), code: 6, words: []string{`another domain is called "free"`, "virsh domrename"}, setup: onB(func(d *guest.Domain) { d.UUID = errorUUID(20) })},
		{id: "uuid-taken", args: enable(freeVM), code: 6, words: []string{"a domain with this UUID exists", "virsh undefine"}, setup: onB(func(d *guest.Domain) { d.Name = "other" })},
		{id: "libvirt-down", args: enable(freeVM), code: 1, words: []string{"libvirtd is not reachable", "systemctl status libvirtd"}, setup: libvirtDown("A")},
		{id: "libvirt-down-there", args: enable(freeVM), code: 6, words: []string{"Hypervisor", "libvirtd is not reachable", "systemctl status libvirtd"}, setup: libvirtDown("B")},
		{id: "state-disk-full", args: enable(freeVM), code: 1, words: []string{"no space left on device", "df -h /var/lib/replicad"}, setup: full("A", stateDir)},
	}
}

// transient makes a domain without a definition, paused at its start.
func transient(w *errorWorld) func() {
	undo := variant(14, func(*guest.Domain, *string) {})(w)
	w.virsh("A", "start", "--paused", "variant")
	w.virsh("A", "undefine", "variant")
	return func() {
		w.virsh("A", "define", "/etc/libvirt/variant.xml")
		undo()
	}
}

// holdImage opens the free VM's image as another QEMU would, with its locks.
func holdImage(w *errorWorld) func() {
	sock := "/run/holder.sock"
	cmd := w.Lab.Host("A").Command(w.t.Context(), "qemu-nbd", "--persistent", "-k", sock, "--image-opts",
		"driver=raw,file.driver=file,file.locking=on,file.filename="+w.free.Disks[0].File)
	w.must(cmd.Start())
	w.must(waitFor(w.step(), func() bool { _, err := os.Stat(w.Lab.Host("A").Path(sock)); return err == nil }))
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		w.must(os.RemoveAll(w.Lab.Host("A").Path(sock)))
	}
}

// onB defines a domain on the replica host that is in the free one's way.
func onB(change func(*guest.Domain)) func(w *errorWorld) func() {
	return func(w *errorWorld) func() {
		d := w.free
		change(&d)
		w.must(w.Define(w.step(), "B", d))
		return func() { w.virsh("B", "undefine", d.UUID) }
	}
}

func libvirtDown(host string) func(w *errorWorld) func() {
	return func(w *errorWorld) func() {
		h := w.Lab.Host(host)
		w.must(h.KillLibvirtd(true))
		return func() { w.must(h.ReleaseLibvirtd(w.step())) }
	}
}

// full leaves no byte free below a directory that upErrors made small.
func full(host, dir string) func(w *errorWorld) func() {
	return func(w *errorWorld) func() {
		w.fill(host, dir)
		return func() { w.unfill(host, dir) }
	}
}

// reconfigure changes a host's configuration and restarts its daemon.
func (w *world) reconfigure(host, from, to string) {
	w.t.Helper()
	h := w.Lab.Host(host)
	file := "/etc/replicad/replicad.toml"
	b, err := os.ReadFile(h.Path(file))
	w.must(err)
	if !strings.Contains(string(b), from) {
		w.t.Fatalf("%q is not in the configuration", from)
	}
	w.must(w.Daemon(host).Stop(w.step()))
	w.must(h.PutFile(file, []byte(strings.Replace(string(b), from, to, 1)), 0o600))
	w.must(w.StartDaemon(w.step(), host))
}

// small puts a directory of a host, with its content, onto a file system of a
// given size; the daemon is restarted.
func (w *world) small(host, dir, size string) {
	w.t.Helper()
	w.must(w.Daemon(host).Stop(w.step()))
	_, err := w.Lab.Host(host).Exec(w.step(), "sh", "-c", "set -e; mkdir -p "+dir+" /mnt; mount -t tmpfs -o mode=755,size="+size+" tmpfs /mnt; cp -a "+dir+"/. /mnt/; mount --move /mnt "+dir)
	w.must(err)
	w.must(w.StartDaemon(w.step(), host))
}

// fill leaves no byte free below dir.
func (w *world) fill(host, dir string) {
	w.t.Helper()
	_, err := w.Lab.Host(host).Exec(w.step(), "sh", "-c", "cat /dev/zero >"+dir+"/filler 2>/dev/null; true")
	w.must(err)
}

// unfill takes fill back.
func (w *world) unfill(host, dir string) {
	w.t.Helper()
	_, err := w.Lab.Host(host).Exec(w.step(), "rm", dir+"/filler")
	w.must(err)
}

// waitFor asks until ok or ctx ends.
func waitFor(ctx context.Context, ok func() bool) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil
}
