package libvirt

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// guest is the lab's test guest on one or two disks of a private host: it
// appends checksummed records to the first one, with an fsync after each.
type guest struct {
	t       *testing.T
	h       *labHost
	host    *Host
	name    string
	uuid    string
	console string
}

const guestUUID = "deadbeef-0000-4000-8000-0000000000f1"

// labDisk is one <disk> of the guest.
type labDisk struct{ xml string }

func fileDisk(path, target, bus, driver string) labDisk {
	return labDisk{fmt.Sprintf("<disk type='file' device='disk'><driver name='qemu' type='raw' %s/><source file='%s'/><target dev='%s' bus='%s'/></disk>", driver, path, target, bus)}
}

// defineGuest defines the guest; extra goes into <domain>, cmd on the kernel
// command line.
func defineGuest(t *testing.T, h *labHost, images, extra, cmd string, disks ...labDisk) *guest {
	t.Helper()
	for _, f := range []string{"vmlinuz", "rd.gz"} {
		copyFile(t, filepath.Join(images, f), filepath.Join(h.dir, "lib/boot", f))
	}
	g := &guest{t: t, h: h, host: h.connect("qemu:///system"), name: "lv", uuid: guestUUID, console: filepath.Join(h.dir, "log/qemu/lv.console")}
	var d strings.Builder
	for _, x := range disks {
		d.WriteString(x.xml)
	}
	doc := fmt.Sprintf(`<domain type='qemu'>
  <name>lv</name><uuid>%s</uuid><memory unit='MiB'>160</memory>%s<vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>
    <kernel>/var/lib/libvirt/boot/vmlinuz</kernel><initrd>/var/lib/libvirt/boot/rd.gz</initrd>
    <cmdline>console=ttyS0 quiet mitigations=off edd=off lab.interval=10 %s</cmdline></os>
  <features><acpi/><apic/></features>
  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>qemu64</model></cpu>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>%s
    <serial type='file'><source path='/var/log/libvirt/qemu/lv.console'/><target port='0'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='none'/>
  </devices>
</domain>`, guestUUID, extra, cmd, d.String())
	id, err := g.host.Define(t.Context(), []byte(doc))
	must(t, err)
	if id != guestUUID {
		t.Fatalf("defined as %s", id)
	}
	return g
}

// start boots the guest. A firmware or kernel that hangs under emulation, before
// anything of ours is in the way, is started anew once.
func (g *guest) start() {
	g.t.Helper()
	must(g.t, g.host.Start(g.t.Context(), g.uuid, StartOptions{}))
	from := g.synced()
	if holds(g.t.Context(), patience/2, func() bool { return g.synced() > from }) {
		return
	}
	g.t.Logf("the guest does not boot; once more: %s", tail(g.text()))
	must(g.t, g.host.Destroy(g.t.Context(), g.uuid, false))
	must(g.t, g.host.Start(g.t.Context(), g.uuid, StartOptions{}))
	g.awaitRecords()
}

func (g *guest) text() string {
	b, _ := os.ReadFile(g.console)
	return string(b)
}

var syncedLine = regexp.MustCompile(`SYNCED n=(\d+) last_ms=\d+ worst_ms=(\d+)`)

// synced is the last record the guest announced as durable.
func (g *guest) synced() int {
	all := syncedLine.FindAllStringSubmatch(g.text(), -1)
	if len(all) == 0 {
		return 0
	}
	n, _ := strconv.Atoi(all[len(all)-1][1])
	return n
}

// worst is the longest fsync the guest saw.
func (g *guest) worst() time.Duration {
	var w time.Duration
	for _, m := range syncedLine.FindAllStringSubmatch(g.text(), -1) {
		d, _ := time.ParseDuration(m[2] + "ms")
		w = max(w, d)
	}
	return w
}

// awaitRecords waits until the guest has made new durable records.
func (g *guest) awaitRecords() {
	g.t.Helper()
	from := g.synced()
	waitFor(g.t, "new records of the guest", func() bool { return g.synced() > from })
}

func tail(s string) string { return s[max(0, len(s)-300):] }

// noErrors fails when the guest saw an I/O error.
func (g *guest) noErrors() {
	g.t.Helper()
	for _, bad := range []string{"I/O error", "ERROR", "Buffer I/O", "Aborting journal", "Remounting"} {
		if strings.Contains(g.text(), bad) {
			g.t.Fatalf("the guest saw %q: %s", bad, tail(g.text()))
		}
	}
}

// finish shuts the guest down and checks the image: journal replay, e2fsck,
// every record intact, at least as many as were announced.
func (g *guest) finish(image string) {
	g.t.Helper()
	g.noErrors()
	must(g.t, g.host.Shutdown(g.t.Context(), g.uuid, ShutdownOptions{NoAgent: true, Within: patience}))
	announced := g.synced()
	g.noErrors()
	boot := filepath.Join(g.h.dir, "lib/boot")
	out, err := exec.Command("timeout", "240", "qemu-system-x86_64", "-accel", "tcg", "-M", "pc", "-m", "160", "-nodefaults", "-display", "none",
		"-serial", "stdio", "-no-reboot", "-kernel", boot+"/vmlinuz", "-initrd", boot+"/rd.gz", "-append", "console=ttyS0 quiet mitigations=off edd=off lab.mode=verify",
		"-device", "virtio-rng-pci", "-drive", "if=virtio,format=raw,file="+image).CombinedOutput()
	if err != nil {
		g.t.Fatalf("verify boot: %v: %s", err, tail(string(out)))
	}
	m := regexp.MustCompile(`BOOT highest=(\d+) bad=(-?\d+) boots=\d+ trailing=(\d+)`).FindStringSubmatch(string(out))
	if m == nil || m[2] != "-1" || m[3] != "0" {
		g.t.Fatalf("the records are damaged: %v: %s", m, tail(string(out)))
	}
	if n, _ := strconv.Atoi(m[1]); n < announced {
		g.t.Fatalf("%d records on disk, %d were announced as durable", n, announced)
	}
	if !strings.Contains(string(out), "FSCK dev=/dev/vda clean=true") {
		g.t.Fatalf("e2fsck is not happy: %s", tail(string(out)))
	}
	g.t.Logf("verified: %s records, %d announced, worst fsync %v", m[1], announced, g.worst())
}

// image makes an empty raw image.
func image(t *testing.T, h *labHost, name string, size int64) string {
	t.Helper()
	p := filepath.Join(h.dir, "vm", name)
	f, err := os.Create(p)
	must(t, err)
	must(t, f.Truncate(size))
	must(t, f.Close())
	return p
}
