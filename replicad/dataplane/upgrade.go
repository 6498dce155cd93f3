package dataplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/version"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/wire"
)

// Deadlines of an upgrade.
const (
	helloTimeout = 20 * time.Second       // a program starts and reads its configuration
	callsTimeout = 5 * time.Second        // control calls under way; no guest waits for it
	holdTimeout  = 200 * time.Millisecond // the guest waits: everything at rest, or nothing happened
	takeTimeout  = 2 * time.Second        // the guest waits: the successor has everything
)

// UpgradeRequest asks a data plane to be succeeded by the installed program.
type UpgradeRequest struct {
	// DryRun asks the installed program whether it understands everything, and
	// nothing else.
	DryRun bool
}

// UpgradeReply says what became of it.
type UpgradeReply struct {
	// Program is the file that was started, From and To the versions.
	Program  string
	From, To string
	// PID is the successor; 0 after a dry run.
	PID int `json:",omitempty"`
	// Pause is how long nothing was read from the guest.
	Pause time.Duration
	// Connections that were handed on.
	Connections int
}

// errHandedOver: Serve ended because a successor has everything. Nothing may be
// closed in an orderly way, it is all in use.
var errHandedOver = errors.New("a successor has taken over")

// upgrade starts a successor and hands everything to it. On any error this
// process goes on as if nothing had been asked.
func (p *Plane) upgrade(r UpgradeRequest) (UpgradeReply, error) {
	if !p.upgradeMu.TryLock() {
		return UpgradeReply{}, &wire.Error{Kind: wire.KindConflict, Text: "an upgrade of " + p.cfg.Name + " is under way"}
	}
	defer p.upgradeMu.Unlock()
	if p.pid == nil {
		return UpgradeReply{}, &wire.Error{Kind: wire.KindRefused, Text: "this data plane has no keeper and cannot be succeeded"}
	}
	if p.left.Load() {
		return UpgradeReply{}, errMoved(p.cfg)
	}
	if o := p.overlayStatus(); o != nil && o.Phase != overlay.Done.String() {
		return UpgradeReply{}, &wire.Error{
			Kind: wire.KindRefused, Text: "an unplanned failover of " + p.cfg.Name + " is " + o.Phase + " and not complete: its disks cannot be handed on",
			Hint: "replicactl failover commit " + p.cfg.Name + " (or cancel), then repeat when vm status shows no failover",
		}
	}
	a := UpgradeReply{From: version.String()}
	s, err := p.startSuccessor()
	if err != nil {
		return a, fmt.Errorf("start the successor: %w", err)
	}
	a.Program, a.To = s.program, s.version
	if r.DryRun {
		s.kill()
		return a, nil
	}
	p.crash("upgrade/checked")
	if a.Connections, a.Pause, err = p.handOver(s); err != nil {
		p.log.Warn("upgrade taken back", "err", err, "pause", a.Pause)
		return a, &wire.Error{
			Kind: wire.KindUnavailable, Text: "the upgrade did not take place, everything goes on as before: " + err.Error(),
			Hint: "try again: replicactl vm upgrade " + p.cfg.Name,
		}
	}
	a.PID = s.cmd.Process.Pid
	p.log.Info("handed over", "to", a.PID, "from_version", a.From, "to_version", a.To, "pause", a.Pause, "connections", a.Connections)
	return a, nil
}

func errMoved(c Config) error {
	return &wire.Error{Kind: wire.KindUnavailable, Text: "the data plane of " + c.Name + " was just upgraded; ask again"}
}

// successor is the process that is to take over.
type successor struct {
	cmd     *exec.Cmd
	link    *link
	program string
	version string
}

// startSuccessor starts the installed program and returns once it has said that
// it understands configuration, choices and tracker.
func (p *Plane) startSuccessor() (_ *successor, err error) {
	bin, err := p.cfg.binary()
	if err != nil {
		return nil, err
	}
	own, other, err := socketPair()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, "dataplane", "--successor", "--config", p.cfg.configFile())
	cmd.ExtraFiles = []*os.File{nil, nil, other.f} // become fdNBD, fdControl and fdLink
	for i, fd := range []int{fdNBD, fdControl} {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			own.close()
			other.close()
			return nil, fmt.Errorf("duplicate a listening socket: %w", err)
		}
		cmd.ExtraFiles[i] = os.NewFile(uintptr(dup), "listener")
		defer cmd.ExtraFiles[i].Close()
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	other.close() // so that its end is seen at once
	if err != nil {
		own.close()
		return nil, err
	}
	s := &successor{cmd: cmd, link: own, program: bin}
	p.crash("upgrade/started")
	m, err := own.expect(msgHello, time.Now().Add(helloTimeout))
	if err == nil && m.Handover < handoverVersion {
		err = &wire.Error{Kind: wire.KindVersion, Text: fmt.Sprintf("%s (%s) takes over by version %d, this process (%s) hands over by %d",
			bin, m.Version, m.Handover, version.String(), handoverVersion)}
	}
	if err != nil {
		s.kill()
		return nil, fmt.Errorf("%s: %w", bin, err)
	}
	s.version = m.Version
	return s, nil
}

// kill ends the successor and waits until it is gone: from then on it serves
// nothing. Twice is harmless.
func (s *successor) kill() {
	if s.cmd.ProcessState != nil {
		return
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait() // killed
	s.link.close()
}

// rollback is what takes a hand-over back, last thing first.
type rollback []func()

func (r *rollback) add(f func()) { *r = append(*r, f) }

func (r *rollback) run() {
	for i := len(*r) - 1; i >= 0; i-- {
		(*r)[i]()
	}
}

// handOver brings everything to rest and gives it to s. The pause is what a
// guest may have noticed. After an error everything serves again.
func (p *Plane) handOver(s *successor) (conns int, pause time.Duration, err error) {
	var undo rollback
	var begun time.Time
	var release func()
	defer func() {
		if err != nil {
			s.kill() // before anything is served here again
			undo.run()
			if !begun.IsZero() {
				pause = time.Since(begun)
			}
		}
		if release != nil {
			release()
		}
	}()
	// What takes long is done while the guest is served: what the page cache
	// holds is written, calls end, streams stop, the frozen epoch is given up.
	if err := p.sync(); err != nil {
		return 0, 0, err
	}
	if release, err = p.excludeCalls(); err != nil {
		return 0, 0, err
	}
	if f := p.held.Load(); f != nil {
		if err := p.abandon(f.info.Epoch); err != nil {
			return 0, 0, err
		}
	}
	begun = time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), holdTimeout)
	defer cancel()
	held, err := p.server.Hold(ctx)
	if err != nil {
		return 0, 0, err
	}
	undo.add(p.server.Resume)
	p.crash("upgrade/held")
	begin := message{Type: msgBegin, VM: p.cfg.VM}
	if g := p.group.Load(); g != nil {
		h, back, err := g.HandOver()
		if err != nil {
			return 0, 0, err
		}
		undo.add(back)
		begin.Tracker = &h
	}
	p.crash("upgrade/rested")
	if err := s.link.send(begin, -1); err != nil {
		return 0, 0, err
	}
	for _, i := range p.images {
		back, err := i.handOver(ctx, s.link)
		if err != nil {
			return 0, 0, fmt.Errorf("disk %s: %w", i.cfg.Name, err)
		}
		undo.add(back)
	}
	for _, h := range held {
		var serr error
		if err := h.Control(func(fd uintptr) { serr = s.link.send(message{Type: msgConn, Conn: &h}, int(fd)) }); err != nil || serr != nil {
			return 0, 0, errors.Join(err, serr)
		}
	}
	if err := s.link.send(message{Type: msgPID}, int(p.pid.f.Fd())); err != nil {
		return 0, 0, err
	}
	if err := s.link.send(message{Type: msgEnd}, -1); err != nil {
		return 0, 0, err
	}
	p.crash("upgrade/sent")
	if _, err := s.link.expect(msgReady, time.Now().Add(takeTimeout)); err != nil {
		return 0, 0, err
	}
	p.crash("upgrade/ready")
	if err := p.commitHandOver(s, &undo); err != nil {
		return 0, 0, err
	}
	return len(held), time.Since(begun), nil
}

// commitHandOver is the moment: before "go" is sent this process may serve
// again, behind it never.
func (p *Plane) commitHandOver(s *successor, undo *rollback) error {
	if err := p.pid.write(s.cmd.Process.Pid); err != nil {
		return err
	}
	undo.add(func() { _ = p.pid.write(os.Getpid()) })
	p.crash("upgrade/committed")
	if err := s.link.send(message{Type: msgGo}, -1); err != nil {
		return err
	}
	p.left.Store(true)
	p.crash("upgrade/gone")
	p.server.Leave()
	close(p.moved)
	return nil
}

// handOver brings one image to rest and sends it.
func (i *image) handOver(ctx context.Context, l *link) (back func(), err error) {
	m := message{Type: msgImage, Disk: i.cfg.Name}
	var serr error
	if i.upstream != nil {
		c, h, back, err := i.upstream.handOver(ctx)
		if err != nil {
			return nil, err
		}
		m.Upstream, m.Late = &h, i.upstream.late.handed()
		err = c.Control(func(fd uintptr) { serr = l.send(m, int(fd)) })
		if err = errors.Join(err, serr); err != nil {
			back()
			return nil, err
		}
		return back, nil
	}
	h, back, err := i.file.HandOver(ctx)
	if err != nil {
		return nil, err
	}
	h.QemuLock = i.locked.Load()
	m.File = &h
	err = i.file.Control(func(fd int) { serr = l.send(m, fd) })
	if err = errors.Join(err, serr); err != nil {
		back()
		return nil, err
	}
	return back, nil
}

// outdated reports whether the installed program is another file than the one
// that process pid runs.
func (c Config) outdated(pid int) bool {
	bin, err := c.binary()
	if err != nil {
		return false
	}
	installed, err1 := os.Stat(bin)
	running, err2 := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), "exe"))
	return err1 == nil && err2 == nil && !os.SameFile(installed, running)
}
