package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strconv"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/inside"
)

// errUsage is answered with the list of verbs; exit code 2.
var errUsage = errors.New("usage: kvmlab up|status|down DIR, kvmlab exec DIR A|B CMD..., kvmlab crash|start DIR A|B, kvmlab link DIR A|B up|down")

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
	case "up":
		return 0, up(ctx, args[0], args[1:])
	}
	l, err := lab.Open(args[0])
	if err != nil {
		return 1, err
	}
	if verb == "down" {
		return 0, l.Down()
	}
	if verb == "status" {
		return 0, status(l)
	}
	if len(args) < 2 || l.Host(args[1]) == nil {
		return 2, errUsage
	}
	h, rest := l.Host(args[1]), args[2:]
	switch {
	case verb == "exec" && len(rest) > 0:
		return execute(ctx, h, rest)
	case verb == "crash":
		return 0, h.Crash()
	case verb == "start":
		return 0, h.Start(ctx)
	case verb == "link" && len(rest) == 1 && (rest[0] == "up" || rest[0] == "down"):
		return 0, h.Link(rest[0] == "up")
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

func up(ctx context.Context, dir string, flags []string) error {
	opts := lab.Options{Keep: true}
	for len(flags) >= 2 && flags[0] == "-nonroot" {
		opts.NonRootQEMU = append(opts.NonRootQEMU, flags[1])
		flags = flags[2:]
	}
	if len(flags) > 0 {
		return errUsage
	}
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
