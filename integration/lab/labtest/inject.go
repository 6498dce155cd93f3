package labtest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Injected is a fault in force.
type Injected struct {
	cmd *exec.Cmd
	out io.Reader
	log string
}

// End detaches strace. The process goes on.
func (i *Injected) End() {
	_ = i.cmd.Process.Signal(syscall.SIGTERM)
	_, _ = io.Copy(io.Discard, i.out)
	_ = i.cmd.Wait() // killed by our signal
}

// Hits is how many calls have failed so far.
func (i *Injected) Hits() int {
	b, _ := os.ReadFile(i.log) // none yet
	return strings.Count(string(b), "(INJECTED)")
}

// Inject lets a system call of a running process fail, by strace. when counts
// each thread's calls, as strace writes it: "1+" is all of them. It returns when
// the fault is in force.
//
// A Go program that is traced may spend all its time answering the signals by
// which its runtime preempts goroutines; GODEBUG=asyncpreemptoff=1 in its
// environment ends that.
func Inject(t testing.TB, pid int, call, errno, when string) *Injected {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skipf("needs strace: %v", err)
	}
	log := filepath.Join(t.TempDir(), "strace")
	cmd := exec.Command("strace", "-f", "-p", fmt.Sprint(pid), "-o", log,
		"-e", "trace="+call, "-e", fmt.Sprintf("inject=%s:error=%s:when=%s", call, errno, when))
	out, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	i := &Injected{cmd, out, log}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "attached") {
			return i
		}
		t.Log(lines.Text())
	}
	i.End()
	t.Skip("strace cannot attach here (ptrace is not permitted)")
	return nil
}
