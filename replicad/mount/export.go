package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/internal/block"
)

// Format of the files an export writes.
type Format string

// The formats.
const (
	Raw   Format = "raw"
	Qcow2 Format = "qcow2"
)

// ParseFormat reads a format's name; empty means raw.
func ParseFormat(s string) (Format, error) {
	switch f := Format(s); f {
	case "":
		return Raw, nil
	case Raw, Qcow2:
		return f, nil
	}
	return "", fmt.Errorf("unknown format %.32q", s)
}

// Errors of an export. Test with errors.Is.
var (
	// ErrExists: a file would have been overwritten.
	ErrExists = errors.New("the file exists")
	// ErrNoTool: qemu-img is not installed.
	ErrNoTool = errors.New("qemu-img is not installed")
	// ErrNoRoom: the file system is full.
	ErrNoRoom = errors.New("no space for the export")
	// ErrBusy: another export writes the same file.
	ErrBusy = errors.New("another export writes this file")
)

// Progress is how far an export has come, over all disks.
type Progress struct {
	Disk        string
	Done, Total int64
}

// partSuffix marks a file that is being written. What a killed export left is
// written anew by the next one to the same file.
const partSuffix = ".replica-part"

// Files names what an export of disks to the absolute path to writes: to itself
// for one disk, DIR/VM-DISK.FORMAT in a directory. None of them may exist.
func Files(to, vm string, disks []string, f Format) ([]string, error) {
	if !filepath.IsAbs(to) || len(to) > 4000 {
		return nil, fmt.Errorf("%.200q is no absolute path", to)
	}
	var out []string
	switch st, err := os.Stat(to); {
	case err == nil && st.IsDir():
		for _, d := range disks {
			out = append(out, filepath.Join(to, vm+"-"+d+"."+string(f)))
		}
	case err == nil:
		return nil, fmt.Errorf("%s: %w", to, ErrExists)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	case len(disks) > 1:
		return nil, fmt.Errorf("the VM has %d disks: %s must be a directory that exists", len(disks), to)
	default:
		if st, err := os.Stat(filepath.Dir(to)); err != nil || !st.IsDir() {
			return nil, fmt.Errorf("%s is no directory that exists", filepath.Dir(to))
		}
		out = []string{to}
	}
	for _, p := range out {
		if _, err := os.Lstat(p); err == nil {
			return nil, fmt.Errorf("%s: %w", p, ErrExists)
		}
	}
	return out, nil
}

// Export writes each disk of the mount into its file, sparse. Either all files
// are there in the end, durable, or none; an existing one is never touched.
func (m *Mount) Export(ctx context.Context, files []string, f Format, progress func(Progress)) error {
	var total, done int64
	for _, d := range m.disks {
		total += d.Device.Size()
	}
	var parts []*part
	defer func() {
		for _, p := range parts {
			p.drop()
		}
	}()
	for i, d := range m.disks {
		p, err := newPart(files[i])
		if err != nil {
			return err
		}
		parts = append(parts, p)
		note := func(n int64) {
			if progress != nil {
				progress(Progress{Disk: d.Name, Done: done + n, Total: total})
			}
		}
		if f == Qcow2 {
			err = m.convert(ctx, d, p)
		} else {
			err = block.Copy(ctx, p.file, d.Device, note)
		}
		if err != nil {
			return roomError(fmt.Errorf("export disk %s to %s: %w", d.Name, files[i], err))
		}
		done += d.Device.Size()
		note(0)
	}
	for i, p := range parts {
		if err := p.keep(); err != nil {
			for _, q := range parts[:i] {
				err = errors.Join(err, os.Remove(q.path))
			}
			return roomError(err)
		}
	}
	return nil
}

func roomError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || strings.Contains(err.Error(), "No space left") {
		return fmt.Errorf("%w: %w", ErrNoRoom, err)
	}
	return err
}

// part is a file while it is written.
type part struct {
	path string
	file *os.File
	kept bool
}

func newPart(path string) (*part, error) {
	f, err := os.OpenFile(path+partSuffix, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("write the export: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, ErrBusy), f.Close())
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &part{path: path, file: f}, nil
}

// drop removes what was not kept.
func (p *part) drop() {
	if !p.kept {
		_ = os.Remove(p.path + partSuffix) // found and overwritten by the next try
	}
	_ = p.file.Close() // synced before, or of no use
}

// keep makes the file durable under its name, unless that exists by now.
func (p *part) keep() error {
	if err := p.file.Sync(); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, p.path+partSuffix, unix.AT_FDCWD, p.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%s: %w", p.path, ErrExists)
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // file systems without it
		if err = os.Link(p.path+partSuffix, p.path); err == nil {
			err = os.Remove(p.path + partSuffix)
		}
	}
	if err != nil {
		return fmt.Errorf("name the export %s: %w", p.path, err)
	}
	p.kept = true
	d, err := os.Open(filepath.Dir(p.path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// toolStop is how long qemu-img may take to end when it is told to.
const toolStop = 10 * time.Second

// convert lets qemu-img write a qcow2 file from the mount's own export.
func (m *Mount) convert(ctx context.Context, d Disk, p *part) error {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoTool, err)
	}
	cmd := exec.CommandContext(ctx, tool, "convert", "-f", "raw", "-O", string(Qcow2), m.URI(d.Name), p.path+partSuffix)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = toolStop
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	runtime.LockOSThread() // the kill at our death is bound to the thread
	defer runtime.UnlockOSThread()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("qemu-img: %w: %s", err, strings.TrimSpace(out.String()))
	}
	// qemu-img may have replaced the file: what counts is what has the name.
	f, err := os.OpenFile(p.path+partSuffix, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_ = p.file.Close() // nothing was written through it
	p.file = f
	return nil
}
