package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kvmreplica/integration/lab"
)

// Files are the two files a guest boots from.
type Files struct {
	// Kernel and Initramfs are paths of this machine.
	Kernel, Initramfs string
	// Init is the static labinit program, for images that carry their own.
	Init string
}

// List returns the files to put where QEMU shall find them; see
// lab.Options.Boot.
func (f Files) List() []string { return []string{f.Kernel, f.Initramfs} }

// modules of the guest; what they depend on is added.
func modules() []string {
	return []string{
		"virtio_pci", "virtio_blk", "virtio-rng", "button", "evdev",
		"virtio_console", "virtio_net", "virtio_scsi", "sd_mod", "nbd",
	}
}

// Build makes the guest's files, or finds them in the cache.
func Build(ctx context.Context) (Files, error) { return BuildWith(ctx, nil) }

// BuildWith is Build with further programs of this machine, with their
// libraries, in the initramfs: where to put each, and its name in PATH.
func BuildWith(ctx context.Context, tools map[string]string) (Files, error) {
	cache, err := lab.CacheDir()
	if err != nil {
		return Files{}, err
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return Files{}, err
	}
	defer unlock()
	k, err := fetchKernel(ctx, cache)
	if err != nil {
		return Files{}, fmt.Errorf("guest kernel: %w", err)
	}
	initBin := filepath.Join(cache, "labinit")
	if err := lab.Build(ctx, initBin, "./integration/lab/guest/labinit"); err != nil {
		return Files{}, err
	}
	archive, err := initramfs(k, initBin, tools)
	if err != nil {
		return Files{}, fmt.Errorf("guest initramfs: %w", err)
	}
	program, err := os.ReadFile(initBin)
	if err != nil {
		return Files{}, err
	}
	f := Files{Kernel: k.image}
	prefix := "initramfs-"
	if len(tools) > 0 {
		prefix = "with-initramfs-" // neither kind removes the other
	}
	if f.Initramfs, err = keep(cache, prefix, archive, 0o644); err != nil {
		return Files{}, err
	}
	f.Init, err = keep(cache, "init-", program, 0o755)
	return f, err
}

// initramfs gathers everything the guest runs.
func initramfs(k kernel, initBin string, tools map[string]string) ([]byte, error) {
	t := newTree()
	t.file("/init", initBin, 0o755)
	if err := errors.Join(t.userland(), t.programs(tools)); err != nil {
		return nil, err
	}
	order, err := k.order(modules())
	if err != nil {
		return nil, err
	}
	var names bytes.Buffer
	for _, path := range order {
		t.file("/mod/"+filepath.Base(path), path, 0o644)
		fmt.Fprintln(&names, filepath.Base(path))
	}
	t.content("/mod/order", names.Bytes(), 0o644)
	return t.archive()
}

// keep stores content under a name made of its digest.
func keep(cache, prefix string, content []byte, mode os.FileMode) (string, error) {
	sum := sha256.Sum256(content)
	out := filepath.Join(cache, prefix+hex.EncodeToString(sum[:6]))
	if _, err := os.Stat(out); err == nil {
		return out, nil
	}
	old, err := filepath.Glob(filepath.Join(cache, prefix+"*"))
	if err != nil {
		return "", err
	}
	part := filepath.Join(cache, "part-"+filepath.Base(out))
	if err := os.WriteFile(part, content, mode); err != nil {
		return "", err
	}
	if err := os.Rename(part, out); err != nil {
		return "", err
	}
	// Of the earlier ones the newest stays: somebody may be using it.
	for i, o := range byAge(old) {
		if i > 0 {
			_ = os.Remove(o)
		}
	}
	return out, nil
}

// lock serialises the builds of all processes on this machine.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return func() { _ = f.Close() }, nil // closing ends the lock
}
