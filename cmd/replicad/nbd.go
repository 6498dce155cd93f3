package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// drainTimeout bounds how long a stop waits for requests that run.
const drainTimeout = 30 * time.Second

const nbdHelp = `Serve one disk over NBD on a unix socket until interrupted.

IMAGE is a raw file or block device, a qcow2 file with --format qcow2 (through
a qemu-nbd child; its end is an error), or an NBD address:
  nbd://HOST:PORT/EXPORT   nbd+unix:///EXPORT?socket=PATH
The format is never guessed. A raw image is locked against QEMU and libvirt.

EXIT STATUS
  0    stopped by a signal, every answered write is in the image
  1    failed
  2    wrong usage
`

// nbdFlags are the flags of replicad nbd.
type nbdFlags struct {
	socket   string
	export   string
	format   string
	readOnly bool
	unsafe   bool
	mode     uint32
	tracking trackingFlags
}

// newNBDCommand is "replicad nbd": one disk without the rest of the daemon.
func newNBDCommand() *cobra.Command {
	var f nbdFlags
	cmd := &cobra.Command{
		Use:   "nbd IMAGE --socket PATH",
		Short: "Serve one disk over NBD, without replication",
		Long:  nbdHelp,
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			spareProcessors()
			return f.run(ctx, args[0], log, cmd.OutOrStdout())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.socket, "socket", "", "unix socket to listen on (required)")
	flags.StringVar(&f.export, "export", "", "name of the export (default: the empty name)")
	flags.StringVar(&f.format, "format", "raw", "format of a file: raw or qcow2")
	flags.BoolVar(&f.readOnly, "read-only", false, "refuse writes")
	flags.BoolVar(&f.unsafe, "allow-no-flush", false, "accept an NBD server without FLUSH: data believed safe can be lost")
	flags.Uint32Var(&f.mode, "socket-mode", 0o600, "permissions of the socket")
	f.tracking.register(flags)
	cobra.CheckErr(cmd.MarkFlagRequired("socket"))
	return cmd
}

// run opens the image, serves it, and closes it again.
func (f *nbdFlags) run(ctx context.Context, image string, log *slog.Logger, out io.Writer) (err error) {
	if nbd.IsURI(f.socket) {
		return fmt.Errorf("--socket takes a path, not an address")
	}
	src, err := openSource(ctx, image, sourceOptions{format: f.format, readOnly: f.readOnly, allowUnsafe: f.unsafe, log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()

	dev, closeTracking, err := f.tracking.wrap(src, f.readOnly, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeTracking()) }()

	ln, err := listenUnix(f.socket, fs.FileMode(f.mode))
	if err != nil {
		return err
	}
	srv := nbd.NewServer(nbd.Options{Log: log})
	if err := srv.Add(nbd.Export{
		Name: f.export, Device: dev, ReadOnly: f.readOnly, Description: image, SingleClient: !f.readOnly,
	}); err != nil {
		return errors.Join(err, ln.Close())
	}
	fmt.Fprintf(out, "serving %s (%d bytes) on %s\n", image, dev.Size(), f.socket)
	err = serveUntil(ctx, srv, ln, src.dead)
	if !f.readOnly {
		err = errors.Join(err, dev.Sync())
	}
	return err
}

// serveUntil serves until ctx ends or the source died, then drains.
func serveUntil(ctx context.Context, srv *nbd.Server, ln net.Listener, dead <-chan error) error {
	served := make(chan error, 1)
	go func() { served <- srv.Serve(context.WithoutCancel(ctx), ln) }()
	var cause error
	select {
	case <-ctx.Done():
	case cause = <-dead:
	case err := <-served:
		return err
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		return errors.Join(cause, err) // a request hangs in the device: do not wait for it
	}
	err := <-served
	if errors.Is(err, nbd.ErrServerClosed) { // it had not begun to serve
		err = nil
	}
	return errors.Join(cause, err)
}

// listenUnix listens on path. A socket nobody answers on is replaced.
func listenUnix(path string, mode fs.FileMode) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil && st.Mode()&fs.ModeSocket != 0 {
		if c, err := net.Dial("unix", path); err == nil {
			_ = c.Close()
			return nil, fmt.Errorf("socket %s is in use; find its owner with: ss -xlp | grep %s", path, filepath.Base(path))
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace stale socket: %w", err)
		}
	}
	old := syscall.Umask(0o777 &^ int(mode.Perm()))
	ln, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return ln, nil
}

// source is an open image and, when it depends on a child or a connection, the
// channel that tells of its end.
type source struct {
	dev   block.Device
	file  *block.File // nil when it is not a raw file
	dead  <-chan error
	close []func() error // in this order
}

// Close closes everything that was opened, once.
func (s *source) Close() error {
	var errs []error
	for _, fn := range s.close {
		errs = append(errs, fn())
	}
	s.close = nil
	return errors.Join(errs...)
}
