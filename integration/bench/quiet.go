package main

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// machine is a reading of the CPU time that was used on this machine by
// anybody, and by this process.
type machine struct {
	busy, own time.Duration
}

const tick = 10 * time.Millisecond // of /proc/stat

// readMachine reads /proc/stat: user, nice, system, (idle, iowait,) irq,
// softirq, steal.
func readMachine() machine {
	var m machine
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return m
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	for i, f := range bytes.Fields(line) {
		if n, err := strconv.ParseInt(string(f), 10, 64); err == nil && i != 4 && i != 5 && i <= 8 {
			m.busy += time.Duration(n) * tick
		}
	}
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts) == nil {
		m.own = time.Duration(ts.Nano())
	}
	return m
}

// foreign is the share of one CPU that others than this process and a server,
// which used the given CPU time, had since m was read.
func (m machine) foreign(server, took time.Duration) float64 {
	now := readMachine()
	return (now.busy - m.busy - (now.own - m.own) - server).Seconds() / took.Seconds()
}
