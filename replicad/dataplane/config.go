package dataplane

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/wire"
)

// Kind says how a disk's real storage is reached.
type Kind string

// The kinds.
const (
	Raw   Kind = "raw"   // a plain file
	Block Kind = "block" // a block device
	NBD   Kind = "nbd"   // another NBD server, by URI
)

// DiskConfig is one disk of the VM.
type DiskConfig struct {
	Name     wire.DiskName `json:"name"`
	Kind     Kind          `json:"kind"`
	Path     string        `json:"path,omitempty"` // raw, block
	URI      string        `json:"uri,omitempty"`  // nbd: nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME
	Size     int64         `json:"size,omitempty"` // 0 = as found; else the image must have as much, and more is taken up
	ReadOnly bool          `json:"read_only,omitempty"`
	// Overlay is the sparse file that holds the guest's writes while
	// Config.Overlay is set.
	Overlay string `json:"overlay,omitempty"`
	// QemuLock takes QEMU's own lock bytes when the image is opened. Leave it
	// false while QEMU still holds the image; LockQEMU takes them later and the
	// choice is remembered.
	QemuLock bool `json:"qemu_lock,omitempty"`
}

// Config is everything the keeper and the data plane of one VM need. It is a
// file in RunDir; Ensure writes it.
type Config struct {
	VM    wire.VMID    `json:"vm"`
	Name  string       `json:"name"`
	Disks []DiskConfig `json:"disks"`
	// StateDir holds the tracker and the durable choices; it survives reboots.
	StateDir string `json:"state_dir"`
	// SharedDir is boot-scoped memory (tmpfs) for the exact bitmaps.
	SharedDir string `json:"shared_dir"`
	// RunDir holds the sockets, pid files and the log; tmpfs is right.
	RunDir string `json:"run_dir"`
	// BootID distinguishes boots; empty reads the kernel's.
	BootID string `json:"boot_id,omitempty"`
	// SocketUID and SocketGID own the NBD socket (QEMU's user); nil keeps ours.
	SocketUID *int `json:"socket_uid,omitempty"`
	SocketGID *int `json:"socket_gid,omitempty"`
	// SocketMode of the NBD socket; 0 means 0660.
	SocketMode uint32 `json:"socket_mode,omitempty"`
	// CaptureBytes bounds the memory that copy-before-write may use; 0 = 64 MiB.
	CaptureBytes int64 `json:"capture_bytes,omitempty"`
	// Idle is how long the tracker keeps a clean region marked; 0 = 5 minutes
	// and 5 epochs, negative = not at all, which costs a sync for every region
	// that is written to again.
	Idle time.Duration `json:"idle,omitempty"`
	// AnyClient lets every process that may open the socket write, not only the
	// QEMU of VM.
	AnyClient bool `json:"any_client,omitempty"`
	// DirtyBytes bounds the guest data per disk that the kernel may hold
	// unwritten; 0 = 64 MiB.
	DirtyBytes int64 `json:"dirty_bytes,omitempty"`
	// Overlay puts the guest's writes beside the images: the VM was failed over
	// and that is not final yet. Nil = the images are the disks.
	Overlay *OverlayConfig `json:"overlay,omitempty"`
	// Hysteresis and other tracker knobs are added here as they are needed.

	// Binary is the program that knows the verbs keeper and dataplane; empty is
	// the running one.
	Binary string `json:"binary,omitempty"`
	// Launcher is put before the keeper's command line, e.g. systemd-run --scope.
	Launcher []string `json:"launcher,omitempty"`
	// Verbose logs at debug level.
	Verbose bool `json:"verbose,omitempty"`
}

// maxConfig bounds a configuration file.
const maxConfig = 1 << 20

// DefaultCaptureBytes is used when CaptureBytes is 0.
const DefaultCaptureBytes = 64 << 20

var diskName = regexp.MustCompile(`^[a-z][a-z0-9]{0,15}$`)

// NBDSocket is the path QEMU connects to.
func (c Config) NBDSocket() string { return filepath.Join(c.RunDir, "nbd.sock") }

// ControlSocket is the path Client connects to.
func (c Config) ControlSocket() string { return filepath.Join(c.RunDir, "control.sock") }

func (c Config) configFile() string  { return filepath.Join(c.RunDir, "config.json") }
func (c Config) launchFile() string  { return filepath.Join(c.RunDir, "launch.lock") }
func (c Config) keeperPID() string   { return filepath.Join(c.RunDir, "keeper.pid") }
func (c Config) planePID() string    { return filepath.Join(c.RunDir, "dataplane.pid") }
func (c Config) logFile() string     { return filepath.Join(c.RunDir, "dataplane.log") }
func (c Config) drainedFile() string { return filepath.Join(c.RunDir, "drained") }
func (c Config) readyFile() string   { return filepath.Join(c.RunDir, "ready") }
func (c Config) failureFile() string { return filepath.Join(c.RunDir, "failure.json") }

// Validate reports every defect at once.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if c.VM == "" {
		bad("vm is empty")
	}
	for _, d := range []struct{ name, path string }{
		{"state_dir", c.StateDir}, {"shared_dir", c.SharedDir}, {"run_dir", c.RunDir},
	} {
		if !filepath.IsAbs(d.path) {
			bad("%s %q is not an absolute path", d.name, d.path)
		}
	}
	// sun_path has 108 bytes with its final NUL.
	if n := len(c.ControlSocket()) + len(".new"); n > 107 {
		bad("run_dir %q is too long for a unix socket: %d bytes with the socket's name, 107 fit", c.RunDir, n)
	}
	if c.CaptureBytes < 0 || c.DirtyBytes < 0 {
		bad("capture_bytes or dirty_bytes is negative")
	}
	if len(c.Disks) == 0 || len(c.Disks) > maxDisks {
		bad("%d disks; 1 to %d are possible", len(c.Disks), maxDisks)
	}
	if o := c.Overlay; o != nil {
		if !filepath.IsAbs(o.Dir) || !filepath.IsAbs(o.Store) || o.Rate < 0 {
			bad("overlay: directories %q and %q must be absolute, rate %d not negative", o.Dir, o.Store, o.Rate)
		}
		for _, d := range c.Disks {
			if !filepath.IsAbs(d.Overlay) {
				bad("disk %s: overlay file %q is not an absolute path", d.Name, d.Overlay)
			}
		}
	}
	seen := map[wire.DiskName]bool{}
	all := c.Disks
	if c.Overlay != nil {
		all = slices.Concat(all, c.Overlay.Aside)
	}
	for _, d := range all {
		if err := d.validate(); err != nil {
			errs = append(errs, err)
		}
		if seen[d.Name] {
			bad("disk %q is named twice", d.Name)
		}
		seen[d.Name] = true
	}
	return errors.Join(errs...)
}

// maxDisks bounds one VM.
const maxDisks = 64

func (d DiskConfig) validate() error {
	switch {
	case !diskName.MatchString(string(d.Name)):
		return fmt.Errorf("disk name %q is not a target name like vda", d.Name)
	case d.Size < 0 || d.Size%512 != 0:
		return fmt.Errorf("disk %s: size %d is not a multiple of 512", d.Name, d.Size)
	case d.Kind == NBD && d.URI == "":
		return fmt.Errorf("disk %s: kind nbd needs a uri", d.Name)
	case (d.Kind == Raw || d.Kind == Block) && !filepath.IsAbs(d.Path):
		return fmt.Errorf("disk %s: path %q is not absolute", d.Name, d.Path)
	case d.Kind != NBD && d.Kind != Raw && d.Kind != Block:
		return fmt.Errorf("disk %s: kind %q is not raw, block or nbd", d.Name, d.Kind)
	}
	return nil
}

// LoadConfig reads and validates a configuration file.
func LoadConfig(path string) (Config, error) {
	var c Config
	dir, err := fsx.OS(filepath.Dir(path))
	if err != nil {
		return c, fmt.Errorf("read the data plane's configuration: %w", err)
	}
	b, err := fsx.ReadFile(dir, filepath.Base(path), maxConfig)
	if err != nil {
		return c, fmt.Errorf("read the data plane's configuration: %w", err)
	}
	if b, err = fsx.CheckJSON(b); err != nil {
		return c, fmt.Errorf("read %s: %w", path, err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return c, fmt.Errorf("read %s: %w", path, err)
	}
	if err := c.Validate(); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// save writes the configuration for a keeper to find.
func (c Config) save() error {
	b, err := fsx.EncodeJSON(c)
	if err != nil {
		return err
	}
	return replaceFile(c.configFile(), b, 0o600)
}

// replaceFile is an atomic replacement in boot-scoped directories; nothing of
// it needs to survive a power cut.
func replaceFile(path string, b []byte, mode os.FileMode) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
