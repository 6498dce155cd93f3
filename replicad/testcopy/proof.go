package testcopy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"kvmreplica/replicad/wire"
)

// Proof is how a drill knows that the guest works.
type Proof struct {
	Kind string // "agent", "console", "tcp" or "command"
	Arg  string // the text, the port, the program with its arguments
}

// ProofHelp is the syntax of ParseProof for people.
const ProofHelp = `agent, console:TEXT, tcp:PORT or command:PROGRAM ARGUMENTS`

const maxProof = 1024

// ParseProof reads "agent", "console:TEXT", "tcp:PORT" or "command:CMD"; empty
// is "agent".
func ParseProof(s string) (Proof, error) {
	bad := func(what string) (Proof, error) {
		return Proof{}, &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("proof %.60q: %s", s, what), Hint: "say " + ProofHelp}
	}
	kind, arg, _ := strings.Cut(s, ":")
	if len(s) > maxProof {
		return bad("too long")
	}
	switch kind {
	case "", "agent":
		if arg != "" {
			return bad("the agent takes no argument")
		}
		return Proof{Kind: "agent"}, nil
	case "console":
		if arg == "" {
			return bad("which text?")
		}
	case "tcp":
		if n, err := strconv.Atoi(arg); err != nil || n < 1 || n > 65535 {
			return bad("which port?")
		}
	case "command":
		if len(strings.Fields(arg)) == 0 {
			return bad("which program?")
		}
	default:
		return bad("unknown")
	}
	return Proof{Kind: kind, Arg: arg}, nil
}

// String is what ParseProof reads.
func (p Proof) String() string {
	if p.Arg == "" {
		return p.Kind
	}
	return p.Kind + ":" + p.Arg
}

// possible refuses a proof that cannot come true with this copy.
func (p Proof) possible(c Copy) error {
	switch {
	case p.Kind == "console" && !c.Serial:
		return &wire.Error{Kind: wire.KindRefused, Text: "the VM has no serial port, there is no console to read", Hint: "use another proof: " + ProofHelp}
	case p.Kind == "tcp" && (len(c.NICs) == 0 || c.Isolated()):
		return &wire.Error{Kind: wire.KindRefused, Text: "the copy is isolated: this host cannot connect to it", Hint: "put it into a test network (--network), or use another proof: " + ProofHelp}
	}
	return nil
}

const (
	proofEvery = 500 * time.Millisecond
	proofTry   = 30 * time.Second
	proofDial  = 2 * time.Second
)

// await tries a proof until it comes true, the copy ends or ctx does. detail is
// what was seen.
func (m *Manager) await(ctx context.Context, p Proof, c *copied) (detail string, err error) {
	tick := time.NewTicker(proofEvery)
	defer tick.Stop()
	console := &tail{path: m.console(c.record())}
	for {
		detail, err = m.try(ctx, p, c.record(), console)
		if err == nil {
			return detail, nil
		}
		if !m.known(c.id) {
			return "", fmt.Errorf("the copy ended before the proof: %s", c.record().Reason)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("no proof in time: %w", err)
		case <-tick.C:
		}
	}
}

func (m *Manager) try(ctx context.Context, p Proof, c Copy, console *tail) (string, error) {
	tctx, cancel := context.WithTimeout(ctx, proofTry)
	defer cancel()
	switch p.Kind {
	case "agent":
		if err := m.deps.Hyper.AgentPing(tctx, c.UUID); err != nil {
			return "", err
		}
		return "the guest agent answers", nil
	case "console":
		return console.find(p.Arg)
	case "tcp":
		ip, err := m.address(tctx, c)
		if err != nil {
			return "", err
		}
		conn, err := dial(tctx, net.JoinHostPort(ip, p.Arg))
		if err != nil {
			return "", err
		}
		return "port " + p.Arg + " of " + ip + " accepts connections", conn.Close()
	case "command":
		return m.command(tctx, p.Arg, c)
	}
	return "", fmt.Errorf("unknown proof %q", p.Kind)
}

// dial tries for a short time only: the kernel repeats a SYN that nobody
// answered after 1, 3, 7 and 15 seconds, so that a guest which listens since the
// fourth would count as recovered at the seventh.
func dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: proofDial}
	return d.DialContext(ctx, "tcp", address)
}

// command runs a person's program; exit code 0 is the proof.
func (m *Manager) command(ctx context.Context, line string, c Copy) (string, error) {
	f := strings.Fields(line)
	cmd := exec.CommandContext(ctx, f[0], f[1:]...)
	ip, _ := m.address(ctx, c) // may be unknown
	cmd.Env = append(os.Environ(), "KVMREPLICA_VM="+c.Of, "KVMREPLICA_TEST="+c.Name, "KVMREPLICA_TEST_UUID="+c.UUID,
		"KVMREPLICA_TEST_IP="+ip, "KVMREPLICA_TEST_CONSOLE="+m.console(c), "KVMREPLICA_POINT="+c.At.String())
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	text := strings.TrimSpace(string(out[:min(len(out), 300)]))
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", f[0], err, text)
	}
	return f[0] + " succeeded: " + text, nil
}

// address is where a copy can be reached: what was reserved for it, else what
// its agent says.
func (m *Manager) address(ctx context.Context, c Copy) (string, error) {
	for _, n := range c.NICs {
		if n.IP != "" {
			return n.IP, nil
		}
	}
	info, err := m.deps.Hyper.GuestInfo(ctx, c.UUID)
	if err != nil {
		return "", fmt.Errorf("ask the guest agent for the address: %w", err)
	}
	keys := make([]string, 0, len(info))
	for k := range info {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		if !strings.HasPrefix(k, "if.") || !strings.HasSuffix(k, ".addr") {
			continue
		}
		ip, err := netip.ParseAddr(info[k])
		if err == nil && !ip.IsLoopback() && !ip.IsLinkLocalUnicast() && !ip.IsUnspecified() && !ip.IsMulticast() {
			return ip.String(), nil
		}
	}
	return "", errors.New("the guest agent names no address")
}

// tail reads a console as it grows. What the guest writes is bounded here: the
// last part only is kept.
type tail struct {
	path string
	off  int64
	kept []byte
}

const keptConsole = 64 << 10

func (t *tail) find(text string) (string, error) {
	if err := t.read(); err != nil {
		return "", err
	}
	i := bytes.Index(t.kept, []byte(text))
	if i < 0 {
		return "", fmt.Errorf("the console does not show %q yet", text)
	}
	line := t.kept[bytes.LastIndexByte(t.kept[:i], '\n')+1:]
	if e := bytes.IndexAny(line, "\r\n"); e >= 0 {
		line = line[:e]
	}
	return fmt.Sprintf("the console shows %q", line[:min(len(line), 200)]), nil
}

func (t *tail) read() error {
	f, err := os.Open(t.path)
	if err != nil {
		return fmt.Errorf("read the console: %w", err)
	}
	defer f.Close()
	for {
		b := make([]byte, keptConsole)
		n, err := f.ReadAt(b, t.off)
		t.off += int64(n)
		t.kept = append(t.kept, b[:n]...)
		if len(t.kept) > 2*keptConsole {
			t.kept = t.kept[len(t.kept)-2*keptConsole:]
		}
		if errors.Is(err, io.EOF) || n == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the console: %w", err)
		}
	}
}
