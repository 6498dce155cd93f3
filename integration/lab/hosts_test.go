package lab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/labtest"
	"kvmreplica/integration/lab/proxy"
)

// bare makes a lab without guests' files.
func bare(t *testing.T, opts lab.Options) *lab.Lab {
	t.Helper()
	labtest.Require(t)
	dir := t.TempDir()
	l, err := lab.Up(t.Context(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// in runs a command in a host.
func in(t *testing.T, h *lab.Host, cmd ...string) string {
	t.Helper()
	out, err := h.Exec(labtest.Step(t), cmd[0], cmd[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func reaches(t *testing.T, from, to *lab.Host) bool {
	t.Helper()
	_, err := from.Exec(labtest.Step(t), "busybox", "ping", "-c1", "-W1", to.IP())
	return err == nil
}

// getsThrough waits until a ping is answered.
func getsThrough(t *testing.T, from, to *lab.Host) {
	t.Helper()
	in(t, from, "sh", "-c", "until busybox ping -c1 -W1 "+to.IP()+"; do sleep 0.1; done")
}

func TestHostsAreTwoMachines(t *testing.T) {
	l := bare(t, lab.Options{})
	a, b := l.Host("A"), l.Host("B")
	for _, cmd := range [][]string{
		{"hostname"},
		{"cat", "/etc/machine-id"},
		{"cat", "/proc/sys/kernel/random/boot_id"},
		{"virsh", "capabilities"},
		{"ip", "-br", "addr"},
	} {
		if x, y := in(t, a, cmd...), in(t, b, cmd...); x == y {
			t.Errorf("%v says the same on both: %s", cmd, x)
		}
	}
	getsThrough(t, a, b)
	getsThrough(t, b, a)
	for _, h := range l.Hosts() {
		in(t, h, "virsh", "net-start", "default") // the same addresses and names on both
	}
}

func TestPowerCutTakesEverythingButTheDisks(t *testing.T) {
	l := bare(t, lab.Options{})
	a := l.Host("A")
	in(t, a, "virsh", "net-start", "default")
	in(t, a, "sh", "-c", "echo kept > /var/lib/replicad/f; echo lost > /run/f; echo lost > /dev/shm/f")
	boot := in(t, a, "cat", "/proc/sys/kernel/random/boot_id")
	d, err := a.StartDaemon("sleep", []string{"1000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Crash(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Done():
	case <-time.After(labtest.StepTimeout):
		t.Fatal("a daemon outlived its host")
	}
	if a.Up() {
		t.Error("the host is up after a power cut")
	}
	if !l.Host("B").Up() {
		t.Error("the other host went with it")
	}
	if err := a.Start(labtest.Step(t)); err != nil {
		t.Fatal(err)
	}
	if got := in(t, a, "cat", "/var/lib/replicad/f"); got != "kept" {
		t.Errorf("a file on disk reads %q", got)
	}
	in(t, a, "sh", "-c", "! test -e /run/f && ! test -e /dev/shm/f")
	if in(t, a, "cat", "/proc/sys/kernel/random/boot_id") == boot {
		t.Error("the boot id did not change")
	}
	in(t, a, "virsh", "net-start", "default")
	getsThrough(t, l.Host("B"), a)
}

func TestPulledCableAndDeadSwitchCutOneHostOff(t *testing.T) {
	l := bare(t, lab.Options{NoLibvirt: true})
	a, b := l.Host("A"), l.Host("B")
	getsThrough(t, a, b)
	for name, cut := range map[string]func(bool) error{
		"link":    func(off bool) error { return a.Link(!off) },
		"silence": a.Silence,
	} {
		if err := cut(true); err != nil {
			t.Fatal(name, err)
		}
		if reaches(t, b, a) {
			t.Errorf("%s: reached although cut off", name)
		}
		carrier := in(t, a, "cat", "/sys/class/net/eth0/operstate")
		if name == "link" && carrier != "down" || name == "silence" && carrier != "up" {
			t.Errorf("%s: the host sees its link %s", name, carrier)
		}
		if got := in(t, b, "cat", "/sys/class/net/eth0/operstate"); got != "up" {
			t.Errorf("%s: the other host sees its link %s", name, got)
		}
		if err := cut(false); err != nil {
			t.Fatal(name, err)
		}
		getsThrough(t, b, a)
	}
}

func TestRelayBetweenTheHostsCanBeCut(t *testing.T) {
	l := bare(t, lab.Options{NoLibvirt: true})
	a, b := l.Host("A"), l.Host("B")
	server, err := b.Listen("tcp", b.IP()+":7000")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan string, 1)
	go func() {
		defer close(served)
		c, err := server.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		text, _ := io.ReadAll(c) // ends with the cut
		served <- fmt.Sprint(c.RemoteAddr().(*net.TCPAddr).IP, " ", string(text))
	}()
	ln, err := a.Listen("tcp", a.IP()+":7001")
	if err != nil {
		t.Fatal(err)
	}
	p := proxy.Serve(ln, func(ctx context.Context) (net.Conn, error) { return a.Dial(ctx, "tcp", b.IP()+":7000") })
	p.CutAfter(proxy.Up, 5)
	in(t, a, "sh", "-c", "echo 0123456789 | busybox nc -w 5 "+a.IP()+" 7001 || true")
	if got := <-served; got != a.IP()+" 01234" {
		t.Errorf("host B was sent %q, want the first 5 bytes, from host A", got)
	}
	if err := errors.Join(p.Close(), server.Close()); err != nil {
		t.Error(err)
	}
	if _, err := a.Dial(labtest.Step(t), "tcp", b.IP()+":7000"); err == nil {
		t.Error("a closed port answers")
	}
}

func TestDaemonsGetSignalsAndLeaveTheirChildren(t *testing.T) {
	l := bare(t, lab.Options{NoLibvirt: true})
	a := l.Host("A")
	d, err := a.StartDaemon("sh", []string{"-c", `echo "$WORD"; setsid sleep 1000 & echo $! > /run/child; wait`}, []string{"WORD=heard"})
	if err != nil {
		t.Fatal(err)
	}
	in(t, a, "sh", "-c", "for i in $(seq 2000); do test -s /run/child && exit 0; sleep 0.05; done; exit 1")
	if err := d.Kill(); err != nil {
		t.Fatal(err)
	}
	in(t, a, "sh", "-c", "kill -0 $(cat /run/child)")
	if text, err := os.ReadFile(d.LogPath); err != nil || string(text) != "heard\n" {
		t.Errorf("log %q, %v", text, err)
	}

	d, err = a.StartDaemon("sleep", []string{"1000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Stop(labtest.Step(t)); err != nil {
		t.Error(err)
	}
	d, err = a.StartDaemon("sh", []string{"-c", "trap '' TERM; echo ready > /run/deaf; while :; do sleep 1; done"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	in(t, a, "sh", "-c", "for i in $(seq 2000); do test -s /run/deaf && exit 0; sleep 0.05; done; exit 1")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := d.Stop(ctx); err == nil {
		t.Error("a daemon that ignores SIGTERM ended by it")
	}
	if err := d.Signal(syscall.SIGTERM); err != nil {
		t.Errorf("a signal to an ended daemon: %v", err)
	}
	if _, err := a.StartDaemon("no-such-program", nil, nil); err == nil {
		t.Error("a program that does not exist was started")
	}
}

func TestCommandsPassOutputErrorsAndCodes(t *testing.T) {
	l := bare(t, lab.Options{NoLibvirt: true})
	out, err := l.Host("B").Exec(labtest.Step(t), "sh", "-c", "echo out; echo bad news >&2; exit 3")
	if out != "out\n" || err == nil || !strings.Contains(err.Error(), "exit status 3: bad news") {
		t.Errorf("got %q, %v", out, err)
	}
	if err := l.Host("B").Crash(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host("B").Exec(labtest.Step(t), "true"); err == nil || !strings.Contains(err.Error(), "not running") {
		t.Errorf("a command on a host without power: %v", err)
	}
}

func TestLibvirtdComesBackUnlessItIsHeld(t *testing.T) {
	l := bare(t, lab.Options{})
	a := l.Host("A")
	if err := a.KillLibvirtd(false); err != nil {
		t.Fatal(err)
	}
	if err := a.WaitLibvirtd(labtest.Step(t)); err != nil {
		t.Fatal(err)
	}
	if err := a.KillLibvirtd(true); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := a.WaitLibvirtd(ctx); err == nil {
		t.Error("libvirtd answers although it is held down")
	}
	if err := a.ReleaseLibvirtd(labtest.Step(t)); err != nil {
		t.Error(err)
	}
}

func TestLabsStandSideBySideAndReplaceTheirOwnKind(t *testing.T) {
	labtest.Require(t)
	first := bare(t, lab.Options{NoLibvirt: true})
	dir := t.TempDir()
	old, err := lab.Up(t.Context(), dir, lab.Options{NoLibvirt: true, Keep: true})
	if err != nil {
		t.Fatal(err)
	}
	found, err := lab.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	in(t, found.Host("A"), "sh", "-c", "echo x > /etc/replicad/f")
	next, err := lab.Up(t.Context(), dir, lab.Options{NoLibvirt: true})
	if err != nil {
		t.Fatal(err)
	}
	if old.Host("A").Up() || old.Host("B").Up() {
		t.Error("the earlier lab's hosts still run")
	}
	in(t, next.Host("A"), "sh", "-c", "! test -e /etc/replicad/f")
	for range 2 {
		if err := next.Down(); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 1 { // the built helper stays
		t.Errorf("left behind: %v %v", left, err)
	}
	if !first.Host("A").Up() {
		t.Error("taking one lab down ended another")
	}
}
