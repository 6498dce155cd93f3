package testcopy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"kvmreplica/nbd"
	"kvmreplica/replicad/overlay"
)

// served are a copy's disks while the daemon runs: the point below, the scratch
// overlays above, and the NBD server in front.
type served struct {
	views *views
	disks []*overlay.Scratch
	srv   *nbd.Server
	stop  context.CancelFunc
	done  chan struct{}
	quota int64
	// full says why the guest's disk takes no more writes; "" = it does.
	full atomic.Pointer[string]
	room *overlay.Room
}

// used is what the copy has written, in bytes.
func (s *served) used() int64 {
	var n int64
	for _, d := range s.disks {
		n += d.Used()
	}
	return n
}

// grow is asked before the scratch data grows.
func (s *served) grow() error {
	switch {
	case s.used() >= s.quota:
		why := fmt.Sprintf("the copy has written its quota of %d bytes", s.quota)
		s.full.Store(&why)
	case !s.room.Enough():
		why := fmt.Sprintf("less than %d bytes are free in %s", s.room.Reserve, s.room.Dir)
		s.full.Store(&why)
	default:
		s.full.Store(nil)
		return nil
	}
	return syscall.ENOSPC
}

// serve opens a copy's overlays above its point and listens for QEMU.
func (m *Manager) serve(c Copy, subject Subject) (*served, error) {
	v, err := openViews(subject, c.At)
	if err != nil {
		return nil, fmt.Errorf("open the recovery point: %w", err)
	}
	s := &served{
		views: v, quota: c.Quota, done: make(chan struct{}),
		room: &overlay.Room{Dir: m.deps.StateDir, Reserve: m.deps.Reserve}, srv: nbd.NewServer(nbd.Options{Log: m.deps.Log.With("test", c.Name)}),
	}
	close(s.done) // nothing serves yet
	if err := m.layer(c, s); err != nil {
		return nil, errors.Join(err, s.close())
	}
	l, err := m.listen(c)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	ctx, cancel := context.WithCancel(context.Background()) // ends with close
	s.stop, s.done = cancel, make(chan struct{})
	go func() {
		defer close(s.done)
		if err := s.srv.Serve(ctx, l); err != nil {
			m.deps.Log.Error("serve a test copy's disks", "test", c.Name, "err", err)
		}
	}()
	return s, nil
}

func (m *Manager) layer(c Copy, s *served) error {
	for _, name := range c.Disks {
		base, err := s.views.disk(name)
		if err != nil {
			return fmt.Errorf("open the recovery point: %w", err)
		}
		o, err := overlay.OpenKept(m.scratchPath(c, name), base, 0, s.grow)
		if err != nil {
			return err
		}
		s.disks = append(s.disks, o)
		if err := s.srv.Add(nbd.Export{Name: name, Device: o, SingleClient: true, Description: "test copy " + c.Name}); err != nil {
			return err
		}
	}
	return nil
}

// close ends the exports, waiting for what runs.
func (s *served) close() error {
	var errs []error
	if s.stop != nil {
		ctx, cancel := context.WithTimeout(context.Background(), drainWithin)
		if err := s.srv.Shutdown(ctx); err != nil {
			errs = append(errs, err)
		}
		cancel()
		s.stop()
	}
	<-s.done
	errs = append(errs, s.views.close())
	for _, d := range s.disks {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}

func (m *Manager) scratchPath(c Copy, disk string) string {
	return filepath.Join(m.deps.StateDir, testsDir, c.ID, disk)
}

// runDir has the form of a VM's, so that one rule of a security module fits both.
func (m *Manager) runDir(c Copy) string { return filepath.Join(m.deps.RunDir, "vm", c.UUID) }

func (m *Manager) socket(c Copy) string { return filepath.Join(m.runDir(c), "nbd.sock") }

// Console is the file that a copy's first serial port writes to.
func (m *Manager) console(c Copy) string { return filepath.Join(m.runDir(c), "console.log") }

const socketMode = 0o660

// listen makes the socket; it appears under its name only when connect works.
func (m *Manager) listen(c Copy) (net.Listener, error) {
	if err := m.makeRunDir(c); err != nil {
		return nil, err
	}
	path := m.socket(c)
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the test copy's guest: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chmod(tmp, socketMode)
	if err == nil {
		err = m.giveToQEMU(tmp)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen for the test copy's guest: %w", err), l.Close())
	}
	return l, nil
}

func (m *Manager) makeRunDir(c Copy) error {
	dir := m.runDir(c)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make the test copy's directory: %w", err)
	}
	return os.Chmod(dir, 0o711)
}

func (m *Manager) giveToQEMU(path string) error {
	if m.deps.QEMUOwner == nil {
		return nil
	}
	uid, gid := m.deps.QEMUOwner()
	if uid == nil || gid == nil {
		return nil
	}
	return os.Lchown(path, *uid, *gid)
}
