package guest

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// kernelPackage is Debian's name for the newest kernel of the flavour.
const kernelPackage = "linux-image-cloud-amd64"

// kernel is an unpacked kernel package.
type kernel struct {
	image   string            // path of vmlinuz
	modules map[string]string // module name, with "_", to path
}

// fetchKernel downloads and unpacks the kernel package, once.
func fetchKernel(ctx context.Context, cache string) (kernel, error) {
	dir := filepath.Join(cache, "kernel")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := download(ctx, cache, dir); err != nil {
			return kernel{}, err
		}
	}
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) != 1 {
		return kernel{}, fmt.Errorf("%s holds %d kernels, want 1 (remove that folder and try again)", dir, len(images))
	}
	k := kernel{image: images[0], modules: map[string]string{}}
	err = filepath.WalkDir(filepath.Join(dir, "lib", "modules"), func(p string, _ fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(p), ".ko"); ok {
			k.modules[moduleName(name)] = p
		}
		return err
	})
	return k, err
}

func download(ctx context.Context, cache, dir string) error {
	tmp, err := os.MkdirTemp(cache, "kernel-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	out, err := in(ctx, tmp, "apt-cache", "depends", kernelPackage)
	if err != nil {
		return err
	}
	var name string
	for l := range strings.Lines(out) {
		if n, ok := strings.CutPrefix(strings.TrimSpace(l), "Depends: "); ok && strings.HasPrefix(n, "linux-image-") {
			name = n
			break
		}
	}
	if name == "" {
		return fmt.Errorf("apt knows no %s (run: apt-get update)", kernelPackage)
	}
	if _, err := in(ctx, tmp, "apt-get", "download", "-q", name); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %d packages", name, len(debs))
	}
	if _, err := in(ctx, tmp, "dpkg", "-x", debs[0], filepath.Join(tmp, "x")); err != nil {
		return err
	}
	return os.Rename(filepath.Join(tmp, "x"), dir)
}

// in runs a tool in a folder and returns its output.
func in(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return string(out), nil
}

// moduleName is the spelling that dependencies use; file names may differ.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// order returns the files of the wanted modules and of all they depend on,
// each after its dependencies.
func (k kernel) order(wanted []string) ([]string, error) {
	var out []string
	var add func(name string) error
	add = func(name string) error {
		path, ok := k.modules[moduleName(name)]
		if !ok {
			return fmt.Errorf("the kernel has no module %s", name)
		}
		if slices.Contains(out, path) {
			return nil
		}
		needs, err := depends(path)
		if err != nil {
			return err
		}
		for _, n := range needs {
			if err := add(n); err != nil {
				return fmt.Errorf("%s needs: %w", name, err)
			}
		}
		out = append(out, path)
		return nil
	}
	for _, w := range wanted {
		if err := add(w); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// depends reads a module's own list of what it needs, from its .modinfo
// section: NUL-separated key=value.
func depends(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", path, err)
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("module %s: no .modinfo", path)
	}
	data, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", path, err)
	}
	for kv := range strings.SplitSeq(string(data), "\x00") {
		if list, ok := strings.CutPrefix(kv, "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}
