package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/version"
	"kvmreplica/nbd"
)

// heir is a data plane in the making: it has what its predecessor handed over
// and serves nothing yet.
type heir struct {
	cfg  Config
	link *link
	// old becomes readable when the predecessor is dead.
	old   int
	plane *Plane
	pid   *pidFile
	start func() // begins to read from the connections
}

// RunSuccessor is the verb "dataplane --successor": a data plane started by the
// one that runs, whose listening sockets are descriptors 3 and 4 and whose link
// is descriptor 5. It takes everything over and then is like any other.
func RunSuccessor(ctx context.Context, configFile string) error {
	unix.CloseOnExec(fdLink)
	if err := unix.SetNonblock(fdLink, true); err != nil {
		return fmt.Errorf("take over from a data plane (descriptor %d is the link to it): %w", fdLink, err)
	}
	h := &heir{link: &link{os.NewFile(fdLink, "predecessor")}} // non-blocking before: reads have deadlines
	err := h.prepare(configFile)
	if err != nil {
		_ = h.link.send(message{Type: msgError, Error: asWire(mapError(err))}, -1) // it may be gone
		return fmt.Errorf("take over from a data plane: %w", err)
	}
	if err := h.link.send(message{Type: msgHello, Handover: handoverVersion, Version: version.String()}, -1); err != nil {
		return err
	}
	guests, control, err := h.takeOver(ctx)
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil // asked only, or given up
		}
		_ = h.link.send(message{Type: msgError, Error: asWire(mapError(err))}, -1)
		return fmt.Errorf("take over the data plane of %s: %w", h.cfg.Name, err)
	}
	h.start()
	h.plane.crash("successor/serving")
	h.plane.log.Info("taken over", "version", version.String(), "instance", h.plane.instance)
	return h.plane.run(ctx, guests, control)
}

// prepare checks, without changing anything, that this program understands what
// it would take over.
func (h *heir) prepare(configFile string) (err error) {
	cred, err := unix.GetsockoptUcred(fdLink, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return err
	}
	if h.old, err = unix.PidfdOpen(int(cred.Pid), 0); err != nil {
		return fmt.Errorf("watch the predecessor %d: %w", cred.Pid, err)
	}
	if h.cfg, err = LoadConfig(configFile); err != nil {
		return err
	}
	h.plane, err = newPlane(h.cfg, Parts{}, newLogger(h.cfg).With("part", "dataplane"))
	if err != nil {
		return err
	}
	h.plane.crash("successor/started")
	dir, err := fsx.OS(filepath.Join(h.cfg.StateDir, "tracker"))
	if err != nil {
		return err
	}
	if err := cbt.CheckReadable(dir); err != nil && !errors.Is(err, cbt.ErrNoTracker) {
		return err
	}
	return nil
}

// takeOver receives everything and returns when the predecessor can never serve
// again. Before that nothing is written and nothing is read from a client.
func (h *heir) takeOver(ctx context.Context) (guests, control net.Listener, err error) {
	begin, fd, err := h.link.receive(time.Time{})
	if fd >= 0 {
		_ = unix.Close(fd)
	}
	if err != nil {
		return nil, nil, err
	}
	if begin.Type != msgBegin || begin.VM != h.cfg.VM {
		return nil, nil, fmt.Errorf("%q of VM %s came where the hand-over of %s was due", begin.Type, begin.VM, h.cfg.VM)
	}
	conns, err := h.receiveAll()
	if err != nil {
		return nil, nil, err
	}
	h.plane.crash("successor/received")
	if guests, err = inherited(fdNBD, "NBD"); err != nil {
		return nil, nil, err
	}
	if control, err = inherited(fdControl, "control"); err != nil {
		return nil, nil, err
	}
	if err := h.open(ctx, begin.Tracker, conns); err != nil {
		return nil, nil, err
	}
	h.plane.crash("successor/adopted")
	// A predecessor that died meanwhile is noticed below.
	if err := h.link.send(message{Type: msgReady}, -1); err != nil && !errors.Is(err, unix.EPIPE) {
		return nil, nil, err
	}
	h.plane.crash("successor/ready")
	if err := h.awaitGo(); err != nil {
		return nil, nil, err
	}
	h.plane.keepLate() // before go nothing is written; until then the predecessor's file holds
	h.plane.crash("successor/go")
	h.link.close()
	return guests, control, h.pid.write(os.Getpid())
}

// receiveAll collects images, connections and the pid file.
func (h *heir) receiveAll() ([]nbd.Adopted, error) {
	var conns []nbd.Adopted
	for {
		m, fd, err := h.link.receive(time.Time{})
		if err != nil {
			return nil, err
		}
		switch m.Type {
		case msgEnd:
			if len(h.plane.images) != len(h.cfg.Disks) || h.pid == nil {
				return nil, fmt.Errorf("%d of %d disks were handed over", len(h.plane.images), len(h.cfg.Disks))
			}
			return conns, nil
		case msgImage:
			err = h.image(m, fd)
		case msgConn:
			var c net.Conn
			if c, err = connOf(fd); err == nil && m.Conn != nil {
				conns = append(conns, nbd.Adopted{Conn: c, Handed: *m.Conn})
			}
		case msgPID:
			h.pid = &pidFile{os.NewFile(uintptr(fd), h.cfg.planePID())}
			h.plane.pid = h.pid
		default:
			err = fmt.Errorf("unknown message %q", m.Type)
		}
		if err != nil {
			return nil, err
		}
	}
}

// connOf owns fd from now on.
func connOf(fd int) (net.Conn, error) {
	f := os.NewFile(uintptr(fd), "connection")
	if f == nil {
		return nil, errors.New("a connection came without its descriptor")
	}
	defer f.Close()
	return net.FileConn(f)
}

// image adopts one disk's storage; disks come in the order of the configuration.
func (h *heir) image(m message, fd int) error {
	n := len(h.plane.images)
	if n >= len(h.cfg.Disks) || h.cfg.Disks[n].Name != m.Disk || fd < 0 {
		return fmt.Errorf("disk %q was handed over where it was not due", m.Disk)
	}
	img := &image{cfg: h.cfg.Disks[n]}
	switch {
	case m.File != nil && img.cfg.Kind != NBD:
		f, err := block.AdoptFile(fd, *m.File)
		if err != nil {
			return fmt.Errorf("disk %s: %w", m.Disk, err)
		}
		img.dev, img.file = f, f
		img.locked.Store(m.File.QemuLock)
		if err := img.checkKind(); err != nil {
			return err
		}
	case m.Upstream != nil && img.cfg.Kind == NBD:
		c, err := connOf(fd)
		if err != nil {
			return err
		}
		u, err := adoptUpstream(c, *m.Upstream, img.cfg)
		if err != nil {
			return fmt.Errorf("disk %s: %w", m.Disk, err)
		}
		u.late.adopt(m.Late)
		img.dev, img.upstream = u, u
	default:
		return fmt.Errorf("disk %s is of kind %s, something else was handed over", m.Disk, img.cfg.Kind)
	}
	h.plane.images = append(h.plane.images, img)
	return nil
}

// open takes the tracker over and offers the exports that were offered.
func (h *heir) open(ctx context.Context, tracker *cbt.Handed, conns []nbd.Adopted) error {
	p := h.plane
	var err error
	if p.choices, err = openChoices(p.state); err != nil { // as they are now
		return err
	}
	if tracker != nil {
		c, err := p.trackerConfig()
		if err != nil {
			return err
		}
		g, err := cbt.TakeOver(c, *tracker)
		if err != nil {
			return err
		}
		p.group.Store(g)
		p.report.Store(&cbt.OpenReport{})
	}
	if err := p.restoreExports(); err != nil {
		return err
	}
	h.start, err = p.server.Adopt(context.WithoutCancel(ctx), conns)
	return err
}

// awaitGo returns once the predecessor said that it never serves again, or is
// dead. One that takes everything back kills this process.
func (h *heir) awaitGo() error {
	_, err := h.link.expect(msgGo, time.Time{})
	if err == nil {
		return nil
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	fds := []unix.PollFd{{Fd: int32(h.old), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, -1)
		if n > 0 {
			h.plane.log.Warn("the predecessor died in the middle of handing over, taking over")
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for the predecessor's end: %w", err)
		}
	}
}
