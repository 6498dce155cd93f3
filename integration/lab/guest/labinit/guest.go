package main

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// stageVar is set in the environment of the second stage, which runs from the
// root file system on the first disk.
const stageVar = "LAB_STAGE"

// deviceWait bounds the wait for a disk or a port to appear.
const (
	deviceWait = 5 * time.Second
	devicePoll = 10 * time.Millisecond
)

type guest struct {
	console  *os.File
	knobs    knobs
	disks    []disk
	powerKey chan struct{} // closed at the first press
}

func newGuest() *guest { return &guest{console: os.Stdout, powerKey: make(chan struct{})} }

type knobs struct {
	mode               string
	disks              int
	interval, announce time.Duration
	max                uint64
	fsck, agent        bool
	net, root          bool
	load, loadSize     int64 // bytes a second, bytes
	sql                bool
	tcp                int    // port to listen on; 0 = none
	header             string // a file of the host
	mount              string
	dev                string // prefix of the disks' names
}

func readKnobs() knobs {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		text = nil // every knob has a default
	}
	m := map[string]string{}
	for _, w := range strings.Fields(string(text)) {
		if k, v, ok := strings.Cut(w, "="); ok {
			m[k] = v
		}
	}
	num := func(key string, otherwise int64) int64 {
		n, err := strconv.ParseInt(m[key], 10, 64)
		if err != nil || n < 0 {
			return otherwise
		}
		return n
	}
	dev := "vd"
	if m["lab.dev"] == "sd" {
		dev = "sd"
	}
	return knobs{
		mode:     m["lab.mode"],
		disks:    int(max(num("lab.disks", 1), 1)),
		interval: time.Duration(num("lab.interval", 100)) * time.Millisecond,
		announce: time.Duration(num("lab.announce", 250)) * time.Millisecond,
		max:      uint64(num("lab.max", 0)),
		fsck:     m["lab.fsck"] == "1" || m["lab.mode"] == "verify",
		agent:    m["lab.ga"] == "1",
		net:      m["lab.net"] == "1",
		tcp:      int(num("lab.tcp", 0)),
		root:     m["lab.root"] == "1",
		load:     num("lab.load", 0) << 10,
		loadSize: num("lab.loadsize", 16) << 20,
		sql:      m["lab.sql"] == "1",
		header:   m["lab.header"],
		mount:    m["lab.mount"],
		dev:      dev,
	}
}

// say writes one line: "LAB[uptime] text".
func (g *guest) say(format string, args ...any) {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	up := float64(now.Nano()) / float64(time.Second)
	// With nobody to report to, a failed write to the console has no answer.
	_, _ = fmt.Fprintf(g.console, "LAB[%.3f] "+format+"\n", append([]any{up}, args...)...)
}

// oneLine makes a tool's output fit into a line.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// tool runs a program and returns its output on one line.
func tool(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return oneLine(string(out)), err
}

// die reports what stopped the guest and powers off.
func (g *guest) die(what string, err error) {
	g.say("ERROR op=%q err=%q", what, fmt.Sprint(err))
	g.powerOff()
}

// powerOff unmounts everything and ends the machine.
func (g *guest) powerOff() {
	g.closeDisks()
	unix.Sync()
	g.say("POWEROFF")
	time.Sleep(20 * time.Millisecond) // the serial port is not a buffer that sync knows
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	g.say("ERROR op=poweroff err=%q", fmt.Sprint(err))
	select {}
}
