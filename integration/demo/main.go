// Command demo plays the product's main job on one machine: two hosts, a real
// Linux guest, protection without a stop, planned failover, reverse
// replication by itself, planned failover back; then the first host loses power,
// the other goes on with what it has, and the VM returns once more.
//
// It prints every command it types and ends in one line of figures. The exit
// code is not 0 when a record that the guest had made durable is missing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

func main() {
	dir := flag.String("dir", "", "work directory (short path; default a new one below /tmp)")
	keep := flag.Bool("keep", false, "leave the two hosts running, with the VM protected")
	hands := flag.Bool("lab", false, "only make the two hosts and a running guest, and leave them for hands-on use")
	size := flag.Int64("size", 512, "size of the guest's disk in MiB")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *dir, *size<<20, *keep || *hands, *hands)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

const (
	vmName = "demo"
	vmUUID = "5eed0000-0000-4000-8000-000000000001"
	// stepTimeout bounds each wait: a guest boots in 5 to 20 s under emulation.
	stepTimeout = 3 * time.Minute
)

// show is one demonstration under way.
type show struct {
	e     *estate.Estate
	dom   guest.Domain
	from  time.Time
	moved []time.Duration // failover times, from the command to the guest's first word
	last  uint64          // highest record the guest had announced as durable
	miss  uint64
	cold  int64
	stats []status.Stats

	lost uint64        // records lost in the disaster, as announced
	rto  time.Duration // of the unplanned failover, up to the guest's start
	back status.Stats  // of the way back
}

func run(ctx context.Context, dir string, size int64, keep, hands bool) (err error) {
	if dir == "" {
		if dir, err = os.MkdirTemp("", "demo-"); err != nil {
			return err
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
	}
	s := &show{from: time.Now()}
	s.title("Two KVM hosts that share nothing, a daemon on each, paired")
	s.e, err = estate.Up(ctx, dir, estate.Options{Lab: lab.Options{Keep: keep}})
	if err != nil {
		return err
	}
	if !keep {
		defer func() { err = errors.Join(err, s.e.Down(), os.RemoveAll(dir)) }()
	}
	if hands {
		bctx, cancel := context.WithTimeout(ctx, 2*stepTimeout)
		defer cancel()
		if err := s.boot(bctx, size); err != nil {
			return err
		}
		s.tryThis(dir)
		return nil
	}
	for _, step := range []func(context.Context) error{
		func(ctx context.Context) error { return s.boot(ctx, size) },
		s.protect, s.cycles,
		func(ctx context.Context) error { return s.failover(ctx, "A", "B") },
		func(ctx context.Context) error { return s.failover(ctx, "B", "A") },
		s.disaster,
		s.end,
	} {
		sctx, cancel := context.WithTimeout(ctx, 2*stepTimeout)
		err := step(sctx)
		cancel()
		if err != nil {
			s.logs()
			return err
		}
	}
	if s.miss > 0 {
		return fmt.Errorf("%d records are missing", s.miss)
	}
	return nil
}

func (s *show) title(format string, a ...any) {
	fmt.Printf("\n== [%5.1fs] %s\n", time.Since(s.from).Seconds(), fmt.Sprintf(format, a...))
}

// ctl types a command on a host and shows both.
func (s *show) ctl(ctx context.Context, host string, args ...string) error {
	fmt.Printf("%s# replicactl %s\n", estate.Peer(host), strings.Join(args, " "))
	out, err := s.e.Ctl(ctx, host, args...)
	fmt.Print(out)
	return err
}

func (s *show) boot(ctx context.Context, size int64) error {
	if err := s.ctl(ctx, "A", "peer", "test", estate.Peer("B")); err != nil {
		return err
	}
	s.title("A guest with an ext4 root on host A appends numbered records, each fsynced")
	a := s.e.Lab.Host("A")
	image := "/var/lib/libvirt/images/" + vmName + ".raw"
	if err := os.MkdirAll(filepath.Dir(a.Path(image)), 0o755); err != nil {
		return err
	}
	if err := guest.RootImage(ctx, s.e.Files, a.Path(image), size); err != nil {
		return err
	}
	s.dom = guest.Domain{
		Name: vmName, UUID: vmUUID, Files: s.e.Files, Root: true, Knobs: "lab.interval=20 lab.load=256 lab.loadsize=32",
		Disks: []guest.Disk{{File: image, Serial: "demo-root"}},
	}
	if err := s.e.Define(ctx, "A", s.dom); err != nil {
		return err
	}
	c, err := s.e.Console("A", s.dom, false)
	if err != nil {
		return err
	}
	if _, err := a.Virsh(ctx, "start", vmName); err != nil {
		return err
	}
	n, err := c.WaitSynced(ctx, 20)
	fmt.Printf("guest: record %d is durable\n", n)
	return err
}

func (s *show) protect(ctx context.Context) error {
	s.title("Protect it, running, every 5 seconds")
	before, err := s.e.Lab.Host("A").Virsh(ctx, "domstate", vmName)
	if err != nil {
		return err
	}
	fmt.Printf("the guest is %s and stays so\n", strings.TrimSpace(before))
	if err := s.ctl(ctx, "A", "vm", "enable", vmName, "--to", estate.Peer("B"), "--every", "5s", "--yes"); err != nil {
		return err
	}
	s.title("Initial copy while the guest writes")
	shown := ""
	v, err := s.e.WaitStatus(ctx, "A", vmName, "replicating", func(v status.VM) bool {
		line := string(v.State)
		if v.Job != nil && v.Job.Total > 0 {
			line = fmt.Sprintf("%s %3d%% %d MiB/s", v.State, 100*v.Job.Done/v.Job.Total, v.Job.Rate>>20)
		}
		if line != shown {
			fmt.Println(line)
			shown = line
		}
		return v.State == status.Replicating && !v.LastCommit.IsZero()
	})
	s.cold = v.Stats.SentBytes
	return err
}

func (s *show) cycles(ctx context.Context) error {
	s.title("Changes flow: four cycles")
	v, err := s.e.Status(ctx, "A", vmName)
	if err != nil {
		return err
	}
	for range 4 {
		last := v
		v, err = s.e.WaitStatus(ctx, "A", vmName, "one cycle further", func(v status.VM) bool { return v.Stats.Cycles > last.Stats.Cycles })
		if err != nil {
			return err
		}
		fmt.Printf("cycle %d: %d KiB changed, %d KiB sent, latency %v, RPO now %v\n", v.Stats.Cycles,
			(v.Stats.RawBytes-last.Stats.RawBytes)>>10, (v.Stats.SentBytes-last.Stats.SentBytes)>>10,
			v.Stats.AverageLatency.Round(time.Millisecond), v.RPO.Round(100*time.Millisecond))
	}
	return nil
}

func (s *show) failover(ctx context.Context, from, to string) error {
	s.title("Replication health before the failover")
	if err := s.ctl(ctx, from, "vm", "status", vmName); err != nil {
		return err
	}
	if v, err := s.e.Status(ctx, from, vmName); err == nil {
		s.stats = append(s.stats, v.Stats)
	}
	s.title("Planned failover from %s to %s", estate.Peer(from), estate.Peer(to))
	src, err := s.e.Console(from, s.dom, from == "B")
	if err != nil {
		return err
	}
	dst, err := s.e.Console(to, s.dom, to == "B")
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := s.ctl(ctx, from, "failover", "planned", vmName, "--yes"); err != nil {
		return err
	}
	if err := s.compare(ctx, src, dst); err != nil {
		return err
	}
	s.moved = append(s.moved, time.Since(begun))
	if _, err := dst.WaitSynced(ctx, s.last+20); err != nil {
		return err
	}
	s.title("Replication was reversed by itself")
	if _, err := s.e.WaitStatus(ctx, to, vmName, "replicating in the new direction", func(v status.VM) bool {
		return v.State == status.Replicating && v.Role == status.Primary && v.Stats.Cycles > 1
	}); err != nil {
		return err
	}
	return s.ctl(ctx, to, "vm", "status", vmName)
}

// compare holds what the guest said last on the old host against what it found
// on its disk on the new one.
func (s *show) compare(ctx context.Context, src, dst *console.Console) error {
	last, err := src.WaitWord(ctx, "LAST")
	if err != nil {
		return err
	}
	boot, err := dst.WaitBoot(ctx)
	if err != nil {
		return err
	}
	s.last = boot.Uint("highest")
	n := last.Uint("n")
	fmt.Printf("guest: last record on the old host %d, found on the new one %d, bad %s\n", n, s.last, boot.Args["bad"])
	if s.last < n {
		s.miss += n - s.last
	}
	if bad := boot.Int("bad"); bad >= 0 {
		return fmt.Errorf("record %d is damaged on the new host: %s", bad, boot.Raw)
	}
	return nil
}

func (s *show) end(ctx context.Context) error {
	s.title("The first state again")
	if err := s.ctl(ctx, "A", "vm", "list"); err != nil {
		return err
	}
	if err := s.ctl(ctx, "B", "vm", "list"); err != nil {
		return err
	}
	v, err := s.e.Status(ctx, "A", vmName)
	if err != nil {
		return err
	}
	s.stats = append(s.stats, v.Stats)
	var raw, sent int64
	med, most := time.Duration(0), time.Duration(0)
	for _, st := range s.stats {
		raw, sent = raw+st.RawBytes, sent+st.SentBytes
		med, most = max(med, st.RPOMedian), max(most, st.RPOMax)
	}
	fmt.Printf("\ndemo: unplanned failover %v and boot %v, records lost %d as announced, sent for the way back %d KiB for %d KiB that differed\n",
		s.rto.Round(10*time.Millisecond), (s.moved[2] - s.rto).Round(100*time.Millisecond), s.lost, s.back.SentBytes>>10, s.back.RawBytes>>10)
	fmt.Printf("demo: records written: %d, records missing: %d, RPO median %v max %v, failover %v and back %v, changed %d KiB, sent %d KiB, %d s in all\n",
		s.last, s.miss, med.Round(10*time.Millisecond), most.Round(10*time.Millisecond),
		s.moved[0].Round(100*time.Millisecond), s.moved[1].Round(100*time.Millisecond), raw>>10, sent>>10, int(time.Since(s.from).Seconds()))
	return nil
}

// tryThis prints what a person can type in a lab that was left running.
func (s *show) tryThis(dir string) {
	root, err := lab.RepoRoot()
	if err != nil {
		root = "."
	}
	bin := filepath.Join(root, "bin")
	fmt.Printf(`
Two hosts are up in %[1]s, paired; the guest %[2]q runs on A. Try, as root:

  on() { h=$1; shift; %[3]s/kvmlab exec %[1]s $h -- "$@"; }
  on A %[3]s/replicactl vm enable %[2]s --to kvm-b --every 5s --yes
  on A %[3]s/replicactl vm watch %[2]s
  on A %[3]s/replicactl failover planned %[2]s --yes
  on B %[3]s/replicactl vm status %[2]s
  on B virsh list --all
  %[3]s/kvmlab crash %[1]s A                      # a power cut of host A

Take it down with: make clean (or %[3]s/kvmlab down %[1]s)
`, dir, vmName, bin)
}

// logs shows what the daemons said last, after a failure.
func (s *show) logs() {
	for _, h := range []string{"A", "B"} {
		d := s.e.Daemon(h)
		if d == nil {
			continue
		}
		b, err := os.ReadFile(d.LogPath)
		if err == nil {
			fmt.Fprintf(os.Stderr, "--- replicad on %s, last lines:\n%s\n", estate.Peer(h), b[max(0, len(b)-6000):])
		}
	}
}
