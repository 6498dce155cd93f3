package api

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/wire"
)

// Role is what a caller of the control socket may do. A greater one may do all
// that a smaller one may.
type Role int

// The roles. An Operator runs failovers, tests and the day's work. What lets a
// caller read or write files and disks, run programs as the daemon, end
// protection or history, or decide whom to trust, takes an Admin.
const (
	Nobody   Role = iota
	Monitor       // may look
	Operator      // may act on what is set up
	Admin         // may do everything: root
)

func (r Role) String() string {
	return [...]string{"nobody", "monitor", "operator", "admin"}[min(max(r, Nobody), Admin)]
}

// Caller is the process behind a connection, as the kernel knew it when it
// connected.
type Caller struct {
	UID    int // -1 = unknown
	Groups []int
}

// String names the caller for logs: "anna (uid 1000)".
func (c Caller) String() string {
	switch {
	case c.UID == 0:
		return "root"
	case c.UID < 0:
		return "unknown"
	}
	if u, err := user.LookupId(strconv.Itoa(c.UID)); err == nil {
		return fmt.Sprintf("%s (uid %d)", wire.CleanText(u.Username, 64), c.UID)
	}
	return fmt.Sprintf("uid %d", c.UID)
}

// How many connections callers that are not root may hold: so that none of them
// takes the daemon's descriptors.
const (
	maxStrangers = 16 // of all that have no role
	maxPerUser   = 64
)

// gate counts connections of callers that are not root.
type gate struct {
	net.Listener
	roles func(Caller) Role

	mu    sync.Mutex
	users map[int]int // guarded by mu; -1 counts all without a role
}

// strangers is the key of callers without a role.
const strangers = -1

// callerConn is a connection that knows who called.
type callerConn struct {
	net.Conn
	caller  Caller
	roles   func(Caller) Role
	release func()
}

// Close implements net.Conn.
func (c *callerConn) Close() error {
	c.release()
	return c.Conn.Close()
}

// Accept implements net.Listener. A caller that holds too many connections is
// hung up on.
func (g *gate) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		who := callerOf(c)
		n := &callerConn{Conn: c, caller: who, roles: g.roles, release: func() {}}
		key, most := who.UID, maxPerUser
		switch g.roles(who) {
		case Admin:
			return n, nil
		case Nobody:
			key, most = strangers, maxStrangers
		}
		if !g.take(key, most) {
			_ = c.Close()
			continue
		}
		n.release = sync.OnceFunc(func() { g.take(key, -1) })
		return n, nil
	}
}

// take counts one connection more, if most allows it; with a negative most, one
// less.
func (g *gate) take(key, most int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if most < 0 {
		if g.users[key]--; g.users[key] <= 0 {
			delete(g.users, key)
		}
		return true
	}
	if g.users[key] >= most {
		return false
	}
	g.users[key]++
	return true
}

// callerOf asks the kernel.
func callerOf(c net.Conn) Caller {
	who := Caller{UID: -1}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return who
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return who
	}
	_ = raw.Control(func(fd uintptr) {
		cr, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return
		}
		who.UID = int(cr.Uid)
		who.Groups = append(peerGroups(fd), int(cr.Gid))
	})
	return who
}

// maxGroups is the kernel's limit (NGROUPS_MAX).
const maxGroups = 65536

// peerGroups are the supplementary groups of who connected (SO_PEERGROUPS,
// socket(7), since Linux 4.13); none when the kernel does not say.
func peerGroups(fd uintptr) []int {
	ids := make([]uint32, 32)
	for {
		size := uint32(4 * len(ids))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&ids[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch n := int(size / 4); {
		case errno == unix.ERANGE && n > len(ids) && n <= maxGroups:
			ids = make([]uint32, n)
		case errno != 0 || n > len(ids):
			return nil
		default:
			out := make([]int, n)
			for i := range out {
				out[i] = int(ids[i])
			}
			return out
		}
	}
}

type callerKey struct{}

// asCaller lets handlers know who called.
func asCaller(ctx context.Context, c net.Conn) context.Context {
	n, ok := c.(*callerConn)
	if !ok {
		n = &callerConn{caller: Caller{UID: -1}, roles: func(Caller) Role { return Nobody }}
	}
	return context.WithValue(ctx, callerKey{}, n)
}

// CallerOf is who asked for what ctx belongs to.
func CallerOf(ctx context.Context) Caller {
	if n, ok := ctx.Value(callerKey{}).(*callerConn); ok {
		return n.caller
	}
	return Caller{UID: -1}
}

// roleOf is what the caller may do now: a role that was taken away counts for
// open connections too.
func roleOf(r *http.Request) Role {
	if n, ok := r.Context().Value(callerKey{}).(*callerConn); ok {
		return n.roles(n.caller)
	}
	return Nobody
}

// allow refuses a caller whose role is not enough.
func allow(w http.ResponseWriter, r *http.Request, need Role) error {
	have := roleOf(r)
	if have >= need {
		return nil
	}
	if have == Nobody {
		w.Header().Set("Connection", "close")
		return &wire.Error{Kind: wire.KindRefused, Text: "only root may control the daemon, and members of the groups that [access] names", Hint: "run the command as root"}
	}
	return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("this takes the role %v, the caller is %v by [access]", need, have), Hint: "run the command as root, or ask one who may"}
}

// Needs is the role that an action takes. What is not listed takes an Admin.
func Needs(a Action) Role {
	switch a.Verb {
	case AuditLog, PatchList:
		return Monitor
	case VMPause, VMResume, VMSync, VMResync, VMLimit, VMStart, VMUpgrade, VMStatsReset,
		Planned, Unplanned, Reverse, Commit, Cancel, PlanResume, PlanUndo,
		PeerTest, PointPin, PointApp, FailoverTest, TestStop:
		return Operator
	case Drill:
		if strings.HasPrefix(strings.TrimSpace(a.Proof), "command") {
			return Admin // it runs a program of the caller's choice as the daemon
		}
		return Operator
	}
	return Admin
}
