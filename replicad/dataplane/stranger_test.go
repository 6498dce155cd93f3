package dataplane_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/dataplane"
	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

const nobody = 65534

// asNobody runs f in a thread of another user, without capabilities. The thread
// ends with it.
func asNobody(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		_, _, g := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
		_, _, e := unix.RawSyscall(unix.SYS_SETRESGID, nobody, nobody, nobody)
		_, _, u := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody)
		if g|e|u == 0 {
			f()
		}
	}()
	<-done
}

// An unprivileged local user reaches neither the sockets nor the state nor the
// exact bitmap of a data plane that serves.
func TestAnotherUserReachesNothingOfADataPlane(t *testing.T) {
	if unix.Geteuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	cfg := dt.Config(t, 1<<20)
	dt.Serve(t, cfg).Create(dataplane.CreateRequest{Generation: dt.Generation(1)})
	// The modes of what the product makes must do: the test's directories can be
	// passed.
	for _, dir := range []string{cfg.RunDir, cfg.StateDir, cfg.SharedDir} {
		for up := dir; up != os.TempDir() && up != "/"; up = filepath.Dir(up) {
			if err := os.Chmod(up, 0o711); err != nil {
				t.Fatal(err)
			}
		}
	}
	var sockets, files []string
	for _, dir := range []string{cfg.RunDir, cfg.StateDir, cfg.SharedDir} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.Type() == fs.ModeSocket:
				sockets = append(sockets, path)
			case d.Type().IsRegular():
				files = append(files, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(sockets) < 2 || len(files) < 3 {
		t.Fatalf("only %v and %v are there", sockets, files)
	}
	tried := 0
	asNobody(func() {
		for _, s := range sockets {
			tried++
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Error(err)
				continue
			}
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s}); !errors.Is(err, unix.EACCES) {
				t.Errorf("connect to %s: %v", s, err)
			}
			_ = unix.Close(fd)
		}
		for _, f := range files {
			tried++
			for _, how := range []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR} {
				if fd, err := unix.Open(f, how|unix.O_CLOEXEC, 0); err == nil {
					t.Errorf("%s can be opened", f)
					_ = unix.Close(fd)
				}
			}
		}
	})
	if tried != len(sockets)+len(files) {
		t.Fatal("the other user tried nothing")
	}
	t.Logf("%d sockets and %d files refused", len(sockets), len(files))
}
