package lab

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Options change how a lab is made; the zero value suits tests.
type Options struct {
	// NonRootQEMU names the hosts whose QEMU runs as libvirt-qemu with
	// dynamic ownership, as distributions ship it. The others run it as root.
	NonRootQEMU []string
	// Keep lets the hosts outlive the calling process; Open finds them again.
	Keep bool
	// Helper is a built kvmlab command; empty builds one into the cache.
	Helper string
	// Boot lists files (a kernel, an initramfs) copied to
	// /var/lib/libvirt/boot of both hosts, by their base names.
	Boot []string
	// NoLibvirt starts the hosts without libvirtd.
	NoLibvirt bool
}

func (o Options) nonRoot(host string) bool { return slices.Contains(o.NonRootQEMU, host) }

// Lab is two hosts and the switch between them.
type Lab struct {
	dir    string
	opts   Options
	helper string
	wire   *Host
	hosts  map[string]*Host
	life   *os.File // writing end, kept open while this process lives; see Options.Keep
	lifeR  *os.File // its reading end, handed to each host
}

// Names of the hosts.
var hostNames = []string{"A", "B"}

// downTimeout bounds the wait for the last process of a host.
const downTimeout = 20 * time.Second

// Up makes a lab in dir, which it creates when missing. A lab left there by an
// earlier run is taken down first, its hosts' files removed.
func Up(ctx context.Context, dir string, opts Options) (*Lab, error) {
	if missing := Missing(); len(missing) > 0 {
		return nil, fmt.Errorf("lab: not on this machine: %v (run: make deps)", missing)
	}
	l, err := newLab(dir, opts)
	if err != nil {
		return nil, err
	}
	if err := l.clear(); err != nil {
		return nil, fmt.Errorf("lab: remove an earlier lab in %s: %w", dir, err)
	}
	if l.helper, err = l.findHelper(ctx); err != nil {
		return nil, err
	}
	if err := l.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("lab: %w", err), l.Down())
	}
	return l, nil
}

// Open finds a running lab that Up made with Options.Keep.
func Open(dir string) (*Lab, error) {
	l, err := newLab(dir, Options{Keep: true})
	if err != nil {
		return nil, err
	}
	s, err := l.load()
	if err != nil {
		return nil, fmt.Errorf("lab: no lab in %s (run: kvmlab up %s): %w", dir, dir, err)
	}
	l.opts, l.helper = s.Options, s.Helper
	l.opts.Keep = true
	for _, h := range l.all() {
		h.proc = s.Procs[h.name]
	}
	return l, nil
}

func newLab(dir string, opts Options) (*Lab, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	l := &Lab{dir: abs, opts: opts, hosts: map[string]*Host{}}
	l.wire = &Host{lab: l, name: wireName, dir: filepath.Join(abs, wireName)}
	for i, n := range hostNames {
		l.hosts[n] = &Host{lab: l, name: n, index: i + 1, dir: filepath.Join(abs, n)}
	}
	return l, nil
}

func (l *Lab) start(ctx context.Context) error {
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	if err := l.wire.Start(ctx); err != nil {
		return err
	}
	for _, n := range hostNames {
		if err := l.hosts[n].Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Host returns host "A" or "B".
func (l *Lab) Host(name string) *Host { return l.hosts[name] }

// Hosts returns A and B.
func (l *Lab) Hosts() []*Host { return []*Host{l.hosts["A"], l.hosts["B"]} }

// Dir is the lab's directory.
func (l *Lab) Dir() string { return l.dir }

func (l *Lab) all() []*Host { return append(l.Hosts(), l.wire) }

// Down ends every process of both hosts, waits for them, and removes their
// files. Twice is harmless.
func (l *Lab) Down() error {
	var errs []error
	for _, h := range l.all() {
		errs = append(errs, h.Crash())
	}
	if l.life != nil {
		errs = append(errs, l.life.Close())
		l.life = nil
	}
	errs = append(errs, l.removeFiles())
	return errors.Join(errs...)
}

func (l *Lab) removeFiles() error {
	var errs []error
	for _, h := range l.all() {
		errs = append(errs, os.RemoveAll(h.dir))
	}
	if err := os.Remove(l.statePath()); !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// clear takes down what an earlier process left in the directory.
func (l *Lab) clear() error {
	s, err := l.load()
	if errors.Is(err, fs.ErrNotExist) {
		return l.removeFiles()
	}
	if err != nil {
		return err
	}
	for _, p := range s.Procs {
		if err := p.kill(downTimeout); err != nil {
			return err
		}
	}
	return l.removeFiles()
}

// state is what Open and clear need to know; it lies in the lab's directory.
type state struct {
	Helper  string
	Options Options
	Procs   map[string]process
}

func (l *Lab) statePath() string { return filepath.Join(l.dir, "lab.json") }

func (l *Lab) load() (state, error) {
	var s state
	text, err := os.ReadFile(l.statePath())
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(text, &s)
}

func (l *Lab) save() error {
	s := state{Helper: l.helper, Options: l.opts, Procs: map[string]process{}}
	for _, h := range l.all() {
		s.Procs[h.name] = h.proc
	}
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	tmp := l.statePath() + ".new"
	if err := os.WriteFile(tmp, text, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, l.statePath())
}

// uuidOf derives a stable UUID from the lab's directory and a word.
func (l *Lab) uuidOf(word string) string {
	s := sha256.Sum256([]byte(l.dir + "\x00" + word))
	s[6], s[8] = s[6]&0x0f|0x40, s[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", s[:4], s[4:6], s[6:8], s[8:10], s[10:16])
}
