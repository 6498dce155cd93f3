package histories_test

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
)

//go:embed testdata/recorder.bin
var recorder []byte

// world is an estate on which one history after the other is played.
type world struct {
	*estate.Estate
	dir   string
	hosts map[string]*host
	used  int // histories played here
}

// host is what a history knows of a host of the lab.
type host struct {
	*lab.Host
	other *host
	run   atomic.Value // string: its root as seen from outside, in this life
	up    atomic.Bool
	armed string // REPLICAD_CRASH_AT of its daemon
}

// Up reports whether the host runs; any goroutine may ask.
func (h *host) Up() bool { return h.up.Load() }

// quick lets a boot with a silent peer be decided within a history.
const quick = "silent_peer_after = \"4s\"\n"

func newWorld(ctx context.Context) (*world, error) {
	dir, err := os.MkdirTemp("", "hist-")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	e, err := estate.Up(ctx, dir, estate.Options{Config: quick})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	w := &world{Estate: e, dir: dir, hosts: map[string]*host{}}
	for _, h := range e.Lab.Hosts() {
		w.hosts[h.Name()] = &host{Host: h}
	}
	w.hosts["A"].other, w.hosts["B"].other = w.hosts["B"], w.hosts["A"]
	for _, h := range w.hosts {
		h.booted()
	}
	return w, nil
}

func (w *world) down() error { return errors.Join(w.Down(), os.RemoveAll(w.dir)) }

// logs shows the ends of all logs.
func (w *world) logs(t testing.TB) {
	for _, h := range w.hosts {
		for _, pattern := range []string{"log/replicad.log", "log-libvirt/libvirtd.log"} {
			files, _ := filepath.Glob(filepath.Join(w.dir, h.Name(), pattern))
			for _, f := range files {
				if b, err := os.ReadFile(f); err == nil && len(b) > 0 {
					t.Logf("--- host %s, %s:\n%s", h.Name(), filepath.Base(f), b[max(0, len(b)-20000):])
				}
			}
		}
	}
}

func (h *host) booted() {
	h.up.Store(true)
	h.run.Store(fmt.Sprintf("/proc/%d/root", h.Pid()))
}

// runs reports whether a QEMU of this VM lives on the host now.
func (h *host) runs(vm string) bool {
	root := h.run.Load().(string)
	pid, err := os.ReadFile(filepath.Join(root, "run/libvirt/qemu", vm+".pid"))
	if err != nil {
		return false
	}
	text, err := os.ReadFile(filepath.Join(root, "proc", strings.TrimSpace(string(pid)), "stat"))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// status asks the host's daemon; replicactl's "vm status" shows the same.
func (h *host) status(ctx context.Context, vm string) (status.VM, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return api.NewClient(h.run.Load().(string)+"/run/replicad/control.sock").VM(ctx, vm)
}

// died reports whether a host that is up has no daemon.
func (w *world) died(h *host) bool {
	select {
	case <-w.Daemon(h.Name()).Done():
		return true
	default:
		return false
	}
}

// start starts a host's daemon, armed or not.
func (w *world) start(ctx context.Context, h *host) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var env []string
	if h.armed != "" {
		env = []string{"REPLICAD_CRASH_AT=" + h.armed}
	}
	err := w.StartDaemon(ctx, h.Name(), env...)
	if err != nil && h.armed != "" && w.died(h) {
		h.armed = "" // that was it
		return w.start(ctx, h)
	}
	return err
}

// boot starts a host that is down, and its daemon.
func (w *world) boot(ctx context.Context, h *host) error {
	if err := h.Start(ctx); err != nil {
		return err
	}
	h.booted()
	h.armed = ""
	return w.start(ctx, h)
}

// vmName and vmUUID of a seed's VM.
func vmName(seed uint64) string { return fmt.Sprintf("h%d", seed) }
func vmUUID(seed uint64) string { return fmt.Sprintf("4157e000-0000-4000-8000-%012x", seed) }

// define makes a VM with a fresh disk on host A.
func (w *world) define(ctx context.Context, seed uint64) error {
	name, h := vmName(seed), w.hosts["A"]
	image := imagesDir + "/" + name + ".raw"
	disk := make([]byte, diskSize)
	copy(disk, recorder)
	if err := h.PutFile(image, disk, 0o644); err != nil {
		return err
	}
	xml := fmt.Sprintf(domainXML, name, vmUUID(seed), image, ownConsole(name))
	file := "/etc/libvirt/" + name + ".xml"
	if err := h.PutFile(file, []byte(xml), 0o644); err != nil {
		return err
	}
	_, err := h.Virsh(ctx, "define", file)
	return err
}

const (
	imagesDir   = "/var/lib/libvirt/images"
	replicasDir = "/var/lib/libvirt/replicas"
)

func ownConsole(name string) string { return "/var/log/libvirt/qemu/" + name + ".console" }

const domainXML = `<domain type='qemu'>
  <name>%s</name>
  <uuid>%s</uuid>
  <memory unit='MiB'>8</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='%s'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='%s' append='on'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
`

// clean removes a VM whose history is over from both hosts. What cannot be
// removed makes the estate unfit for another history.
func (w *world) clean(ctx context.Context, seed uint64, owner *host) error {
	name := vmName(seed)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := w.Ctl(ctx, owner.Name(), "vm", "disable", name, "--delete-replica", "--yes"); err != nil {
		return err
	}
	// The other host ends its part by itself; a copy that once held something is its to delete.
	for {
		out, err := w.Ctl(ctx, owner.other.Name(), "--json", "vm", "list")
		if err == nil && !strings.Contains(out, name) {
			break
		}
		_, _ = w.Ctl(ctx, owner.other.Name(), "vm", "disable", name, "--delete-replica", "--yes")
		if ctx.Err() != nil {
			return fmt.Errorf("the other host still lists it: %s %w", out, err)
		}
	}
	for _, h := range w.hosts {
		_, _ = h.Virsh(ctx, "destroy", name)  // off already is fine
		_, _ = h.Virsh(ctx, "undefine", name) // as is gone already
		for _, p := range []string{ownConsole(name), "/var/log/libvirt/qemu/" + vmUUID(seed) + ".log", "/etc/libvirt/" + name + ".xml", imagesDir + "/" + name + ".raw"} {
			_ = os.Remove(h.Path(p))
		}
	}
	return nil
}
