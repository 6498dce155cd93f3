package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/overlay"
)

// Disk is one disk to show.
type Disk struct {
	Name   string
	Device block.Device
}

// Options say how disks are shown. Dir and ID are required.
type Options struct {
	Dir string // for sockets: RUN/mounts
	ID  string // names the socket
	// TCP listens on this port of the loopback interface instead, 0 = any free
	// one; nil = a unix socket.
	TCP *int
	// Writable puts a scratch overlay on each disk, whose data is in
	// ScratchDir and takes at most Quota bytes a disk; Reserve stays free there.
	Writable   bool
	Quota      int64
	Reserve    int64
	ScratchDir string
	Log        *slog.Logger
}

// Mount is disks being shown.
type Mount struct {
	opts    Options
	disks   []Disk
	server  *nbd.Server
	address string // socket path, or host:port
	scratch []*overlay.Scratch
	done    chan struct{}
	once    sync.Once
	err     error
}

// closeWithin is how long requests under way may take at the end.
const closeWithin = 10 * time.Second

// Clean removes the sockets that a killed process left in dir.
func Clean(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove old mounts: %w", err)
	}
	return nil
}

// Start shows disks.
func Start(disks []Disk, opts Options) (*Mount, error) {
	m := &Mount{opts: opts, disks: disks, server: nbd.NewServer(nbd.Options{Log: opts.Log}), done: make(chan struct{})}
	if err := m.add(); err != nil {
		return nil, errors.Join(fmt.Errorf("mount: %w", err), m.closeScratch())
	}
	l, err := m.listen()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount: %w", err), m.closeScratch())
	}
	go func() {
		defer close(m.done)
		if err := m.server.Serve(context.Background(), l); err != nil && !errors.Is(err, nbd.ErrServerClosed) && opts.Log != nil {
			opts.Log.Error("a mount stopped listening", "mount", opts.ID, "err", err)
		}
	}()
	return m, nil
}

func (m *Mount) add() error {
	for _, d := range m.disks {
		x := nbd.Export{Name: d.Name, Device: d.Device, ReadOnly: !m.opts.Writable, Description: "recovery point"}
		if m.opts.Writable {
			s, err := overlay.CreateScratch(m.opts.ScratchDir, d.Device, m.opts.Quota, m.opts.Reserve)
			if err != nil {
				return err
			}
			m.scratch = append(m.scratch, s)
			x.Device = s
		}
		if err := m.server.Add(x); err != nil {
			return fmt.Errorf("export disk %s: %w", d.Name, err)
		}
	}
	return nil
}

func (m *Mount) listen() (net.Listener, error) {
	if m.opts.TCP != nil {
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(*m.opts.TCP)))
		if err != nil {
			return nil, err
		}
		m.address = l.Addr().String()
		return l, nil
	}
	if err := os.MkdirAll(m.opts.Dir, 0o700); err != nil {
		return nil, err
	}
	m.address = filepath.Join(m.opts.Dir, m.opts.ID+".sock")
	l, err := net.Listen("unix", m.address)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(m.address, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// URI is where a disk is found.
func (m *Mount) URI(disk string) string {
	if m.opts.TCP != nil {
		return "nbd://" + m.address + "/" + disk
	}
	return "nbd+unix:///" + disk + "?socket=" + m.address
}

// Connections is how many clients there are now.
func (m *Mount) Connections() int {
	n := 0
	for _, d := range m.disks {
		if s, ok := m.server.Stats(d.Name); ok {
			n += s.Connections
		}
	}
	return n
}

// Used is what was written, in bytes.
func (m *Mount) Used() int64 {
	var n int64
	for _, s := range m.scratch {
		n += s.Used()
	}
	return n
}

// Close ends the mount: clients lose their connection, what they wrote is gone.
func (m *Mount) Close() error {
	m.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), closeWithin)
		defer cancel()
		err := m.server.Shutdown(ctx)
		<-m.done
		if m.opts.TCP == nil {
			if rm := os.Remove(m.address); rm != nil && !errors.Is(rm, fs.ErrNotExist) {
				err = errors.Join(err, rm)
			}
		}
		if m.err = errors.Join(err, m.closeScratch()); m.err != nil {
			m.err = fmt.Errorf("end mount %s: %w", m.opts.ID, m.err)
		}
	})
	return m.err
}

func (m *Mount) closeScratch() error {
	var err error
	for _, s := range m.scratch {
		err = errors.Join(err, s.Close())
	}
	return err
}
