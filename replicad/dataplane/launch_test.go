package dataplane_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

// processes are those whose command line has all of the words.
func processes(t *testing.T, words ...string) (pids []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		b, err := os.ReadFile(p)
		if err != nil {
			continue // it has ended
		}
		line := strings.ReplaceAll(string(b), "\x00", " ")
		ok := true
		for _, w := range words {
			ok = ok && strings.Contains(line, w)
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(p))); ok && err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// comes waits for what must merely happen.
func comes(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(dt.Patience); !ok(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came about: %s", what)
		}
	}
}

// writer opens a pipe as soon as somebody wants to read it.
func writer(t *testing.T, pipe string) (w *os.File) {
	t.Helper()
	comes(t, "somebody reads "+pipe, func() bool {
		var err error
		w, err = os.OpenFile(pipe, os.O_WRONLY|unix.O_NONBLOCK, 0)
		return err == nil
	})
	return w
}

// The daemon and the process that detaches the keeper are killed while the
// keeper has no lock yet. Stop waits for that keeper and ends it.
func TestStopFindsAKeeperWhoseLaunchersWereKilled(t *testing.T) {
	if file := os.Getenv("KILLED_LAUNCHER"); file != "" {
		cfg, err := dataplane.LoadConfig(file)
		if err == nil {
			_, err = dataplane.Ensure(context.Background(), cfg)
		}
		t.Fatal("the launch was not stopped: ", err)
	}
	cfg := dt.Config(t, mib)
	var err error
	if cfg.Binary, err = os.Executable(); err != nil {
		t.Fatal(err)
	}
	content, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(cfg.RunDir)
	given, pipe := filepath.Join(dir, "given.json"), filepath.Join(dir, "pipe")
	if err := errors.Join(os.WriteFile(given, content, 0o600), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(cfg.Binary, "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "KILLED_LAUNCHER="+given, dt.Hold(pipe))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	file := filepath.Join(cfg.RunDir, "config.json")
	w := writer(t, pipe) // the keeper waits
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	for _, pid := range processes(t, "keeper", "--detach", file) {
		dt.Kill(t, pid)
	}
	comes(t, "only the keeper is left", func() bool { return len(processes(t, file)) == 1 })

	short, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := dataplane.Stop(short, cfg); err == nil {
		t.Error("Stop overlooks a keeper that is being launched")
	} else if !strings.Contains(err.Error(), "launched: true") {
		t.Errorf("Stop does not say what it waits for: %v", err)
	}
	if err := w.Close(); err != nil { // the keeper goes on
		t.Fatal(err)
	}
	long, cancel := context.WithTimeout(context.Background(), dt.Patience)
	defer cancel()
	if err := dataplane.Stop(long, cfg); err != nil {
		t.Fatal(err)
	}
	comes(t, "no process is left", func() bool { return len(processes(t, file)) == 0 })
}

// A daemon that comes up right after everything was killed still finds the dead
// keeper's lock: it does not wait for that keeper for ever, it starts one.
func TestAKeeperThatIsDyingIsNotWaitedFor(t *testing.T) {
	cfg := dt.Config(t, 8*mib)
	if err := os.MkdirAll(cfg.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	// The dying one is this test: it has the lock, and its socket is there.
	lock, err := os.Create(filepath.Join(cfg.RunDir, "keeper.pid"))
	if err == nil {
		_, err = lock.WriteString(strconv.Itoa(os.Getpid()) + "\n")
	}
	if err == nil {
		err = unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Len: 1})
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(cfg.RunDir, "ready"), []byte(strconv.Itoa(os.Getpid())), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", cfg.ControlSocket())
	if err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() {
		c, err := ln.Accept() // it was found
		if err == nil {
			err = errors.Join(ln.Close(), lock.Close(), c.Close())
		}
		gone <- err
	}()
	c := dt.Ensure(t, &cfg)
	if err := <-gone; err != nil {
		t.Fatal(err)
	}
	if st := status(t, c); st.PID == os.Getpid() {
		t.Fatalf("process %d answers", st.PID)
	}
}
