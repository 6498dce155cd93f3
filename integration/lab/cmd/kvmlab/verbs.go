package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/inside"
)

// errUsage is answered with the list of verbs; exit code 2.
var errUsage = errors.New("usage: kvmlab up|status|down|files DIR, " +
	"kvmlab exec|daemon DIR A|B CMD..., kvmlab crash|start DIR A|B, kvmlab link DIR A|B up|down, " +
	"kvmlab guest DIR A|B NAME [flags], kvmlab wait|last DIR A|B NAME WORD [flags]")

func run(args []string) (int, error) {
	if len(args) < 2 {
		return 2, errUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	verb, args := args[0], args[1:]
	switch verb {
	case "pid1":
		return 1, inside.PID1(args[0])
	case "enter":
		return enter(args)
	case "become":
		return 127, inside.Become(args)
	case "files":
		return 0, linkFiles(ctx, args[0])
	case "up":
		return 0, up(ctx, args[0], args[1:])
	}
	l, err := lab.Open(args[0])
	if err != nil {
		return 1, err
	}
	switch verb {
	case "down":
		return 0, l.Down()
	case "status":
		return 0, status(l)
	}
	if len(args) < 2 || l.Host(args[1]) == nil {
		return 2, errUsage
	}
	return onHost(ctx, verb, l.Host(args[1]), args[2:])
}

// onHost runs the verbs that name a host.
func onHost(ctx context.Context, verb string, h *lab.Host, rest []string) (int, error) {
	if (verb == "exec" || verb == "daemon") && len(rest) > 0 && rest[0] == "--" {
		rest = rest[1:] // as ssh, sudo and docker users type it
	}
	switch {
	case verb == "exec" && len(rest) > 0:
		return execute(ctx, h, rest)
	case verb == "daemon" && len(rest) > 0:
		return 0, daemon(h, rest)
	case verb == "crash":
		return 0, h.Crash()
	case verb == "start":
		return 0, h.Start(ctx)
	case verb == "link" && len(rest) == 1 && (rest[0] == "up" || rest[0] == "down"):
		return 0, h.Link(rest[0] == "up")
	case verb == "guest" && len(rest) > 0:
		return 0, defineGuest(ctx, h, rest[0], rest[1:])
	case verb == "wait" && len(rest) > 1:
		return 0, waitFor(ctx, h, rest[0], rest[1], rest[2:])
	case verb == "last" && len(rest) == 2:
		return 0, last(h, rest[0], rest[1])
	}
	return 2, errUsage
}

func enter(args []string) (int, error) {
	tell := args[0] == "-tell-pid"
	if tell {
		args = args[1:]
	}
	if len(args) < 3 || args[1] != "--" {
		return 2, errUsage
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return 2, err
	}
	return inside.Enter(pid, tell, args[2:])
}

func up(ctx context.Context, dir string, args []string) error {
	f := flag.NewFlagSet("up", flag.ContinueOnError)
	nonRoot := f.String("nonroot", "", "hosts, e.g. B or AB, whose QEMU runs as libvirt-qemu")
	if err := f.Parse(args); err != nil {
		return err
	}
	files, err := guest.Build(ctx)
	if err != nil {
		return err
	}
	opts := lab.Options{Keep: true, Boot: files.List()}
	opts.NonRootQEMU = strings.Split(*nonRoot, "")
	l, err := lab.Up(ctx, dir, opts)
	if err != nil {
		return err
	}
	return status(l)
}

func status(l *lab.Lab) error {
	for _, h := range l.Hosts() {
		state := "down"
		if h.Up() {
			state = "up"
		}
		if _, err := fmt.Printf("%s\t%s\t%s\t%s\t%s\n", h.Name(), state, h.IP(), h.Hostname(), h.VirshURI()); err != nil {
			return err
		}
	}
	return nil
}

// daemon starts a program that outlives this command; its host ends it.
func daemon(h *lab.Host, argv []string) error {
	d, err := h.StartDaemon(argv[0], argv[1:], nil)
	if err != nil {
		return err
	}
	_, err = fmt.Printf("%d\t%s\n", d.Pid(), d.LogPath)
	return err
}

func execute(ctx context.Context, h *lab.Host, argv []string) (int, error) {
	cmd := h.Command(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}
