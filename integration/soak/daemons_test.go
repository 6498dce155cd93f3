package soak_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/labtest"
	"kvmreplica/integration/lab/proxy"
	"kvmreplica/replicad/status"
)

// linePort is where a host finds the other one's daemon, behind the proxy.
const linePort = 7900

// site is two hosts with the real daemons, and the bad line between them.
type site struct {
	*estate.Estate
	t      *testing.T
	guests []guest.Domain
	lines  []*proxy.Proxy
}

// TestRealDaemonsOverABadLineHoldNoMoreThanTheyNeed is the same with everything
// real: libvirtd, guests that append records and write at random, both daemons
// as processes of their own, steered with replicactl alone. Meanwhile recovery
// points come and go by a short retention, are mounted, and are tried as test
// copies. In the end the line is good, the guests saw no error and every image
// on B equals that on A.
func TestRealDaemonsOverABadLineHoldNoMoreThanTheyNeed(t *testing.T) {
	labtest.Require(t)
	long, seed := length(t)
	s := newSite(t)
	n := 3
	if os.Getenv("KVMREPLICA_SOAK") == "" {
		n = 1
	}
	for i := range n {
		s.guests = append(s.guests, s.protect(i))
	}
	var ends []func()
	for i, l := range s.lines {
		ends = append(ends, disturb(l, seed+uint64(i)))
	}
	before := s.planes()
	var samples []sample
	begin := time.Now()
	for round, next := 0, time.Duration(0); time.Since(begin) < long || round < n; round++ {
		s.live(round)
		if now := time.Since(begin); now >= next {
			samples = append(samples, s.take(now, before))
			next = now + long/40
		}
	}
	for _, end := range ends {
		end()
	}
	s.settle()
	if after := s.planes(); !slices.Equal(before, after) {
		t.Errorf("data planes died: %v became %v", before, after)
	}
	judge(t, samples)
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "soak-")
	must(t, err)
	must(t, os.Chmod(dir, 0o755)) // QEMU's user looks into it
	e, err := estate.Up(t.Context(), dir, estate.Options{})
	must(t, err)
	s := &site{Estate: e, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			s.logs()
		}
		for _, l := range s.lines {
			_ = l.Close()
		}
		if err := errors.Join(e.Down(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	for _, way := range [][2]string{{"A", "B"}, {"B", "A"}} {
		from, to := e.Lab.Host(way[0]), e.Lab.Host(way[1])
		here := net.JoinHostPort(from.IP(), strconv.Itoa(linePort))
		there := net.JoinHostPort(to.IP(), strconv.Itoa(estate.Port))
		ln, err := from.Listen("tcp", here)
		must(t, err)
		s.lines = append(s.lines, proxy.Serve(ln, func(ctx context.Context) (net.Conn, error) { return from.Dial(ctx, "tcp", there) }))
		s.ctl(way[0], "peer", "address", estate.Peer(way[1]), here)
	}
	return s
}

func (s *site) logs() {
	for _, h := range []string{"A", "B"} {
		if b, err := os.ReadFile(s.Daemon(h).LogPath); err == nil {
			s.t.Logf("--- replicad on %s:\n%s", h, b[max(0, len(b)-5000):])
		}
	}
}

func (s *site) step() context.Context {
	ctx, cancel := context.WithTimeout(s.t.Context(), labtest.StepTimeout)
	s.t.Cleanup(cancel)
	return ctx
}

func (s *site) ctl(host string, args ...string) string {
	s.t.Helper()
	out, err := s.Ctl(s.step(), host, args...)
	must(s.t, err)
	return out
}

// protect makes a guest with two disks and waits for its first complete copy,
// over a line that is still good.
func (s *site) protect(i int) guest.Domain {
	s.t.Helper()
	d := guest.Domain{
		Name: fmt.Sprintf("vm%d", i), UUID: fmt.Sprintf("50a50000-0000-4000-8000-%012d", i), Files: s.Files, Agent: true,
		Knobs: "lab.interval=50 lab.load=256",
	}
	for k := range disks {
		p := fmt.Sprintf("/var/lib/libvirt/images/%s-%d.raw", d.Name, k)
		must(s.t, os.MkdirAll(filepath.Dir(s.Lab.Host("A").Path(p)), 0o755))
		must(s.t, guest.BlankImage(s.Lab.Host("A").Path(p), 128<<20))
		d.Disks = append(d.Disks, guest.Disk{File: p, Serial: fmt.Sprintf("%s-%d", d.Name, k)})
	}
	must(s.t, s.Define(s.step(), "A", d))
	c, err := s.Console("A", d, false)
	must(s.t, err)
	labtest.Virsh(s.t, s.Lab.Host("A"), "start", d.Name)
	_, err = c.WaitSynced(s.step(), 10)
	must(s.t, err)
	s.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--points", "all:30s,15s:2m", "--yes")
	s.wait("A", d, "replicating", func(v status.VM) bool { return v.State == status.Replicating && !v.LastCommit.IsZero() })
	return d
}

func (s *site) wait(host string, d guest.Domain, what string, want func(status.VM) bool) status.VM {
	s.t.Helper()
	v, err := s.WaitStatus(s.step(), host, d.Name, what, want)
	must(s.t, err)
	return v
}

// live is one round of an administrator's day: a VM's point is mounted and
// tried while all go on.
func (s *site) live(round int) {
	s.t.Helper()
	d := s.guests[round%len(s.guests)]
	e := s.wait("A", d, "there", func(status.VM) bool { return true }).Epoch
	s.wait("B", d, "two epochs on", func(v status.VM) bool { return v.Epoch >= e+2 })
	s.ctl("B", "point", "mount", d.Name, "--point", "latest")
	s.ctl("B", "failover", "test", d.Name)
	s.wait("B", d, "tried", func(v status.VM) bool { return len(v.Tests) == 1 })
	s.ctl("B", "failover", "test-stop", d.Name, "--all")
	s.ctl("B", "point", "unmount", d.Name)
	s.wait("B", d, "without copies", func(v status.VM) bool { return len(v.Tests) == 0 })
	for _, h := range []string{"A", "B"} {
		s.ctl(h, "vm", "list")
	}
}

// planes are the data planes' processes on both hosts, as the machine sees them.
func (s *site) planes() []int {
	s.t.Helper()
	var pids []int
	for _, d := range s.guests {
		v := s.wait("A", d, "served", func(v status.VM) bool { return v.Program != nil && v.Program.PID != 0 })
		pids = append(pids, outside(s.t, s.Lab.Host("A").Pid(), v.Program.PID))
	}
	return pids
}

// outside is the machine's number of the process that a host calls pid.
func outside(t *testing.T, host, pid int) int {
	t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", host))
	must(t, err)
	all, err := os.ReadDir("/proc")
	must(t, err)
	for _, p := range all {
		n, err := strconv.Atoi(p.Name())
		if err != nil {
			continue
		}
		if at, err := os.Readlink(filepath.Join("/proc", p.Name(), "ns/pid")); err != nil || at != ns {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", p.Name(), "status"))
		if err != nil {
			continue // it has ended
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); f[0] == "NSpid:" && f[len(f)-1] == strconv.Itoa(pid) {
				return n
			}
		}
	}
	t.Fatalf("no process %d in the host", pid)
	return 0
}

// take measures both daemons and the data planes on A.
func (s *site) take(at time.Duration, planes []int) sample {
	s.t.Helper()
	m := sample{at: at.Round(time.Second)}
	for _, h := range []string{"A", "B"} {
		p := s.Daemon(h).Pid()
		m.rss += rss(s.t, p)
		m.fds += descriptors(s.t, p)
		m.goroutines += strings.Count("\n"+s.ctl(h, "doctor", "--stacks"), "\ngoroutine ")
	}
	for _, p := range planes {
		m.planeRSS += rss(s.t, p)
		m.planeFDs += descriptors(s.t, p)
	}
	return m
}

// settle stops the guests' clocks, ships what is left over a good line, and
// compares.
func (s *site) settle() {
	s.t.Helper()
	for _, d := range s.guests {
		labtest.Virsh(s.t, s.Lab.Host("A"), "suspend", d.Name)
		s.ctl("A", "vm", "sync", d.Name)
		v := s.wait("A", d, "well", func(v status.VM) bool { return v.Health == "normal" })
		for i, disk := range d.Disks {
			there := fmt.Sprintf("/proc/%d/root/var/lib/libvirt/replicas/%s/%s.raw", s.Lab.Host("B").Pid(), d.UUID, d.Target(i))
			s.equal(s.Lab.Host("A").Path(disk.File), there)
		}
		log, err := os.ReadFile(s.Lab.Host("A").Path(d.ConsoleFile()))
		must(s.t, err)
		for _, bad := range []string{"I/O error", "ERROR op=", "EXT4-fs error"} {
			if bytes.Contains(log, []byte(bad)) {
				s.t.Errorf("%s saw: %s", d.Name, bad)
			}
		}
		s.t.Logf("%s: %d cycles, %d errors, %d MiB sent, RPO %v median %v max", d.Name,
			v.Stats.Cycles, v.Stats.Errors, v.Stats.SentBytes>>20, v.Stats.RPOMedian, v.Stats.RPOMax)
	}
}

// equal waits until what was received is applied.
func (s *site) equal(a, b string) {
	s.t.Helper()
	ctx, tick := s.step(), time.NewTicker(200*time.Millisecond)
	defer tick.Stop()
	for {
		x, err := os.ReadFile(a)
		must(s.t, err)
		y, err := os.ReadFile(b)
		must(s.t, err)
		if bytes.Equal(x, y) {
			return
		}
		select {
		case <-ctx.Done():
			s.t.Fatalf("%s and %s differ", a, b)
		case <-tick.C:
		}
	}
}
