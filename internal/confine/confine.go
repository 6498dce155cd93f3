// Package confine starts a process that can do less than the one that starts
// it: no new privileges, few capabilities, no system calls that reach into other
// processes, the kernel or the network, and writing only where it was told to.
//
// It guarantees that the process and everything it starts are bound from their
// first instruction and for good, while the starting process keeps what it has.
// What the kernel does not offer is left out and named; nothing here makes a
// start fail.
//
// The caller names every place the process has to write to, and must not need
// any of what is taken away in it or in its children.
package confine

import (
	"fmt"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// Limits say what a process may do beside reading files and serving what it was
// handed.
type Limits struct {
	// Writable are the files, and the directories with all below, that it may
	// change. What does not exist is left out. Nil sets no bound.
	Writable []string
	// Network lets it open sockets other than unix ones.
	Network bool
}

// Start is cmd.Start with limits. missing says which of them the kernel refused,
// nil when all are in force.
func Start(cmd *exec.Cmd, l Limits) (missing []string, err error) {
	onThread(func() {
		missing = l.bind()
		err = cmd.Start()
	})
	return missing, err
}

// onThread runs f on a thread of its own, which ends with it. Limits belong to a
// thread, and a new process inherits those of the thread that starts it.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The process's first thread cannot end. While it is held, another one
			// is taken.
			onThread(f)
			runtime.UnlockOSThread()
			return
		}
		f() // never unlocked: the thread ends with this goroutine
	}()
	<-done
}

// bind limits the calling thread.
func (l Limits) bind() (missing []string) {
	try := func(what string, err error) {
		if err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", what, err))
		}
	}
	// First: the others need it where the process has no CAP_SYS_ADMIN, and it is
	// what keeps execve from giving root's capabilities back.
	try("no new privileges", unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	if l.Writable != nil {
		try("bound writes (Landlock)", bindWrites(l.Writable))
	}
	try("drop capabilities", dropCapabilities())
	try("filter system calls", filterCalls(l.Network)) // last: it may forbid what the others do
	return missing
}
