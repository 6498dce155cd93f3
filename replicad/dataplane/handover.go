package dataplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/wire"
)

// handoverVersion is the version of what passes between a data plane and its
// successor. A successor says the highest it understands; the data plane that
// is to go speaks its own or does not begin. docs/formats/handover.md.
const handoverVersion = 1

// The kinds of messages, each one packet of a SEQPACKET socket pair, in the
// order in which they are sent.
const (
	msgHello = "hello" // successor: I understand everything
	msgError = "error" // successor: I cannot; ends the attempt
	msgBegin = "begin" // what is coming
	msgImage = "image" // one descriptor
	msgConn  = "conn"  // one descriptor
	msgPID   = "pid"   // one descriptor: the locked pid file
	msgEnd   = "end"   // that was all
	msgReady = "ready" // successor: everything is mine, nothing was served yet
	msgGo    = "go"    // the predecessor never serves again
)

// message is one packet. Descriptors travel beside it.
type message struct {
	Type string `json:"type"`
	// hello
	Handover int    `json:"handover,omitempty"`
	Version  string `json:"version,omitempty"`
	// begin
	VM      wire.VMID   `json:"vm,omitempty"`
	Tracker *cbt.Handed `json:"tracker,omitempty"` // nil: there is none yet
	// image: File for a file or block device, Upstream for another server
	Disk     wire.DiskName     `json:"disk,omitempty"`
	File     *block.Handed     `json:"file,omitempty"`
	Upstream *nbd.HandedClient `json:"upstream,omitempty"`
	Late     *lateness         `json:"late,omitempty"`
	// conn
	Conn *nbd.Handed `json:"conn,omitempty"`
	// error
	Error *wire.Error `json:"error,omitempty"`
}

// maxPacket bounds one message; a tracker of 64 disks takes about 20 KiB.
const maxPacket = 128 << 10

// link is one end of the socket pair between a data plane and its successor.
type link struct{ f *os.File }

// socketPair returns both ends.
func socketPair() (own, other *link, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return &link{os.NewFile(uintptr(fds[0]), "successor")}, &link{os.NewFile(uintptr(fds[1]), "predecessor")}, nil
}

func (l *link) close() { _ = l.f.Close() }

// send sends one message, with fd beside it unless that is negative.
func (l *link) send(m message, fd int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxPacket {
		return fmt.Errorf("hand over %s: %d bytes", m.Type, len(b))
	}
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	rc, err := l.f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = rc.Write(func(s uintptr) bool {
		serr = unix.Sendmsg(int(s), b, rights, nil, unix.MSG_NOSIGNAL)
		return !errors.Is(serr, unix.EAGAIN)
	})
	if err = errors.Join(err, serr); err != nil {
		return fmt.Errorf("hand over %s: %w", m.Type, err)
	}
	return nil
}

// receive returns the next message and its descriptor, -1 without. io.EOF means
// that the other end was closed.
func (l *link) receive(deadline time.Time) (m message, fd int, err error) {
	if err := l.f.SetReadDeadline(deadline); err != nil {
		return m, -1, err
	}
	rc, err := l.f.SyscallConn()
	if err != nil {
		return m, -1, err
	}
	b, oob := make([]byte, maxPacket), make([]byte, unix.CmsgSpace(4))
	var n, oobn, flags int
	var rerr error
	err = rc.Read(func(s uintptr) bool {
		n, oobn, flags, _, rerr = unix.Recvmsg(int(s), b, oob, unix.MSG_CMSG_CLOEXEC)
		return !errors.Is(rerr, unix.EAGAIN)
	})
	if errors.Is(rerr, unix.ECONNRESET) || err == nil && rerr == nil && n == 0 {
		return m, -1, io.EOF
	}
	if err = errors.Join(err, rerr); err != nil {
		return m, -1, err
	}
	if fd, err = oneRight(oob[:oobn]); err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		err = errors.New("a message is longer than any can be")
	}
	if err == nil {
		err = json.Unmarshal(b[:n], &m)
	}
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return m, -1, fmt.Errorf("unreadable message: %w", err)
	}
	return m, fd, nil
}

// oneRight is the descriptor in a control message, -1 without.
func oneRight(oob []byte) (int, error) {
	if len(oob) == 0 {
		return -1, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1, err
	}
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil && len(fds) > 0 {
			return fds[0], nil
		}
	}
	return -1, nil
}

// expect receives a message of one type; an error message is an error.
func (l *link) expect(typ string, deadline time.Time) (message, error) {
	m, fd, err := l.receive(deadline)
	if fd >= 0 {
		_ = unix.Close(fd)
	}
	switch {
	case err != nil:
		return m, fmt.Errorf("wait for %q: %w", typ, err)
	case m.Type == msgError && m.Error != nil:
		return m, m.Error
	case m.Type != typ:
		return m, fmt.Errorf("%q came where %q was due", m.Type, typ)
	}
	return m, nil
}
