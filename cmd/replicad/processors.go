package main

import (
	"os"
	"runtime"

	"kvmreplica/nbd"
)

// syncsAtOnce is how many system calls of a data plane may sleep for
// milliseconds at the same time without anybody noticing.
const syncsAtOnce = 16

// spareProcessors lets the loops that serve disks run while many syncs sleep.
// A goroutine in a system call keeps its processor until the runtime's monitor
// looks, which it may do only every 10 ms: on a host with two CPUs, two syncs of
// 10 ms stopped everything else for as long (4 KiB write and flush at depth 16
// reached a fifth of what it does now). So does a line to a client that waits for
// its next request. Idle processors cost nothing. The
// environment's GOMAXPROCS wins.
func spareProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.NumCPU() + syncsAtOnce + nbd.DefaultLines)
	}
}
