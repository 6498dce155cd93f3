// Package micro runs a throw-away virtual machine: a kernel, microinit as
// process 1 and the programs a test wants to see on a kernel of their own. The
// test keeps the lead: it runs programs in the guest, writes files and talks
// to the guest's unix sockets, all over QEMU's user network.
//
// It guarantees that Boot returns when the guest answers, that Cut is a power
// cut (QEMU is killed, with the guest's page cache) and returns when QEMU is
// gone, and that nothing of a machine outlives Cut.
//
// The caller needs what guest.Custom needs, and must call Cut.
package micro

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"kvmreplica/integration/lab/guest"
	"kvmreplica/integration/lab/micro/ask"
	"kvmreplica/integration/lab/proxy"
)

// bootTime bounds a boot on a machine that has much else to do.
const bootTime = 5 * time.Minute

// Recipe adds to r what every micro machine needs.
func Recipe(r guest.Recipe) guest.Recipe {
	r.Init = "./integration/lab/micro/microinit"
	r.Modules = append([]string{"virtio_pci", "virtio_blk", "virtio-rng", "virtio_net"}, r.Modules...)
	r.Tools = maps.Clone(r.Tools)
	if r.Tools == nil {
		r.Tools = map[string]string{}
	}
	r.Tools["/bin/busybox"] = "busybox"
	return r
}

// Config describes one run of a machine.
type Config struct {
	Files guest.Files
	// Dir takes the console's file and sockets; keep its path short.
	Dir string
	// Disks are unix sockets of NBD servers, /dev/vda onwards.
	Disks []string
	// Load are modules to insert besides those every machine has.
	Load []string
	// MemoryMiB is 256 when 0.
	MemoryMiB int
}

// Machine is a running guest. Safe for concurrent use.
type Machine struct {
	cfg  Config
	cmd  *exec.Cmd
	ln   net.Listener
	idle chan net.Conn
	dead chan struct{} // closed when QEMU has ended

	mu       sync.Mutex
	forwards []*proxy.Proxy // guarded by mu
	count    int            // guarded by mu
	wg       sync.WaitGroup
}

// Console is the file with what the guest's kernel and microinit said.
func (c Config) Console() string { return filepath.Join(c.Dir, "console") }

// Boot starts a machine and waits until it answers.
func Boot(ctx context.Context, cfg Config) (*Machine, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	m := &Machine{cfg: cfg, ln: ln, idle: make(chan net.Conn, 1), dead: make(chan struct{})}
	m.cmd = exec.Command("qemu-system-x86_64", m.args()...)
	qemuLog, err := os.OpenFile(filepath.Join(cfg.Dir, "qemu.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	defer qemuLog.Close()
	m.cmd.Stdout, m.cmd.Stderr = qemuLog, qemuLog
	if err := m.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start QEMU: %w", err), ln.Close())
	}
	m.wg.Go(func() {
		_ = m.cmd.Wait() // killed, or a guest that gave up: the console tells
		close(m.dead)
		_ = ln.Close()
	})
	m.wg.Go(m.accept)
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	if _, err := m.Exec(ctx, "/bin/busybox", "true"); err != nil {
		m.Cut()
		return nil, fmt.Errorf("boot: %w\n%s", err, tail(cfg.Console()))
	}
	return m, nil
}

func (m *Machine) args() []string {
	memory := m.cfg.MemoryMiB
	if memory == 0 {
		memory = 256
	}
	load := append([]string{"virtio_pci", "virtio_blk", "virtio-rng", "virtio_net"}, m.cfg.Load...)
	port := m.ln.Addr().(*net.TCPAddr).Port
	a := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "pc", "-accel", "tcg", "-cpu", "max",
		"-m", fmt.Sprint(memory), "-smp", "1",
		"-kernel", m.cfg.Files.Kernel, "-initrd", m.cfg.Files.Initramfs,
		"-append", fmt.Sprintf("console=ttyS0 quiet panic=-1 no_timer_check mitigations=off edd=off micro.port=%d micro.load=%s", port, strings.Join(load, ",")),
		"-serial", "file:" + m.cfg.Console(),
		"-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile=",
		"-device", "virtio-rng-pci",
	}
	for i, s := range m.cfg.Disks {
		a = append(a,
			"-blockdev", fmt.Sprintf("driver=nbd,node-name=d%d,server.type=unix,server.path=%s,cache.direct=on,cache.no-flush=off,discard=unmap", i, s),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d,write-cache=on", i))
	}
	return a
}

// accept takes the guest's connections until the machine ends.
func (m *Machine) accept() {
	for {
		c, err := m.ln.Accept()
		if err != nil {
			return
		}
		select {
		case m.idle <- c:
		case <-m.dead:
			_ = c.Close()
			return
		}
	}
}

// ask sends a request over a fresh connection and reads the reply.
func (m *Machine) ask(ctx context.Context, q ask.Request) (net.Conn, *bufio.Reader, ask.Reply, error) {
	var a ask.Reply
	var c net.Conn
	select {
	case c = <-m.idle:
	case <-m.dead:
		return nil, nil, a, errors.New("the machine is off")
	case <-ctx.Done():
		return nil, nil, a, fmt.Errorf("the guest does not answer: %w", ctx.Err())
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	line, err := json.Marshal(q)
	if err == nil {
		_, err = c.Write(append(line, '\n'))
	}
	r := bufio.NewReaderSize(c, 64<<10)
	var b []byte
	if err == nil {
		b, err = r.ReadBytes('\n')
	}
	if err == nil {
		err = json.Unmarshal(b, &a)
	}
	if err == nil && a.Error != "" {
		err = fmt.Errorf("%s: %s", a.Error, strings.TrimSpace(a.Output))
	}
	if err != nil {
		return nil, nil, a, errors.Join(err, c.Close())
	}
	return c, r, a, nil
}

// Exec runs a program in the guest to its end and returns what it wrote.
func (m *Machine) Exec(ctx context.Context, argv ...string) (string, error) {
	c, _, a, err := m.ask(ctx, ask.Request{Exec: argv})
	if err != nil {
		return a.Output, fmt.Errorf("in the guest: %s: %w", strings.Join(argv, " "), err)
	}
	return a.Output, c.Close()
}

// Put writes a file in the guest, making the directories above it.
func (m *Machine) Put(ctx context.Context, path string, data []byte, mode os.FileMode) error {
	c, _, _, err := m.ask(ctx, ask.Request{Put: path, Data: data, Mode: uint32(mode)})
	if err != nil {
		return fmt.Errorf("write %s in the guest: %w", path, err)
	}
	return c.Close()
}

// Load inserts a kernel module and what it needs.
func (m *Machine) Load(ctx context.Context, module string) error {
	c, _, _, err := m.ask(ctx, ask.Request{Load: module})
	if err != nil {
		return fmt.Errorf("module %s: %w", module, err)
	}
	return c.Close()
}

// Dial connects to a unix socket in the guest.
func (m *Machine) Dial(ctx context.Context, path string) (net.Conn, error) {
	c, r, _, err := m.ask(ctx, ask.Request{Dial: path})
	if err != nil {
		return nil, fmt.Errorf("dial %s in the guest: %w", path, err)
	}
	return &joined{c, r}, nil
}

// joined is a connection whose first bytes may be buffered.
type joined struct {
	net.Conn
	r io.Reader
}

func (j *joined) Read(p []byte) (int, error) { return j.r.Read(p) }

// CloseWrite ends our direction; the guest takes that as the end of both.
func (j *joined) CloseWrite() error { return j.Conn.(*net.TCPConn).CloseWrite() }

// Forward makes a unix socket on this machine whose connections lead to a unix
// socket in the guest. It lives as long as the machine.
func (m *Machine) Forward(path string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count++
	at := filepath.Join(m.cfg.Dir, fmt.Sprintf("f%d", m.count))
	_ = os.Remove(at)
	ln, err := net.Listen("unix", at)
	if err != nil {
		return "", err
	}
	m.forwards = append(m.forwards, proxy.Serve(ln, func(ctx context.Context) (net.Conn, error) { return m.Dial(ctx, path) }))
	return at, nil
}

// Cut ends the machine as a power cut does.
func (m *Machine) Cut() {
	_ = m.cmd.Process.Kill() // gone already is fine, too
	<-m.dead
	m.mu.Lock()
	forwards := slices.Clone(m.forwards)
	m.forwards = nil
	m.mu.Unlock()
	for _, f := range forwards {
		_ = f.Close() // its connections are broken
	}
	m.wg.Wait()
	select {
	case c := <-m.idle:
		_ = c.Close()
	default:
	}
}

// tail quotes the end of a console.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}
