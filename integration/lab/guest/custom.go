package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"kvmreplica/integration/lab"
)

// Recipe describes an initramfs with a process 1 of the caller's own.
type Recipe struct {
	// Name tells the files of this recipe from others'.
	Name string
	// Init is the package of this module whose program becomes /init.
	Init string
	// Modules are put into /mod; /mod/NAME.order lists, for each, the files to
	// insert, dependencies first.
	Modules []string
	// Commands are packages of this module whose programs are put where the
	// key says.
	Commands map[string]string
	// Tools are programs of this machine, with their libraries, put where the
	// key says; each is looked up in PATH.
	Tools map[string]string
}

// Custom makes the files of a recipe, or finds them in the cache.
func Custom(ctx context.Context, r Recipe) (Files, error) {
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
	t := newTree()
	for _, d := range []string{"/proc", "/sys", "/dev", "/mnt", "/run", "/tmp", "/etc", "/var"} {
		t.dir(d)
	}
	if err := r.fill(ctx, t, k, cache); err != nil {
		return Files{}, fmt.Errorf("initramfs %s: %w", r.Name, err)
	}
	archive, err := t.archive()
	if err != nil {
		return Files{}, fmt.Errorf("initramfs %s: %w", r.Name, err)
	}
	f := Files{Kernel: k.image}
	f.Initramfs, err = keep(cache, "custom-"+r.Name+"-", archive, 0o644)
	return f, err
}

// fill puts the recipe's programs and modules into the tree.
func (r Recipe) fill(ctx context.Context, t *tree, k kernel, cache string) error {
	commands := maps.Clone(r.Commands)
	if commands == nil {
		commands = map[string]string{}
	}
	commands["/init"] = r.Init
	for at, pkg := range commands {
		bin := filepath.Join(cache, "bin-"+r.Name+"-"+filepath.Base(pkg))
		if err := lab.Build(ctx, bin, pkg); err != nil {
			return err
		}
		t.file(at, bin, 0o755)
	}
	if err := t.programs(r.Tools); err != nil {
		return err
	}
	var all []string
	for _, m := range r.Modules {
		order, err := k.order([]string{m})
		if err != nil {
			return err
		}
		var names bytes.Buffer
		for _, path := range order {
			fmt.Fprintln(&names, filepath.Base(path))
			if !slices.Contains(all, path) {
				all = append(all, path)
				t.file("/mod/"+filepath.Base(path), path, 0o644)
			}
		}
		t.content("/mod/"+m+".order", names.Bytes(), 0o644)
	}
	return errors.Join(t.errs...)
}
