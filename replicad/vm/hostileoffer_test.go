package vm

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/wire"
)

// below lists everything under a directory, with type and size.
func below(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		b.WriteString(path + " " + d.Type().String() + "\n")
		return nil
	}))
	return b.String()
}

// Names of a peer reach no path, no shell and no terminal: they are refused, or
// they are text.
func TestAnOffersNamesReachNoPath(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	peer := w.as(w.a.host)
	spec := []byte(`{"name":"x"}`)
	offer := func() wire.Offer {
		return wire.Offer{
			VM: "deadbeef-0000-4000-8000-0000000000bb", Name: "db", Spec: spec, Interval: time.Second, Request: "evil",
			Disks: []wire.Disk{{Name: "vda", Size: 1 << 20, Format: "raw"}}, Generation: [16]byte{1},
		}
	}
	names := []string{
		"", "../x", "/etc/passwd", "a/../../b", "a\x00b", "a\nb", "-rf", strings.Repeat("a", 64<<10), "a\xff\xfe", "a\u202eb", ".", "..", "./x", "x/",
		"a\x1b[31mb", "a\u0085b", "\u2028",
	}
	before := below(t, w.b.dir)
	for _, n := range names {
		for what, change := range map[string]func(o *wire.Offer){
			"id":     func(o *wire.Offer) { o.VM = wire.VMID(n) },
			"name":   func(o *wire.Offer) { o.Name = n },
			"disk":   func(o *wire.Offer) { o.Disks[0].Name = wire.DiskName(n) },
			"format": func(o *wire.Offer) { o.Disks[0].Format = n },
		} {
			o := offer()
			change(&o)
			_, err := w.b.manager().Offer(peer, o)
			if err == nil {
				t.Errorf("%s %.40q is taken", what, n)
			} else if strings.ContainsAny(err.Error(), "\x1b\n\x00") || len(err.Error()) > 4<<10 {
				t.Errorf("%s %.40q: the error carries it on: %.200q", what, n, err)
			}
		}
	}
	for what, change := range map[string]func(o *wire.Offer){
		"id in capitals":          func(o *wire.Offer) { o.VM = "DEADBEEF-0000-4000-8000-0000000000BB" },
		"two disks of one name":   func(o *wire.Offer) { o.Disks = append(o.Disks, o.Disks[0]) },
		"no disk":                 func(o *wire.Offer) { o.Disks = nil },
		"100,000 disks":           func(o *wire.Offer) { o.Disks = make([]wire.Disk, 100_000) },
		"a disk of 8 EiB":         func(o *wire.Offer) { o.Disks[0].Size = 1<<63 - 512 },
		"a negative disk":         func(o *wire.Offer) { o.Disks[0].Size = -512 },
		"an empty disk":           func(o *wire.Offer) { o.Disks[0].Size = 0 },
		"half a sector":           func(o *wire.Offer) { o.Disks[0].Size = 511 },
		"a large text":            func(o *wire.Offer) { o.Spec = make([]byte, maxSpec+1) },
		"points every nanosecond": func(o *wire.Offer) { o.AppEvery = -1 },
		"a wild retention":        func(o *wire.Offer) { o.Retention = "1ns:999999h " + strings.Repeat("1s:1s ", 10_000) },
	} {
		o := offer()
		change(&o)
		if _, err := w.b.manager().Offer(peer, o); err == nil {
			t.Errorf("%s is taken", what)
		}
	}
	if after := below(t, w.b.dir); after != before {
		t.Errorf("something was left behind:\n%s\nbefore:\n%s", after, before)
	}
}

// enableAs protects the VM towards B.
func enableAs(request string) func(ctx context.Context, m *Manager, v *VM) error {
	return func(ctx context.Context, m *Manager, _ *VM) error {
		_, err := m.Enable(ctx, EnableOptions{Name: "web", Peer: "00000000-0000-4000-8000-00000000000B", Interval: time.Second, Request: request}, nil)
		return err
	}
}

// What somebody planted where a replica's image would be is neither followed
// nor opened, and stays as it is.
func TestWhatIsPlantedInAStorageRootIsNotFollowed(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	dir := imageDir(w.b.root, testVM)
	file := filepath.Join(dir, "vda.raw")
	outside := filepath.Join(w.b.dir, "outside")
	must(t, os.MkdirAll(outside, 0o700))
	secret := filepath.Join(outside, "secret")
	must(t, os.WriteFile(secret, []byte("precious"), 0o600))
	for what, plant := range map[string]func() error{
		"a link to a file":         func() error { return os.Symlink(secret, file) },
		"a link to nothing":        func() error { return os.Symlink(filepath.Join(outside, "new"), file) },
		"a hard link":              func() error { return os.Link(secret, file) },
		"a fifo":                   func() error { return unix.Mkfifo(file, 0o600) },
		"a device":                 func() error { return unix.Mknod(file, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) },
		"a directory":              func() error { return os.Mkdir(file, 0o700) },
		"a link for the directory": func() error { return os.Symlink(outside, dir) },
	} {
		must(t, os.RemoveAll(dir))
		if what != "a link for the directory" {
			must(t, os.MkdirAll(dir, 0o700))
		} else {
			must(t, os.MkdirAll(filepath.Dir(dir), 0o700))
		}
		must(t, plant())
		before := below(t, outside)
		if err := w.a.do(enableAs("enable-" + strings.ReplaceAll(what, " ", "-"))); err == nil {
			t.Errorf("%s: protected over it", what)
		}
		if b, err := os.ReadFile(secret); err != nil || string(b) != "precious" {
			t.Errorf("%s: the file holds %q, %v", what, b, err)
		}
		if after := below(t, outside); after != before {
			t.Errorf("%s: left outside of the root:\n%s", what, after)
		}
		if _, err := os.Lstat(file); err != nil && what != "a link for the directory" {
			t.Errorf("%s: what was planted is gone: %v", what, err)
		}
		if w.a.vm() != nil || w.b.vm() != nil {
			t.Fatalf("%s: something was left behind", what)
		}
	}
}
