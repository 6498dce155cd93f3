package guest

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"sort"
)

// tree is a file system in memory that becomes an initramfs or a directory.
type tree struct {
	entries map[string]entry
	errs    []error
}

type entry struct {
	mode    uint32 // type and permission bits as in stat
	content []byte // of a file; the target of a link
}

// The type bits of a mode.
const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeLink = 0o120000
)

func newTree() *tree { return &tree{entries: map[string]entry{}} }

// content adds a file and the directories above it.
func (t *tree) content(at string, b []byte, perm uint32) {
	t.dir(path.Dir(at))
	t.entries[at] = entry{typeFile | perm, b}
}

// file adds a copy of a file of this machine.
func (t *tree) file(at, from string, perm uint32) {
	b, err := os.ReadFile(from)
	if err != nil {
		t.errs = append(t.errs, err)
		return
	}
	t.content(at, b, perm)
}

func (t *tree) link(at, target string) {
	t.dir(path.Dir(at))
	t.entries[at] = entry{typeLink | 0o777, []byte(target)}
}

func (t *tree) dir(at string) {
	for ; at != "/" && at != "."; at = path.Dir(at) {
		t.entries[at] = entry{typeDir | 0o755, nil}
	}
}

// program adds a program of this machine and the libraries it is linked with.
func (t *tree) program(at, from string) {
	if t.file(at, from, 0o755); len(t.errs) > 0 {
		return
	}
	if err := t.libraries(from); err != nil {
		t.errs = append(t.errs, err)
	}
}

// programs adds programs that are looked up in PATH, each where its key says.
func (t *tree) programs(tools map[string]string) error {
	for at, name := range tools {
		from, err := exec.LookPath(name)
		if err != nil {
			return fmt.Errorf("%s is not on this machine (run: make deps)", name)
		}
		t.program(at, from)
	}
	return errors.Join(t.errs...)
}

// libraries adds the interpreter and, recursively, the shared objects of an
// ELF file, at the paths where the dynamic linker looks for them.
func (t *tree) libraries(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			name, err := readString(p)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			t.file(name, name, 0o755)
		}
	}
	needs, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, n := range needs {
		at := "/lib/x86_64-linux-gnu/" + n
		if _, ok := t.entries[at]; ok {
			continue
		}
		from, err := findLibrary(n)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		t.file(at, from, 0o755)
		if err := t.libraries(from); err != nil {
			return err
		}
	}
	return nil
}

func readString(p *elf.Prog) (string, error) {
	b := make([]byte, p.Filesz)
	if _, err := p.ReadAt(b, 0); err != nil {
		return "", err
	}
	return string(bytes.TrimRight(b, "\x00")), nil
}

func findLibrary(name string) (string, error) {
	for _, d := range []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"} {
		p := filepath.Join(d, name)
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("library %s is not on this machine", name)
}

const dhcpScript = `#!/bin/busybox sh
[ "$1" = bound ] && /bin/busybox ip addr add "$ip/${mask:-24}" dev "$interface"
exit 0
`

// userland adds the tools that labinit calls.
func (t *tree) userland() error {
	for _, d := range []string{"/proc", "/sys", "/dev", "/mnt", "/run", "/tmp", "/etc", "/var"} {
		t.dir(d)
	}
	t.link("/bin/sh", "busybox")
	t.content("/etc/udhcpc.sh", []byte(dhcpScript), 0o755)
	for at, names := range map[string][]string{
		"/bin/busybox":      {"busybox"},
		"/sbin/e2fsck":      {"e2fsck.static", "e2fsck"},
		"/sbin/mke2fs":      {"mke2fs"},
		"/usr/sbin/qemu-ga": {"qemu-ga"},
	} {
		i := slices.IndexFunc(names, func(n string) bool { _, err := exec.LookPath(n); return err == nil })
		if i < 0 {
			return fmt.Errorf("%s is not on this machine (run: make deps)", names[0])
		}
		from, err := exec.LookPath(names[i])
		if err != nil {
			return err
		}
		t.program(at, from)
	}
	if _, err := os.Stat("/etc/mke2fs.conf"); err == nil {
		t.file("/etc/mke2fs.conf", "/etc/mke2fs.conf", 0o644)
	}
	return errors.Join(t.errs...)
}

func (t *tree) names() []string {
	var names []string
	for n := range t.entries {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}

// archive packs the tree for the kernel, the same bytes for the same tree.
func (t *tree) archive() ([]byte, error) {
	if err := errors.Join(t.errs...); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	z, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := t.cpio(z); err != nil {
		return nil, err
	}
	err = z.Close() // before the bytes are taken: it writes the last of them
	return out.Bytes(), err
}

// extract writes the tree below a directory.
func (t *tree) extract(dir string) error {
	if err := errors.Join(t.errs...); err != nil {
		return err
	}
	for _, n := range t.names() { // parents sort before their children
		e, at := t.entries[n], filepath.Join(dir, n)
		var err error
		switch e.mode &^ 0o7777 {
		case typeDir:
			err = os.MkdirAll(at, 0o755)
		case typeLink:
			err = os.Symlink(string(e.content), at)
		default:
			err = os.WriteFile(at, e.content, os.FileMode(e.mode&0o777))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// byAge sorts files, newest first; those that are gone come last.
func byAge(files []string) []string {
	age := func(f string) int64 {
		st, err := os.Stat(f)
		if err != nil {
			return 0
		}
		return st.ModTime().UnixNano()
	}
	slices.SortFunc(files, func(a, b string) int { return int(min(max(age(b)-age(a), -1), 1)) })
	return files
}
