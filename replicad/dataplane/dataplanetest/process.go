package dataplanetest

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/dataplane"
)

// testEnv tells keepers and data planes which process tests with them.
const testEnv = "DATAPLANE_TEST_PROCESS"

// holdEnv makes keepers wait; see Hold.
const holdEnv = "DATAPLANE_TEST_HOLD"

// Hold is an addition to the environment of a test binary that is run by this
// one: its keepers wait, before they do anything, until somebody has written to
// the pipe, and all its processes end with this one instead of that one.
func Hold(pipe string) string { return fmt.Sprintf("%s=%d:%s", holdEnv, os.Getpid(), pipe) }

// Main lets a test binary be the keeper and the data plane as well, so that
// tests can kill real processes: call it from TestMain. They end with the test
// process, also when that is killed.
func Main(m *testing.M) int {
	if len(os.Args) > 2 && (os.Args[1] == "keeper" || os.Args[1] == "dataplane") {
		if err := verb(os.Args[1], os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	env := map[string]string{
		testEnv: strconv.Itoa(os.Getpid()),
		// The race detector lets a process that ends sleep for a second, behind
		// its last lock: tests wait for hundreds of these.
		"GORACE": strings.TrimSpace(os.Getenv("GORACE") + " atexit_sleep_ms=0"),
	}
	for k, v := range env {
		if err := os.Setenv(k, v); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return m.Run()
}

// endWithTest kills this process when the one that tests with it has ended. A
// keeper has a session of its own, so nothing else would.
func endWithTest() error {
	owner := os.Getenv(testEnv)
	if pid, _, ok := strings.Cut(os.Getenv(holdEnv), ":"); ok {
		owner = pid
	}
	pid, err := strconv.Atoi(owner)
	if err != nil {
		return fmt.Errorf("%s: %w", testEnv, err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("the test process %d: %w", pid, err)
	}
	go func() {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for n := 0; n == 0; {
			n, _ = unix.Poll(fds, -1) // interrupted: again
			n = max(n, 0)
		}
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}()
	return nil
}

func verb(name string, args []string) error {
	file := args[len(args)-1]
	if err := endWithTest(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch {
	case name == "dataplane" && args[0] == "--successor":
		return dataplane.RunSuccessor(ctx, file)
	case name == "dataplane":
		return dataplane.RunPlane(ctx, file)
	case args[0] == "--detach":
		return dataplane.Detach(file)
	}
	if _, pipe, ok := strings.Cut(os.Getenv(holdEnv), ":"); ok {
		if _, err := os.ReadFile(pipe); err != nil {
			return err
		}
	}
	return dataplane.RunKeeper(ctx, file)
}

// Ensure starts a keeper as a real process of this binary and ends it with the
// test. Again on the same configuration it finds the running one.
func Ensure(t testing.TB, cfg *dataplane.Config) *dataplane.Client {
	t.Helper()
	if cfg.Binary == "" {
		bin, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cfg.Binary = bin
		t.Cleanup(func() { end(t, *cfg) })
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	c, err := dataplane.Ensure(ctx, *cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func end(t testing.TB, cfg dataplane.Config) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	if err := dataplane.Stop(ctx, cfg); err != nil {
		t.Error(err)
	}
	if t.Failed() {
		b, err := os.ReadFile(filepath.Join(cfg.RunDir, "dataplane.log"))
		t.Logf("log (%v):\n%s", err, b)
	}
}

// Kill ends a process of this test with SIGKILL and waits until it is gone.
func Kill(t testing.TB, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, int(Patience.Milliseconds())); err != unix.EINTR {
			return
		}
	}
}
