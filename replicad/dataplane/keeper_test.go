package dataplane_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

func open(t *testing.T, c *dataplane.Client, generation byte) {
	t.Helper()
	ctx := context.Background()
	if err := c.CreateTracker(ctx, dataplane.CreateRequest{Generation: dt.Generation(generation)}); err != nil {
		t.Fatal(err)
	}
	if err := c.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
		t.Fatal(err)
	}
}

func status(t *testing.T, c *dataplane.Client) dataplane.Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), dt.Patience)
	defer cancel()
	var err error
	for ctx.Err() == nil {
		var st dataplane.Status
		if st, err = c.Status(ctx); err == nil {
			return st
		}
	}
	t.Fatal(err)
	return dataplane.Status{}
}

func pidIn(t *testing.T, path string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestAKilledDataPlaneIsBackBeforeTheGuestNoticesAnError(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 16*mib)
	c := dt.Ensure(t, &cfg)
	open(t, c, 1)
	g := dt.Boot(t, cfg, 7)
	g.Scribble(50)
	first := shipClient(t, c, delta.Pos{}, g)
	load := g.Start()
	for range 3 {
		load.Changed(t, 10) // a cut of nothing uses no number and holds nothing
		before := status(t, c)
		e, err := c.Freeze(ctx, dataplane.FreezeRequest{Parent: first})
		if err != nil || e.Empty {
			t.Fatalf("freeze %d pending bytes: %+v, %v", before.Pending, e, err)
		}
		dt.Kill(t, before.PID)
		after := status(t, c)
		if after.Instance == before.Instance || after.PID == before.PID {
			t.Fatalf("the killed process answers: %+v", after)
		}
		if after.Frozen != nil || after.Suspect != 0 || !strings.HasPrefix(after.Recovered, "shared") || after.Acked != first {
			t.Fatalf("after a kill: %+v", after)
		}
		if after.Highest < e.Epoch {
			t.Fatalf("epoch %d could be used again: highest is %d", e.Epoch, after.Highest)
		}
	}
	load.Stop(t)
	g.Check()
	shipClient(t, c, first, g)
}

// shipClient ships one epoch and checks it against the guest, which must not
// be writing. Only the changed blocks travel: the parent's content is taken
// from the guest's model by applying onto what was shipped before.
func shipClient(t *testing.T, c *dataplane.Client, parent delta.Pos, g *dt.Guest) delta.Pos {
	t.Helper()
	ctx := context.Background()
	want := g.Snapshot()
	e, err := c.Freeze(ctx, dataplane.FreezeRequest{Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Frames(ctx, e.Epoch, 0)
	if err != nil {
		t.Fatal(err)
	}
	if g.Replica == nil {
		g.Replica = map[string]*block.Mem{}
	}
	pos := dt.MustApply(t, r, g.Replica).Pos
	for n, w := range want {
		dt.SameContent(t, "replica's "+string(n), dt.Content(t, g.Replica[string(n)]), w)
	}
	if err := c.Ack(ctx, pos); err != nil {
		t.Fatal(err)
	}
	return pos
}

func TestAKilledKeeperLeavesTheGuestAloneAndANewOneAdopts(t *testing.T) {
	cfg := dt.Config(t, 8*mib)
	c := dt.Ensure(t, &cfg)
	open(t, c, 1)
	g := dt.Boot(t, cfg, 8)
	g.Scribble(20)
	before := status(t, c)
	dt.Kill(t, pidIn(t, cfg.RunDir+"/keeper.pid"))
	g.Scribble(20) // still served
	c = dt.Ensure(t, &cfg)
	if after := status(t, c); after.Instance != before.Instance {
		t.Fatal("a running data plane was replaced")
	}
	g.Scribble(20)
	// The new keeper restarts it and the sockets are the old ones.
	dt.Kill(t, before.PID)
	g.Scribble(20)
	if after := status(t, c); after.Instance == before.Instance {
		t.Fatal("the same instance after a kill")
	}
	g.Check()
}

func TestStopDrainsAndLeavesACleanTracker(t *testing.T) {
	cfg := dt.Config(t, 8*mib)
	c := dt.Ensure(t, &cfg)
	open(t, c, 1)
	g := dt.Boot(t, cfg, 9)
	g.Scribble(30)
	pending := status(t, c).Pending
	ctx := context.Background()
	if err := c.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if err := dataplane.Stop(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cfg.NBDSocket()); !os.IsNotExist(err) {
		t.Fatalf("the socket is still there: %v", err)
	}
	c = dt.Ensure(t, &cfg)
	st := status(t, c)
	if st.Recovered != "" || st.Suspect != 0 || st.Pending != pending || !st.Disks[0].Exported {
		t.Fatalf("after a clean stop: %+v, want %d pending", st, pending)
	}
	g.Check()
	if err := dataplane.Stop(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	if err := dataplane.Stop(ctx, cfg); err != nil {
		t.Fatalf("stop twice: %v", err)
	}
}

func TestEnsureSaysWhyTheDataPlaneCannotStart(t *testing.T) {
	cfg := dt.Config(t, 8*mib)
	held, err := block.OpenFile(cfg.Disks[0].Path, block.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Binary, err = os.Executable(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), dt.Patience)
	defer cancel()
	t.Cleanup(func() {
		if err := dataplane.Stop(context.Background(), cfg); err != nil {
			t.Error(err)
		}
	})
	_, err = dataplane.Ensure(ctx, cfg)
	if kind(err) != wire.KindConflict || !strings.Contains(err.Error(), "in use") {
		t.Fatalf("ensure with a locked image: %v", err)
	}
	// It mends itself once the image is free.
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	for {
		c, err := dataplane.Ensure(ctx, cfg)
		if err == nil {
			c.Close()
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

func TestARefusalKeepsExportsClosedAcrossRestarts(t *testing.T) {
	ctx := context.Background()
	cfg := dt.Config(t, 8*mib)
	c := dt.Ensure(t, &cfg)
	open(t, c, 1)
	if err := c.Refuse(ctx, "demoted at 5"); err != nil {
		t.Fatal(err)
	}
	if err := c.Export(ctx, dataplane.ExportRequest{On: true}); kind(err) != wire.KindRefused || !strings.Contains(err.Error(), "demoted at 5") {
		t.Fatalf("export although refused: %v", err)
	}
	dt.Kill(t, status(t, c).PID)
	st := status(t, c)
	if st.Refuse != "demoted at 5" || st.Disks[0].Exported {
		t.Fatalf("after a restart: %+v", st)
	}
	if err := c.Refuse(ctx, ""); err != nil {
		t.Fatal(err)
	}
	if err := c.Export(ctx, dataplane.ExportRequest{On: true}); err != nil {
		t.Fatal(err)
	}
	dt.Boot(t, cfg, 1).Scribble(5)
}

// A keeper has a session of its own and would outlive a test that is killed.
func TestNoKeeperOutlivesATestThatIsKilled(t *testing.T) {
	if os.Getenv("KILLED_TEST") != "" {
		cfg := dt.Config(t, mib)
		dt.Ensure(t, &cfg)
		fmt.Println("RUNS", pidIn(t, filepath.Join(cfg.RunDir, "keeper.pid")), pidIn(t, filepath.Join(cfg.RunDir, "dataplane.pid")))
		select {}
	}
	dir, err := os.MkdirTemp("", "dk") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "KILLED_TEST=1", "TMPDIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var keeper, plane int
	if _, err := fmt.Fscanf(out, "RUNS %d %d\n", &keeper, &plane); err != nil {
		t.Error(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	for _, pid := range []int{keeper, plane} {
		for deadline := time.Now().Add(dt.Patience); ; {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err != nil || !strings.Contains(string(b), dir) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("process %d outlives the test: %q", pid, b)
			}
		}
	}
}

// A start that is given up half-way leaves no keeper that comes up afterwards
// and holds the images of a role that has ended.
func TestAStartThatIsGivenUpLeavesNoKeeperBehindStop(t *testing.T) {
	for i := range 15 {
		cfg := dt.Config(t, 16*mib)
		file := filepath.Join(cfg.RunDir, "config.json")
		ctx, cancel := context.WithCancel(context.Background())
		given := make(chan error, 1)
		go func() {
			c, err := dataplane.Ensure(ctx, cfg)
			if err == nil {
				c.Close()
			}
			given <- err
		}()
		for deadline := time.Now().Add(dt.Patience); ; {
			if _, err := os.Stat(file); err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s never appeared", file)
			}
			runtime.Gosched()
		}
		<-time.After(time.Duration(i) * time.Millisecond) // somewhere in the start
		cancel()
		<-given
		bounded, done := context.WithTimeout(context.Background(), dt.Patience)
		err := dataplane.Stop(bounded, cfg)
		done()
		if err != nil {
			t.Fatal(err)
		}
		// Stop waits for the locks; a process gives its own back just before its
		// last instruction.
		for deadline := time.Now().Add(dt.Patience); ; runtime.Gosched() {
			left := processesOf(t, file)
			if left == "" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("start given up after %d ms: behind Stop there is %s", i, left)
			}
		}
	}
}

// processesOf lists the processes with text in their arguments.
func processesOf(t *testing.T, text string) (found string) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), text) {
			found += fmt.Sprintf("%s: %q ", filepath.Dir(p), b)
		}
	}
	return found
}
