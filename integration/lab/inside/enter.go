package inside

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Enter runs a command inside the host whose process 1 is pid and returns its
// exit code (128 plus the signal's number when a signal ended it). Signals are
// passed on; the command dies when the calling process does. tellPID makes it
// write the command's process number to FDPid.
func Enter(pid int, tellPID bool, argv []string) (int, error) {
	runtime.LockOSThread() // namespaces and the parent-death signal are the thread's
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	if err := join(pid); err != nil {
		return 0, err
	}
	cmd := exec.Command(self, append([]string{"become"}, argv...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	if err := startAndSee(cmd); err != nil {
		return 0, err
	}
	if tellPID {
		f := os.NewFile(FDPid, "pid")
		if _, err := f.WriteString(strconv.Itoa(cmd.Process.Pid) + "\n"); err != nil {
			return 0, err
		}
		if err := f.Close(); err != nil {
			return 0, err
		}
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s) // an ended process needs no signal
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return cmd.ProcessState.ExitCode(), nil
}

// startAndSee starts a command that goes through Become and returns when its
// program runs, or why it does not.
func startAndSee(cmd *exec.Cmd) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.ExtraFiles = []*os.File{w} // FDFailure
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return err
	}
	text, err := io.ReadAll(r) // ends when the program replaces Become
	if len(text) > 0 {
		return errors.Join(errors.New(string(text)), ignoreExit(cmd.Wait()))
	}
	return err
}

// ignoreExit drops the bad exit code of a command that has said why already.
func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// Become replaces the calling process, which Enter started, by a command that
// dies with Enter. (SysProcAttr.Pdeathsig would kill it at once: its check
// compares process numbers of two namespaces.)
func Become(argv []string) error {
	err := become(argv)
	_, _ = os.NewFile(FDFailure, "failure").WriteString(err.Error())
	return nil // Enter reports it
}

func become(argv []string) error {
	syscall.CloseOnExec(FDFailure)
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("bind to the parent's life: %w", err)
	}
	if os.Getppid() != 0 { // a parent outside our pid namespace reads as 0
		return errors.New("the parent is gone")
	}
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	return syscall.Exec(path, argv, os.Environ())
}

// join moves the calling thread into the namespaces of process pid; children
// of the thread are then processes of the host.
func join(pid int) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("leave the shared working directory: %w", err)
	}
	kinds := []struct {
		name string
		flag int
	}{
		{"net", unix.CLONE_NEWNET},
		{"uts", unix.CLONE_NEWUTS},
		{"ipc", unix.CLONE_NEWIPC},
		{"pid", unix.CLONE_NEWPID},
		{"mnt", unix.CLONE_NEWNS},
	}
	files := make([]*os.File, len(kinds))
	for i, k := range kinds { // all of them first: /proc changes with "mnt"
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, k.name))
		if err != nil {
			return fmt.Errorf("the host is not running: %w", err)
		}
		defer f.Close()
		files[i] = f
	}
	// "mnt" puts us at the top of the host's mounts; its process 1 may live
	// further down, in a chroot.
	root, err := os.Open(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return fmt.Errorf("the host is not running: %w", err)
	}
	defer root.Close()
	for i, k := range kinds {
		if err := unix.Setns(int(files[i].Fd()), k.flag); err != nil {
			return fmt.Errorf("enter %s namespace: %w", k.name, err)
		}
	}
	if err := unix.Fchdir(int(root.Fd())); err != nil {
		return fmt.Errorf("enter the host's root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the host's root: %w", err)
	}
	return os.Chdir("/")
}
