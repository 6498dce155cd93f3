package libvirt

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The tests in this package that need a real libvirtd start one of their own
// in fresh namespaces, with its own /run, configuration and state, so that
// nothing of this machine's libvirt is seen or touched.

// labConfig is how a private libvirtd is set up.
type labConfig struct {
	// NonRoot runs QEMU as libvirt-qemu with dynamic ownership, as a
	// distribution does.
	NonRoot bool
	// Hook is installed as hooks/qemu.d/kvmreplica before libvirtd starts.
	Hook string
}

// labHost is a private libvirtd.
type labHost struct {
	t    *testing.T
	dir  string
	sock string
	init int // pid of the namespaces' init, from outside
}

func needs(t *testing.T, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
}

// startLibvirtd starts a private libvirtd and ends it, with everything below
// it, when the test ends.
func startLibvirtd(t *testing.T, c labConfig) *labHost {
	t.Helper()
	needs(t, "libvirtd", "unshare", "mount")
	dir, err := os.MkdirTemp("/tmp", "lv-")
	if err != nil {
		t.Fatal(err)
	}
	must(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &labHost{t: t, dir: dir, sock: filepath.Join(dir, "run", "libvirt-sock")}
	for _, d := range []string{"etc/qemu/networks/autostart", "etc/qemu/autostart", "etc/hooks/qemu.d", "etc/nwfilter", "lib/images", "lib/boot", "lib/qemu", "log/qemu", "cache/qemu", "run", "vm", "replicad"} {
		must(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	h.write("etc/libvirtd.conf", "unix_sock_rw_perms = \"0700\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nhost_uuid = \"5aa55aa5-aaaa-4aaa-8aaa-0000000000c3\"\nlog_outputs = \"2:file:/var/log/libvirt/libvirtd.log\"\n")
	who := "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\n"
	if c.NonRoot {
		who = "user = \"libvirt-qemu\"\ngroup = \"kvm\"\ndynamic_ownership = 1\n"
	}
	h.write("etc/qemu.conf", who+"remember_owner = 0\nsecurity_driver = \"none\"\nsecurity_default_confined = 0\ncgroup_controllers = [ ]\nnamespaces = [ ]\nseccomp_sandbox = 0\nstdio_handler = \"file\"\n")
	h.write("etc/libvirt.conf", "")
	if c.Hook != "" {
		h.write("etc/hooks/qemu.d/kvmreplica", c.Hook)
		must(t, os.Chmod(filepath.Join(dir, "etc/hooks/qemu.d/kvmreplica"), 0o755))
	}
	h.write("boot.sh", fmt.Sprintf(`set -e
mount --make-rprivate /
mount -t proc proc /proc
hostname kvm-lv.test
mount -t tmpfs tmpfs /run; mkdir -p /run/libvirt /run/lock
mount --bind %[1]s/run /run/libvirt
for d in etc lib cache log; do
  case $d in etc) to=/etc/libvirt;; *) to=/var/$d/libvirt;; esac
  mkdir -p $to; mount --bind %[1]s/$d $to
done
mkdir -p /var/lib/replicad; mount --bind %[1]s/replicad /var/lib/replicad
ip link set lo up || true
trap : TERM INT
while :; do /usr/sbin/libvirtd -p /run/libvirt/libvirtd.pid || echo "libvirtd ended: $?"; rm -f /run/libvirt/libvirtd.pid; done
`, dir))
	h.boot()
	return h
}

// boot starts the namespaces and waits for the socket.
func (h *labHost) boot() {
	t := h.t
	t.Helper()
	log, err := os.Create(filepath.Join(h.dir, "boot.log"))
	must(t, err)
	defer log.Close()
	cmd := exec.Command("unshare", "-m", "-p", "-n", "-u", "-i", "--fork", "--kill-child", "--mount-proc", "sh", filepath.Join(h.dir, "boot.sh"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // --kill-child takes everything in the pid namespace
		_ = cmd.Wait()
	})
	waitFor(t, "libvirtd's socket", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		hst, err := Dial(ctx, Options{Socket: h.sock, URI: "qemu:///system"})
		if err == nil {
			hst.Close()
		}
		return err == nil
	})
	kids, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
	must(t, err)
	h.init, err = strconv.Atoi(strings.TrimSpace(string(kids)))
	must(t, err)
}

// killLibvirtd kills the daemon alone; the loop in boot.sh starts another.
func (h *labHost) killLibvirtd() {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.dir, "run", "libvirtd.pid"))
	must(h.t, err)
	out, err := exec.Command("nsenter", "-t", strconv.Itoa(h.init), "-p", "-m", "kill", "-9", strings.TrimSpace(string(b))).CombinedOutput()
	if err != nil {
		h.t.Fatalf("kill libvirtd: %v: %s", err, out)
	}
}

func (h *labHost) write(name, content string) {
	h.t.Helper()
	must(h.t, os.WriteFile(filepath.Join(h.dir, name), []byte(content), 0o644))
}

// connect dials the private libvirtd.
func (h *labHost) connect(uri string) *Host {
	h.t.Helper()
	// libvirtd first asks every QEMU what it can do, which takes its time.
	v, err := Dial(h.t.Context(), Options{Socket: h.sock, URI: uri, CallTimeout: patience})
	must(h.t, err)
	h.t.Cleanup(func() { v.Close() })
	return v
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// patience is for loaded machines: what must merely happen gets this long.
const patience = 4 * time.Minute

// waitFor polls a condition that must come true.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	if !holds(t.Context(), patience, ok) {
		t.Fatalf("no %s within %v", what, patience)
	}
}

// holds waits until ok, at most for that long.
func holds(ctx context.Context, within time.Duration, ok func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}

// labOnly skips tests with guests unless they were asked for, and returns the
// folder with the test guest's vmlinuz and initrd.
func labOnly(t *testing.T) string {
	t.Helper()
	if os.Getenv("KVMREPLICA_LAB") == "" {
		t.Skip("runs guests; run: bin/kvmlab files DIR; KVMREPLICA_LAB=1 KVMREPLICA_GUEST=DIR go test -p 1 -timeout 15m -run Lab ./libvirt")
	}
	needs(t, "qemu-system-x86_64", "nbdkit")
	g := os.Getenv("KVMREPLICA_GUEST")
	for _, f := range []string{"vmlinuz", "rd.gz"} {
		if _, err := os.Stat(filepath.Join(g, f)); err != nil {
			t.Skipf("no test guest in KVMREPLICA_GUEST=%q: %v", g, err)
		}
	}
	return g
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	a, err := os.Open(from)
	must(t, err)
	defer a.Close()
	b, err := os.Create(to)
	must(t, err)
	_, err = io.Copy(b, a)
	must(t, err)
	must(t, b.Close())
}

// server is an NBD server of foreign make on a file.
type server struct {
	src NBDSource
	log string
	cmd *exec.Cmd
}

// serve starts nbdkit, which takes no image lock, on a file.
func serve(t *testing.T, dir, name, file string) *server {
	t.Helper()
	s := &server{src: NBDSource{Socket: filepath.Join(dir, name+".sock"), Export: name}, log: filepath.Join(dir, name+".log")}
	s.cmd = exec.Command("nbdkit", "-f", "-U", s.src.Socket, "-e", name, "--filter=log", "file", file, "logfile="+s.log)
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs bytes.Buffer
	s.cmd.Stderr = &errs
	must(t, s.cmd.Start())
	t.Cleanup(func() { _ = s.cmd.Process.Kill(); _ = s.cmd.Wait() })
	waitFor(t, "nbdkit's greeting", func() bool { return greet(t.Context(), s.src.Socket) == nil })
	return s
}

// writes counts the write requests that reached the server.
func (s *server) writes(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(s.log)
	must(t, err)
	return bytes.Count(b, []byte(" Write "))
}
