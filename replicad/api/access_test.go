package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/status"
)

// Groups of the test; nobody needs to be in them.
const (
	operators = 64001
	monitors  = 64002
	someUser  = 64123
)

// counted is a backend that counts what reaches it.
type counted struct {
	Backend
	looks, acts atomic.Int64
	by          atomic.Pointer[Caller]
}

func (c *counted) VMs(context.Context) ([]status.VM, error) { c.looks.Add(1); return nil, nil }
func (c *counted) Invite(context.Context, InviteRequest) (InviteReply, error) {
	c.acts.Add(1)
	return InviteReply{}, nil
}

func (c *counted) Act(ctx context.Context, _ Action, _ func(Event)) error {
	c.acts.Add(1)
	who := CallerOf(ctx)
	c.by.Store(&who)
	return nil
}

// desk is a server on a socket that everybody may open.
type desk struct {
	*counted
	t       *testing.T
	socket  string
	dismiss atomic.Bool // groups count no longer
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("calls as other users: needs root")
	}
	dir, err := os.MkdirTemp("", "api")
	if err != nil {
		t.Fatal(err)
	}
	d := &desk{counted: &counted{}, t: t, socket: filepath.Join(dir, "s")}
	l, err := net.Listen("unix", d.socket)
	if err := errors.Join(err, os.Chmod(dir, 0o755), os.Chmod(d.socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	s := NewServer(d.counted, func(c Caller) Role {
		switch {
		case c.UID == 0:
			return Admin
		case d.dismiss.Load():
		case slices.Contains(c.Groups, operators):
			return Operator
		case slices.Contains(c.Groups, monitors):
			return Monitor
		}
		return Nobody
	}, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Shutdown(context.Background()), <-done, os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return d
}

// dial connects as another user: the kernel notes the thread's credentials. The
// thread ends with them.
func (d *desk) dial(uid, gid int, groups ...uint32) (net.Conn, error) {
	type result struct {
		net.Conn
		error
	}
	got := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked
		var errno unix.Errno
		if len(groups) == 0 {
			groups = []uint32{uint32(gid)}
		}
		if uid != 0 {
			errno = setThread(uid, gid, groups)
		}
		if errno != 0 {
			got <- result{error: errno}
			return
		}
		c, err := net.Dial("unix", d.socket)
		got <- result{c, err}
	}()
	r := <-got
	return r.Conn, r.error
}

// ask makes one request on a connection of its own.
func (d *desk) ask(c net.Conn, method, path string, body any) (code int, text string) {
	d.t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		d.t.Fatal(err)
	}
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }, DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(d.t.Context(), method, "http://x"+path, bytes.NewReader(b))
	if err != nil {
		d.t.Fatal(err)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	all, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.StatusCode, string(all)
}

// Each role may do what it is for, by the caller's user, group and supplementary
// groups as the kernel knows them; nothing else reaches the daemon.
func TestACallerMayDoWhatItsRoleIsFor(t *testing.T) {
	d := newDesk(t)
	many := make([]uint32, 100) // more than the first try has room for
	for i := range many {
		many[i] = uint32(70000 + i)
	}
	callers := map[string]struct {
		role     Role
		uid, gid int
		groups   []uint32
	}{
		"root":                  {Admin, 0, 0, nil},
		"operator by group":     {Operator, someUser, operators, nil},
		"operator by many":      {Operator, someUser, someUser, append(many, operators)},
		"monitor by supplement": {Monitor, someUser, someUser, []uint32{someUser, monitors}},
		"both":                  {Operator, someUser, monitors, []uint32{operators}},
		"nobody":                {Nobody, someUser, someUser, nil},
	}
	asks := []struct {
		need         Role
		method, path string
		body         any
	}{
		{Monitor, "GET", "/v1/vms", nil},
		{Operator, "GET", "/v1/stacks", nil},
		{Monitor, "POST", "/v1/actions", Action{Verb: AuditLog}},
		{Operator, "POST", "/v1/actions", Action{Verb: Unplanned}},
		{Operator, "POST", "/v1/actions", Action{Verb: Drill, Proof: "agent"}},
		{Admin, "POST", "/v1/actions", Action{Verb: Drill, Proof: " command:/bin/id"}},
		{Admin, "POST", "/v1/actions", Action{Verb: VMDisable}},
		{Admin, "POST", "/v1/actions", Action{Verb: "something-new"}},
		{Admin, "POST", "/v1/peers/invite", InviteRequest{}},
	}
	for name, c := range callers {
		for _, a := range asks {
			conn, err := d.dial(c.uid, c.gid, c.groups...)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			before := d.looks.Load() + d.acts.Load()
			code, text := d.ask(conn, a.method, a.path, a.body)
			reached := d.looks.Load()+d.acts.Load() > before
			if allowed := c.role >= a.need; allowed != (code == http.StatusOK) || !allowed && (reached || code != http.StatusForbidden) {
				t.Errorf("%s, %s %s %+v: %d %s (reached the daemon: %v)", name, a.method, a.path, a.body, code, text, reached)
			}
		}
	}
	conn, err := d.dial(someUser, operators)
	if err != nil {
		t.Fatal(err)
	}
	if code, text := d.ask(conn, "POST", "/v1/actions", Action{Verb: VMSync}); code != http.StatusOK {
		t.Fatal(text)
	}
	if by := d.by.Load(); by.UID != someUser || by.String() != "uid 64123" {
		t.Errorf("the daemon was told that %v asked", by)
	}
}

// A role that was taken away is gone for connections that are open.
func TestARoleThatWasTakenAwayEndsOnOpenConnections(t *testing.T) {
	d := newDesk(t)
	c, err := d.dial(someUser, operators)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}
	defer tr.CloseIdleConnections()
	for _, want := range []int{http.StatusOK, http.StatusForbidden} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://x/v1/vms", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("got %d, want %d", resp.StatusCode, want)
		}
		d.dismiss.Store(true)
	}
}

// Whoever has no role holds few connections, and keeps nobody else out.
func TestStrangersHoldFewConnections(t *testing.T) {
	d := newDesk(t)
	var held []net.Conn
	for i := range maxStrangers + 1 {
		c, err := d.dial(someUser+i, someUser)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, c)
	}
	if _, err := held[maxStrangers].Read(make([]byte, 1)); err == nil {
		t.Error("one stranger too many was not hung up on")
	}
	for uid, gid := range map[int]int{0: 0, someUser: monitors} {
		c, err := d.dial(uid, gid)
		if err != nil {
			t.Fatal(err)
		}
		if code, text := d.ask(c, "GET", "/v1/vms", nil); code != http.StatusOK {
			t.Errorf("uid %d beside strangers: %d %s", uid, code, text)
		}
	}
	for _, c := range held {
		_ = c.Close()
	}
	for { // their places are free once the server has seen them go
		c, err := d.dial(someUser, someUser)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = c.Write([]byte("GET /v1/vms HTTP/1.1\r\nHost: x\r\n\r\n")); err == nil {
			if _, err = c.Read(make([]byte, 1)); err == nil {
				_ = c.Close()
				return
			}
		}
		_ = c.Close()
		if t.Context().Err() != nil {
			t.Fatal("their places stay taken")
		}
	}
}

// Whoever adds a verb decides who may use it.
func TestEveryVerbHasARole(t *testing.T) {
	b, err := os.ReadFile("api.go")
	if err != nil {
		t.Fatal(err)
	}
	roles := map[Role]string{
		Monitor: "failover-log failover-patch-list",
		Operator: `vm-pause vm-resume vm-sync vm-resync vm-limit vm-start vm-upgrade vm-stats-reset failover-planned failover-unplanned
			failover-reverse failover-commit failover-cancel failover-resume failover-take-back peer-test point-pin point-app
			failover-test failover-test-stop drill`,
		Admin: `vm-enable vm-set vm-disable vm-resize vm-add-disk vm-remove-disk vm-export vm-import point-mount point-unmount point-export
			policy-apply point-unpin point-keep failover-patch-export failover-patch-delete failover-patch-mount peer-address reload`,
	}
	want := map[Verb]Role{}
	for r, verbs := range roles {
		for _, v := range strings.Fields(verbs) {
			want[Verb(v)] = r
		}
	}
	found := 0
	for _, m := range regexp.MustCompile(`(?m)^\s*\w+\s+Verb = "([a-z-]+)"`).FindAllSubmatch(b, -1) {
		v := Verb(m[1])
		found++
		if r, ok := want[v]; !ok || Needs(Action{Verb: v}) != r {
			t.Errorf("%s takes the role %v here, the list says %v", v, Needs(Action{Verb: v}), r)
		}
	}
	if found != len(want) {
		t.Errorf("%d verbs, the list has %d", found, len(want))
	}
}
