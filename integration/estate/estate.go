// Package estate puts the product onto the lab's two hosts: configuration,
// hook, a daemon on each, both paired, and a guest that writes records. Tests
// and the demonstration steer it only as a person would, with replicactl and
// virsh.
//
// Callers must be root, must have built the programs (Binaries finds them) and
// must call Down.
package estate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/status"
)

// Port the daemons listen on.
const Port = 7878

// Options change how an estate is made; the zero value suits tests.
type Options struct {
	Lab lab.Options
	// Config is added to both hosts' replicad.toml, before its tables.
	Config string
	// Tools are further programs of this machine in the guest: where to put
	// each, and its name in PATH.
	Tools map[string]string
}

// Estate is two paired hosts.
type Estate struct {
	Lab     *lab.Lab
	Files   guest.Files
	daemons map[string]*lab.Daemon
	bin     string
	opts    Options
}

// Up makes the lab in dir, starts a daemon on each host and pairs them.
func Up(ctx context.Context, dir string, o Options) (*Estate, error) {
	bin, err := Binaries(ctx)
	if err != nil {
		return nil, err
	}
	files, err := guest.BuildWith(ctx, o.Tools)
	if err != nil {
		return nil, fmt.Errorf("build the guest: %w", err)
	}
	o.Lab.Boot = append(o.Lab.Boot, files.List()...)
	l, err := lab.Up(ctx, dir, o.Lab)
	if err != nil {
		return nil, err
	}
	e := &Estate{Lab: l, Files: files, daemons: map[string]*lab.Daemon{}, bin: bin, opts: o}
	for _, h := range l.Hosts() {
		if err := e.prepare(h); err != nil {
			return nil, errors.Join(err, l.Down())
		}
		// libvirtd looks for hooks only when it starts.
		if err := errors.Join(h.Crash(), h.Start(ctx)); err != nil {
			return nil, errors.Join(err, l.Down())
		}
		if err := e.StartDaemon(ctx, h.Name()); err != nil {
			return nil, errors.Join(err, l.Down())
		}
	}
	if err := e.pair(ctx); err != nil {
		return nil, errors.Join(err, l.Down())
	}
	return e, nil
}

// Down ends everything.
func (e *Estate) Down() error { return e.Lab.Down() }

// Binaries builds the programs into the cache and returns their directory.
func Binaries(ctx context.Context) (string, error) {
	root, err := lab.RepoRoot()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, "bin")
	for _, p := range []string{"replicad", "replicactl", "replicafsck"} {
		if err := lab.Build(ctx, filepath.Join(dir, p), "./cmd/"+p); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// hostDirs of a host: storage is below /var/lib/libvirt so that QEMU's user
// reaches it wherever the distribution allows images.
const storageRoot = "/var/lib/libvirt/replicas"

func (e *Estate) prepare(h *lab.Host) error {
	root, err := lab.RepoRoot()
	if err != nil {
		return err
	}
	hook, err := os.ReadFile(filepath.Join(root, "packaging/hooks/kvmreplica"))
	if err != nil {
		return err
	}
	label := libvirt.KernelLabel(filepath.Join(guest.BootDir, filepath.Base(e.Files.Kernel)), filepath.Join(guest.BootDir, filepath.Base(e.Files.Initramfs)))
	conf := fmt.Sprintf(`host_name = "kvm-%s"
listen = "%s:%d"
receiving = true
storage_roots = [%q]
log_level = "debug"
%s
[limits]
free_space_reserve = "0"

[domain]
type = "qemu"
console_dir = "/var/log/libvirt/qemu"
[domain.kernels.%q]
kernel = %q
initrd = %q
`, strings.ToLower(h.Name()), h.IP(), Port, storageRoot, e.opts.Config, label,
		filepath.Join(guest.BootDir, filepath.Base(e.Files.Kernel)), filepath.Join(guest.BootDir, filepath.Base(e.Files.Initramfs)))
	return errors.Join(
		h.PutFile("/etc/replicad/replicad.toml", []byte(conf), 0o600),
		h.PutFile("/etc/libvirt/hooks/qemu.d/kvmreplica", hook, 0o755),
	)
}

// StartDaemon starts a host's replicad, with additions to its environment, and
// waits until it answers.
func (e *Estate) StartDaemon(ctx context.Context, host string, env ...string) error {
	h := e.Lab.Host(host)
	d, err := h.StartDaemon(filepath.Join(e.bin, "replicad"), nil, env)
	if err != nil {
		return err
	}
	e.daemons[host] = d
	return e.wait(ctx, host, d)
}

func (e *Estate) wait(ctx context.Context, host string, d *lab.Daemon) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := e.Ctl(ctx, host, "--json", "vm", "list"); err == nil {
			return nil
		}
		select {
		case <-d.Done():
			log, _ := os.ReadFile(d.LogPath)
			return fmt.Errorf("replicad on host %s ended: %w\n%s", host, d.Err(), log)
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// Daemon is a host's replicad process.
func (e *Estate) Daemon(host string) *lab.Daemon { return e.daemons[host] }

// Ctl runs replicactl on a host and returns what it printed.
func (e *Estate) Ctl(ctx context.Context, host string, args ...string) (string, error) {
	cmd := e.Lab.Host(host).Command(ctx, filepath.Join(e.bin, "replicactl"), args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		var ee *exec.ExitError
		if errors.As(err, &ee) {
			return string(out), &CtlError{Host: host, Args: args, Code: ee.ExitCode(), Output: string(out)}
		}
		return string(out), err
	}
	return string(out), nil
}

// CtlError is a replicactl that did not succeed.
type CtlError struct {
	Host   string
	Args   []string
	Code   int
	Output string
}

func (e *CtlError) Error() string {
	return fmt.Sprintf("replicactl %s on host %s: exit %d:\n%s", strings.Join(e.Args, " "), e.Host, e.Code, e.Output)
}

func (e *Estate) pair(ctx context.Context) error {
	out, err := e.Ctl(ctx, "A", "--json", "peer", "invite", "--may-send")
	if err != nil {
		return err
	}
	var inv struct{ Code, Address string }
	if err := json.Unmarshal([]byte(out), &inv); err != nil {
		return fmt.Errorf("read the invitation: %w\n%s", err, out)
	}
	_, err = e.Ctl(ctx, "B", "peer", "join", fmt.Sprintf("%s:%d", e.Lab.Host("A").IP(), Port), inv.Code, "--may-send")
	return err
}

// Peer is a host's name as the other one knows it.
func Peer(host string) string { return "kvm-" + strings.ToLower(host) }

// Status is what a host says of a VM.
func (e *Estate) Status(ctx context.Context, host, vm string) (status.VM, error) {
	var v status.VM
	out, err := e.Ctl(ctx, host, "--json", "vm", "status", vm)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal([]byte(out), &v)
}

// WaitStatus asks until the answer satisfies want; what names it in errors.
func (e *Estate) WaitStatus(ctx context.Context, host, vm, what string, want func(status.VM) bool) (status.VM, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var last status.VM
	for {
		v, err := e.Status(ctx, host, vm)
		if err == nil && want(v) {
			return v, nil
		}
		if err == nil {
			last = v
		}
		select {
		case <-ctx.Done():
			v = last
			return v, fmt.Errorf("wait on host %s for %s to be %s: %w; last: state %s health %s because %q (%v)", host, vm, what, ctx.Err(), v.State, v.Health, v.Reason, err)
		case <-tick.C:
		}
	}
}

// Define defines a guest on a host.
func (e *Estate) Define(ctx context.Context, host string, d guest.Domain) error {
	text, err := d.XML()
	if err != nil {
		return err
	}
	h := e.Lab.Host(host)
	file := "/etc/libvirt/" + d.Name + ".xml"
	if err := h.PutFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	_, err = h.Virsh(ctx, "define", file)
	return err
}

// Console follows a guest's console on a host from its present end. On the
// host where the domain was rendered by the product the file has its UUID's
// name.
func (e *Estate) Console(host string, d guest.Domain, rendered bool) (*console.Console, error) {
	p := d.ConsoleFile()
	if rendered {
		p = "/var/log/libvirt/qemu/" + d.UUID + ".log"
	}
	return console.OpenAtEnd(e.Lab.Host(host).Path(p))
}
