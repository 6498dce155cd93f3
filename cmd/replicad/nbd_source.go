package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// sourceOptions say how openSource opens an image.
type sourceOptions struct {
	format      string
	readOnly    bool
	allowUnsafe bool
	log         *slog.Logger
}

// openSource opens a raw image, a qcow2 image through qemu-nbd, or another NBD
// server's export.
func openSource(ctx context.Context, image string, o sourceOptions) (*source, error) {
	switch {
	case nbd.IsURI(image):
		return openUpstream(ctx, image, o)
	case o.format == "raw":
		return openRaw(image, o)
	case o.format == "qcow2":
		return openQCOW2(ctx, image, o)
	}
	return nil, fmt.Errorf("format %q is not supported; use raw or qcow2", o.format)
}

func openRaw(image string, o sourceOptions) (*source, error) {
	f, err := block.OpenFile(image, block.FileOptions{ReadOnly: o.readOnly})
	if err != nil {
		return nil, err
	}
	if err := f.LockQEMU(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &source{dev: f, file: f, close: []func() error{f.Close}}, nil
}

func openUpstream(ctx context.Context, uri string, o sourceOptions) (*source, error) {
	c, err := nbd.DialURI(ctx, uri, nbd.ClientOptions{ReadOnly: o.readOnly, AllowUnsafe: o.allowUnsafe})
	if err != nil {
		return nil, err
	}
	dead := make(chan error, 1)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		<-c.Done()
		dead <- fmt.Errorf("upstream %s: %w", uri, c.Err())
	}()
	return &source{dev: c, dead: dead, close: []func() error{c.Close, func() error { <-watched; return nil }}}, nil
}

const (
	childStart = 10 * time.Second
	childStop  = 10 * time.Second
	childPoll  = 20 * time.Millisecond
	// childReason is how long a child whose connection broke may take to end.
	childReason = 2 * time.Second
)

// openQCOW2 starts qemu-nbd on a socket in a private directory and uses it as
// upstream. The format is always given: a guest that writes a header must not
// change what we read.
func openQCOW2(ctx context.Context, image string, o sourceOptions) (_ *source, err error) {
	path, err := filepath.Abs(image)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	dir, err := os.MkdirTemp("", "replicad-nbd-")
	if err != nil {
		return nil, fmt.Errorf("directory for qemu-nbd's socket: %w", err)
	}
	s := &source{close: []func() error{func() error { return os.RemoveAll(dir) }}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	child, err := startQEMUNBD(path, filepath.Join(dir, "sock"), o.readOnly)
	if err != nil {
		return nil, err
	}
	s.close = append([]func() error{child.stop}, s.close...)
	c, err := child.dial(ctx, nbd.ClientOptions{ReadOnly: o.readOnly, InFlight: 64})
	if err != nil {
		return nil, err
	}
	s.close = append([]func() error{c.Close}, s.close...)
	s.dev, s.dead = c, child.dead
	o.log.Info("qemu-nbd serves the image", "image", path, "pid", child.cmd.Process.Pid)
	return s, nil
}

// qemuNBD is a supervised child.
type qemuNBD struct {
	cmd    *exec.Cmd
	sock   string
	stderr bytes.Buffer // read only after done
	done   chan struct{}
	err    error      // set before done
	dead   chan error // for the owner: the end nobody asked for
}

func startQEMUNBD(path, sock string, readOnly bool) (*qemuNBD, error) {
	file := "driver=qcow2,file.driver=file,file.filename=" + escapeQEMU(path)
	args := []string{"--persistent", "--shared=0", "--socket=" + sock, "--cache=writeback", "--discard=unmap", "--detect-zeroes=off"}
	if readOnly {
		args = append(args, "--read-only")
	}
	args = append(args, "--image-opts", file)
	q := &qemuNBD{cmd: exec.Command("qemu-nbd", args...), sock: sock, done: make(chan struct{}), dead: make(chan error, 1)}
	q.cmd.Stderr = &q.stderr
	// When we are killed the child must not go on holding the image.
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := q.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start qemu-nbd (package qemu-utils): %w", err)
	}
	go func() {
		q.err = q.cmd.Wait()
		if q.err == nil {
			q.err = errors.New("exit status 0")
		}
		q.err = fmt.Errorf("qemu-nbd ended: %w: %s", q.err, bytes.TrimSpace(q.stderr.Bytes()))
		q.dead <- q.err
		close(q.done)
	}()
	return q, nil
}

// escapeQEMU doubles commas, QEMU's separator.
func escapeQEMU(s string) string {
	return string(bytes.ReplaceAll([]byte(s), []byte(","), []byte(",,")))
}

// dial connects as soon as the child listens.
func (q *qemuNBD) dial(ctx context.Context, opts nbd.ClientOptions) (*nbd.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, childStart)
	defer cancel()
	for {
		if _, err := os.Stat(q.sock); err == nil {
			c, err := nbd.Dial(ctx, "unix", q.sock, opts)
			switch {
			case err == nil:
				return c, nil
			case !errors.Is(err, syscall.ECONNREFUSED):
				return nil, q.reason(err)
			}
		}
		select {
		case <-q.done:
			return nil, q.err
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for qemu-nbd to listen: %w", ctx.Err())
		case <-time.After(childPoll):
		}
	}
}

// reason prefers what the child says at its end: it listens before it looks at
// the image.
func (q *qemuNBD) reason(err error) error {
	select {
	case <-q.done:
		return q.err
	case <-time.After(childReason):
		return err
	}
}

// stop ends the child and waits for it: only then is the image closed.
func (q *qemuNBD) stop() error {
	_ = q.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-q.done:
		return nil
	case <-time.After(childStop):
		_ = q.cmd.Process.Kill()
		<-q.done
		return errors.New("qemu-nbd did not end within 10 s and was killed; check the image with: qemu-img check")
	}
}
