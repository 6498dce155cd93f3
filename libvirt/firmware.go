package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Caps of firmware state; larger files are refused.
const (
	MaxNVRAM = 4 << 20
	MaxTPM   = 16 << 20
)

// FirmwareState is what a guest keeps outside its disks. A nil slice means
// that the domain has no such thing; the contents are opaque.
type FirmwareState struct {
	NVRAM []byte
	TPM   []byte // permanent state only
}

// FirmwarePaths are the files of FirmwareState; empty means none.
type FirmwarePaths struct {
	NVRAM, TPM string
}

// FirmwarePaths says where a domain of this host keeps firmware state. stateDir
// is libvirt's, "/var/lib/libvirt" when empty. An encrypted or passed-through
// TPM is an error: its state cannot leave the host.
func (d *Domain) FirmwarePaths(stateDir string) (FirmwarePaths, error) {
	if stateDir == "" {
		stateDir = "/var/lib/libvirt"
	}
	p := FirmwarePaths{NVRAM: d.Firmware.NVRAM}
	if p.NVRAM == "" && d.Firmware.Class == "uefi" {
		p.NVRAM = filepath.Join(stateDir, "qemu", "nvram", d.Name+"_VARS.fd")
	}
	if t := d.TPM; t != nil {
		switch {
		case t.Passthrough:
			return p, errors.New("the TPM is the host's own (passthrough); its state cannot be copied; use <backend type='emulator'>")
		case t.Encrypted:
			return p, errors.New("the TPM's state is encrypted with a secret of this host; define the same secret on the replica and remove <encryption>, or exclude the TPM")
		case t.Version == "1.2":
			p.TPM = filepath.Join(stateDir, "swtpm", d.UUID, "tpm1.2", "tpm-00.permall")
		default:
			p.TPM = filepath.Join(stateDir, "swtpm", d.UUID, "tpm2", "tpm2-00.permall")
		}
	}
	return p, nil
}

// ReadFirmware reads the files; one that does not exist yet is nil content.
func ReadFirmware(p FirmwarePaths) (FirmwareState, error) {
	var s FirmwareState
	var err error
	if s.NVRAM, err = readCapped(p.NVRAM, MaxNVRAM); err != nil {
		return s, fmt.Errorf("read NVRAM: %w", err)
	}
	if s.TPM, err = readCapped(p.TPM, MaxTPM); err != nil {
		return s, fmt.Errorf("read TPM state: %w", err)
	}
	return s, nil
}

// Firmware reads a domain's firmware state. stateDir as in FirmwarePaths.
func (h *Host) Firmware(ctx context.Context, uuid, stateDir string) (FirmwareState, error) {
	d, err := h.Domain(ctx, uuid)
	if err != nil {
		return FirmwareState{}, err
	}
	p, err := d.FirmwarePaths(stateDir)
	if err != nil {
		return FirmwareState{}, &Error{Op: "read firmware state of " + uuid, Kind: KindUnsupported, Msg: err.Error()}
	}
	return ReadFirmware(p)
}

// readCapped reads a regular file of at most limit bytes.
func readCapped(path string, limit int64) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no plain file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s is larger than the %d bytes that are carried", path, limit)
	}
	return b, nil
}

// WriteFirmware replaces firmware state files atomically, keeping owner and
// mode of a file that exists. The domain must be off. nil content is skipped.
func WriteFirmware(p FirmwarePaths, s FirmwareState) error {
	if int64(len(s.NVRAM)) > MaxNVRAM || int64(len(s.TPM)) > MaxTPM {
		return errors.New("write firmware state: larger than allowed")
	}
	if s.NVRAM != nil {
		if err := replaceFile(p.NVRAM, s.NVRAM); err != nil {
			return fmt.Errorf("write NVRAM: %w", err)
		}
	}
	if s.TPM != nil {
		if err := replaceFile(p.TPM, s.TPM); err != nil {
			return fmt.Errorf("write TPM state: %w", err)
		}
	}
	return nil
}

func replaceFile(path string, b []byte) error {
	if path == "" {
		return errors.New("the domain has no such file")
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".kvmreplica-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // no effect after the rename
	defer f.Close()
	if st, err := os.Lstat(path); err == nil {
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			if err := f.Chown(int(sys.Uid), int(sys.Gid)); err != nil {
				return err
			}
		}
		if err := f.Chmod(st.Mode().Perm()); err != nil {
			return err
		}
	}
	if _, err := f.Write(b); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
