// Command bench measures the product beside its peers on this machine, in one
// interleaved run: our NBD server with tracking on and off against qemu-nbd and
// nbdkit's file plugin, the same with syncs that cost something, other people's
// clients, the freeze, and the shipping of changes between two processes.
//
// Every figure comes from many short rounds in which the contestants take
// turns; ratios are medians of the rounds' own ratios, so that a machine that
// is slow for a while is slow for all. It measures and never fails because of a
// figure: what falls short of the goals is marked, not hidden.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const usage = `bench compares the product with its peers; see docs/operations/performance.md.

usage: bench [-quick] [-json FILE] [-run SECTIONS] [flags]

`

// options are the flags.
type options struct {
	json     string
	sections string
	only     string
	rounds   int
	round    time.Duration
	quick    bool
	realTime bool
	pin      string
	dir      string
	replicad string
	baseline string
}

func main() {
	var o options
	flag.BoolVar(&o.quick, "quick", false, "few short rounds: a look, not a figure")
	flag.StringVar(&o.json, "json", "", "also write everything to this file, machine-readable")
	flag.StringVar(&o.sections, "run", "peers,clients,flush,freeze,ship", "sections to run")
	flag.StringVar(&o.only, "only", "", "of section peers, only workloads whose name contains this")
	flag.IntVar(&o.rounds, "rounds", 11, "rounds per workload")
	flag.DurationVar(&o.round, "round", 100*time.Millisecond, "length of a round")
	flag.BoolVar(&o.realTime, "rt", true, "run everything at real-time priority, so that other work on the machine counts less")
	flag.StringVar(&o.pin, "pin", "split", "split: client and server on one CPU each; same: both on one; free")
	flag.StringVar(&o.dir, "dir", "/dev/shm", "where images and sockets go")
	flag.StringVar(&o.replicad, "replicad", "", "the program to measure (default: beside this one)")
	flag.StringVar(&o.baseline, "baseline", "", "of section peers, also another build of replicad, with tracking on")
	flag.Usage = func() { fmt.Fprint(flag.CommandLine.Output(), usage); flag.PrintDefaults() }
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if flag.NArg() > 0 {
		err = child(ctx, flag.Args())
	} else {
		err = o.run(ctx)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// child is this program as the other end of something.
func child(ctx context.Context, args []string) error {
	switch {
	case args[0] == "replica" && len(args) == 2:
		return serveReplica(ctx, args[1])
	case args[0] == "floor" && len(args) == 3:
		return receiveFloor(args[1], args[2])
	}
	return fmt.Errorf("unknown argument %q; run bench -h", args[0])
}

// priorityDone is set in the environment of what was already begun anew.
const priorityDone = "KVMREPLICA_BENCH_RT"

// prioritise begins the program anew at real-time priority, once.
func prioritise() error {
	chrt, err := exec.LookPath("chrt")
	if err != nil || os.Getenv(priorityDone) != "" {
		return nil //nolint:nilerr // without chrt, without priority
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := append([]string{"chrt", "--rr", "1", self}, os.Args[1:]...)
	return syscall.Exec(chrt, argv, append(os.Environ(), priorityDone+"=1"))
}

func (o *options) run(ctx context.Context) (err error) {
	if o.realTime && os.Geteuid() == 0 {
		if err := prioritise(); err != nil {
			return fmt.Errorf("real-time priority: %w (go without: -rt=false)", err)
		}
	}
	if o.quick {
		o.rounds, o.round = 3, 50*time.Millisecond
	}
	if !slices.Contains([]string{"split", "same", "free"}, o.pin) {
		return fmt.Errorf("-pin %s: want split, same or free", o.pin)
	}
	if o.replicad, err = o.program(); err != nil {
		return err
	}
	for _, tool := range []string{"qemu-nbd", "nbdkit", "taskset", "strace", "fio", "qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w; install it with: make deps", err)
		}
	}
	dir, err := os.MkdirTemp(o.dir, "bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	rep := newReport(*o)
	r := &rig{dir: dir, replicad: o.replicad, baseline: o.baseline, size: 512 << 20, pin: o.pin}
	for _, s := range []struct {
		name string
		run  func(context.Context, *options, *rig, *report) error
	}{
		{"peers", comparePeers},
		{"clients", compareClients},
		{"flush", compareFlushes},
		{"freeze", measureFreeze},
		{"ship", measureShipping},
	} {
		if !slices.Contains(strings.Split(o.sections, ","), s.name) {
			continue
		}
		if err := s.run(ctx, o, r, rep); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return rep.write(o.json)
}

// program is the replicad to measure.
func (o *options) program() (string, error) {
	path := o.replicad
	if path == "" {
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		path = filepath.Join(filepath.Dir(self), "replicad")
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w; build it with: make build", err)
	}
	return filepath.Abs(path)
}
