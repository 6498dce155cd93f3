package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/config"
)

// SIGHUP has the running daemon read its file again; a bad file, and a signal
// that comes with it, leave it running as it was.
func TestASignalReloadsTheConfiguration(t *testing.T) {
	dir, err := os.MkdirTemp("", "reload") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "replicad.toml")
	write := func(more string) {
		t.Helper()
		text := fmt.Sprintf("state_dir = %q\nrun_dir = %q\nlisten = %q\nlog_level = \"error\"\nlibvirt_socket = %q\n%s", filepath.Join(dir, "state"), filepath.Join(dir, "run"), listen, filepath.Join(dir, "none"), more)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	cfg, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- runDaemon(ctx, file, cfg) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	client := api.NewClient(filepath.Join(dir, "run", "control.sock"))
	receiving := func(want bool) {
		t.Helper()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for deadline := time.Now().Add(patience); ; <-tick.C {
			h, err := client.Host(t.Context())
			if err == nil && h.Receiving == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("receiving is not %t: %+v, %v", want, h, err)
			}
		}
	}
	hangUp := func() {
		t.Helper()
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	receiving(false)
	write("receiving = true\n")
	hangUp()
	receiving(true)
	write("receiving = false\nnonsense = 1\n")
	hangUp()
	if err := client.Act(t.Context(), api.Action{Verb: api.Reload}, func(api.Event) {}); err == nil {
		t.Error("a bad file was taken")
	}
	receiving(true)
	write("")
	hangUp()
	receiving(false)
}
