package systemd

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/labtest"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/status"
)

var addr = map[string]string{"A": "10.79.0.1", "B": "10.79.0.2"}

// site is two hosts with the product installed on them by packaging/install.sh.
type site struct {
	t     *testing.T
	box   map[string]*Box
	files guest.Files
}

func (s *site) step() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), labtest.StepTimeout)
	s.t.Cleanup(cancel)
	return ctx
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) on(host, name string, args ...string) string {
	s.t.Helper()
	out, err := s.box[host].Exec(s.step(), name, args...)
	s.must(err)
	return strings.TrimSpace(out)
}

func newSite(t *testing.T) *site {
	labtest.Require(t)
	if m := Missing(); len(m) > 0 {
		t.Skipf("needs %s", strings.Join(m, ", "))
	}
	dir, err := os.MkdirTemp("", "sd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	s := &site{t: t, box: map[string]*Box{}}
	s.files, err = guest.Build(t.Context())
	s.must(err)
	bin, err := estate.Binaries(t.Context())
	s.must(err)
	for _, n := range []string{"A", "B"} {
		b, err := New(dir, "kvm-"+strings.ToLower(n))
		s.must(err)
		s.box[n] = b
		t.Cleanup(func() {
			if t.Failed() {
				s.logs(n)
			}
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
		s.install(n, bin)
		ctx, cancel := context.WithTimeout(t.Context(), labtest.StepTimeout)
		err = b.Boot(ctx)
		cancel()
		if err != nil {
			t.Skipf("systemd does not run in a container here: %v", err)
		}
	}
	return s
}

func (s *site) logs(host string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, _ := s.box[host].Exec(ctx, "journalctl", "-u", "replicad", "-u", "libvirtd", "--no-pager", "-n", "200")
	s.t.Logf("--- journal of %s:\n%s\n--- console:\n%s", host, out, tail(s.box[host].Log()))
}

// install puts the product into a host, as its administrator would: the script,
// a configuration, the images' and kernels' places.
func (s *site) install(host, bin string) {
	s.t.Helper()
	b := s.box[host]
	root, err := lab.RepoRoot()
	s.must(err)
	cmd := exec.Command(filepath.Join(root, "packaging/install.sh"), bin)
	cmd.Env = append(os.Environ(), "DESTDIR="+b.Seed(), "PREFIX=/usr/local")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("install: %v: %s", err, out)
	}
	kernel := filepath.Join(guest.BootDir, filepath.Base(s.files.Kernel))
	initrd := filepath.Join(guest.BootDir, filepath.Base(s.files.Initramfs))
	conf := fmt.Sprintf(`host_name = "kvm-%s"
listen = "%s:%d"
receiving = true
storage_roots = ["/var/lib/libvirt/replicas"]

[limits]
free_space_reserve = "0"

[domain]
type = "qemu"
console_dir = "/var/log/libvirt/qemu"
[domain.kernels.%q]
kernel = %q
initrd = %q
`, strings.ToLower(host), addr[host], estate.Port, libvirt.KernelLabel(kernel, initrd), kernel, initrd)
	s.must(os.WriteFile(b.Path("/etc/replicad/replicad.toml"), []byte(conf), 0o600))
	// The distribution's settings of QEMU, but for control groups: the container
	// has none for processors and devices.
	qemu, err := os.ReadFile("/etc/libvirt/qemu.conf")
	s.must(err)
	s.must(os.WriteFile(b.Path("/etc/libvirt/qemu.conf"), append(qemu, "\ncgroup_controllers = [ ]\n"...), 0o600))
	// lib of libvirt is the machine's: nothing of its own guests may be in the box.
	for _, d := range []string{guest.BootDir, "/var/lib/libvirt/images", "/var/lib/libvirt/replicas"} {
		s.must(os.MkdirAll(b.Path(d), 0o755))
	}
	for _, f := range s.files.List() {
		text, err := os.ReadFile(f)
		s.must(err)
		s.must(os.WriteFile(b.Path(filepath.Join(guest.BootDir, filepath.Base(f))), text, 0o644))
	}
	s.must(os.WriteFile(b.Path("/etc/hostname"), []byte(b.name+"\n"), 0o644))
	units := b.Path("/etc/systemd/system")
	// A daemon that sees its guest end while the host goes down must not take
	// that for a person's shutdown: it gets the time to see it.
	linger := filepath.Join(units, "libvirt-guests.service.d")
	s.must(os.MkdirAll(linger, 0o755))
	s.must(os.WriteFile(filepath.Join(linger, "linger.conf"), []byte("[Service]\nExecStopPost=/bin/sleep 5\n"), 0o644))
	for _, u := range []string{"console-getty.service", "getty@.service", "nbd-server.service", "postgresql.service", "e2scrub_reap.service"} {
		s.must(os.Symlink("/dev/null", filepath.Join(units, u)))
	}
}

// eventually polls through the box's own tools.
func (s *site) eventually(what string, ok func() bool) {
	s.t.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	ctx := s.step()
	for !ok() {
		select {
		case <-ctx.Done():
			s.t.Fatalf("never: %s", what)
		case <-tick.C:
		}
	}
}

func (s *site) replicating(host, vm string) {
	s.t.Helper()
	s.eventually(vm+" replicates from "+host, func() bool {
		out, err := s.box[host].Exec(s.step(), "replicactl", "--json", "vm", "status", vm)
		var v status.VM
		return err == nil && json.Unmarshal([]byte(out), &v) == nil && v.State == status.Replicating && v.Role == status.Primary && v.Health == "normal"
	})
}

// planes are the keeper and the data plane of the host's only VM.
func (s *site) planes(host string) string {
	out, _ := s.box[host].Exec(s.step(), "pgrep", "-f", "^/usr/local/sbin/replicad (keeper|dataplane)")
	return out
}

func (s *site) defined() (guest.Domain, *console.Console) {
	s.t.Helper()
	d := guest.Domain{
		Name: "web", UUID: "5eed0000-0000-4000-8000-000000000077", Files: s.files, Agent: true, Knobs: "lab.interval=50",
		Disks: []guest.Disk{{File: "/var/lib/libvirt/images/web.raw", Serial: "web"}},
	}
	doc, err := d.XML()
	s.must(err)
	s.must(os.WriteFile(s.box["A"].Path("/root/web.xml"), []byte(doc), 0o600))
	s.on("A", "truncate", "-s", "64M", "/var/lib/libvirt/images/web.raw")
	s.on("A", "virsh", "define", "/root/web.xml")
	s.on("A", "virsh", "start", "web")
	c := console.Open(s.box["A"].Path(d.ConsoleFile()))
	_, err = c.WaitSynced(s.step(), 10)
	s.must(err)
	return d, c
}

// The unit on real hosts: libvirt as Debian configures it, the sandbox in force;
// the daemon is restarted, killed and stopped under a running guest; the VM fails
// over; its host is shut down, which ends the guest first while its disk is still
// served, and boots before its network is there: the guest runs again, and
// nothing is compared that nobody wrote.
func TestTwoHostsUnderSystemd(t *testing.T) {
	s := newSite(t)
	s.must(Connect(s.step(), s.box["A"], s.box["B"], addr["A"], addr["B"]))
	for _, h := range []string{"A", "B"} {
		s.on(h, "systemctl", "enable", "--now", "libvirtd", "libvirt-guests", "replicad") // returns when it is ready
	}
	s.sandboxed("A")
	s.on("A", "systemctl", "reload", "replicad")
	var inv struct{ Code string }
	s.must(json.Unmarshal([]byte(s.on("B", "replicactl", "--json", "peer", "invite", "--may-send")), &inv))
	s.on("A", "replicactl", "peer", "join", fmt.Sprintf("%s:%d", addr["B"], estate.Port), inv.Code, "--may-send")
	d, c := s.defined()
	s.on("A", "replicactl", "vm", "enable", d.Name, "--to", "kvm-b", "--every", "2s", "--wait", "--yes")
	s.restarts(c)
	s.replicating("A", d.Name)

	before := c.Synced()
	s.on("A", "replicactl", "failover", "planned", d.Name, "--yes")
	log := "/var/log/libvirt/qemu/" + d.UUID + ".log" // of a definition that was rendered
	c = console.Open(s.box["B"].Path(log))
	s.booted(c, before)
	_, err := c.WaitSynced(s.step(), before+10)
	s.must(err)
	s.replicating("B", d.Name)
	s.rebooted("B", d, c)
}

// booted waits for the guest's verdict on its disk.
func (s *site) booted(c *console.Console, atLeast uint64) {
	s.t.Helper()
	l, err := c.WaitBoot(s.step())
	s.must(err)
	if l.Int("bad") >= 0 || l.Uint("highest") < atLeast {
		s.t.Fatalf("record %d was durable; the guest found: %s", atLeast, l.Raw)
	}
}

func (s *site) sandboxed(host string) {
	s.t.Helper()
	pid := s.on(host, "systemctl", "show", "-p", "MainPID", "--value", "replicad")
	text := s.on(host, "cat", "/proc/"+pid+"/status")
	for _, want := range []string{`NoNewPrivs:\s1`, `Seccomp:\s2`, `CapAmb:\s0000000000000000`} {
		if !regexp.MustCompile(want).MatchString(text) {
			s.t.Errorf("the daemon's status has no %s:\n%s", want, text)
		}
	}
	// What the unit grants, less what the container itself was not given.
	const granted = 0x108043f
	var bound uint64
	if m := regexp.MustCompile(`CapBnd:\s([0-9a-f]+)`).FindStringSubmatch(text); m == nil {
		s.t.Errorf("the daemon's status has no capabilities:\n%s", text)
	} else if _, err := fmt.Sscanf(m[1], "%x", &bound); err != nil || bound == 0 || bound&^granted != 0 {
		s.t.Errorf("the daemon may have the capabilities %x, the unit grants %x", bound, granted)
	}
}

// restarts ends the daemon in every way; the guest's disk does not care.
func (s *site) restarts(c *console.Console) {
	s.t.Helper()
	served := s.planes("A")
	if strings.Count(served, "\n") != 2 {
		s.t.Fatalf("a keeper and a data plane, not: %q", served)
	}
	for _, how := range [][]string{
		{"restart", "replicad"},
		{"kill", "-s", "KILL", "--kill-whom=main", "replicad"}, // the unit starts it again
		{"stop", "replicad"},
	} {
		s.on("A", "systemctl", how...)
		_, err := c.WaitSynced(s.step(), c.Synced()+5)
		s.must(err)
		if now := s.planes("A"); now != served {
			s.t.Fatalf("after %v: %q, before %q", how, now, served)
		}
		if how[0] == "stop" {
			s.on("A", "systemctl", "start", "replicad")
		}
		s.eventually("replicad is ready", func() bool {
			_, err := s.box["A"].Exec(s.step(), "replicactl", "vm", "list")
			return err == nil
		})
	}
}

// rebooted shuts a host down and starts it without its network at first.
func (s *site) rebooted(host string, d guest.Domain, c *console.Console) {
	s.t.Helper()
	b := s.box[host]
	s.must(b.PowerOff(s.step()))
	text := b.Log()
	guests, daemon := strings.LastIndex(text, "Shutdown of guest "+d.Name+" complete"), strings.LastIndex(text, "Stopping")
	if at := strings.LastIndex(text, "replicad.service"); guests < 0 || at < guests || daemon < 0 {
		s.t.Errorf("the guest did not end before replicad: %s", tail(text))
	}
	if _, off := c.Last("POWEROFF"); !off {
		s.t.Error("the guest did not shut down in order")
	}
	before := c.Synced()
	s.must(b.Boot(s.step()))
	s.eventually("replicad is ready without its address", func() bool {
		out, err := b.Exec(s.step(), "systemctl", "is-active", "replicad")
		return err == nil && strings.TrimSpace(out) == "active"
	})
	if n := s.on(host, "systemctl", "show", "-p", "NRestarts", "--value", "replicad"); n != "0" {
		s.t.Errorf("replicad was started %s more times before it had its address", n)
	}
	s.must(Connect(s.step(), s.box["A"], s.box["B"], addr["A"], addr["B"]))
	s.booted(c, before)
	s.replicating(host, d.Name)
	if out := s.on(host, "journalctl", "-b", "-u", "replicad", "--no-pager"); strings.Contains(out, "another image") {
		s.t.Errorf("the image is doubted after a boot:\n%s", out)
	}
}
