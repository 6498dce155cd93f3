package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
)

// defineGuest makes the guest's disks, where they are missing, and defines it.
func defineGuest(ctx context.Context, h *lab.Host, name string, args []string) error {
	f := flag.NewFlagSet("guest", flag.ContinueOnError)
	disks := f.Int("disks", 1, "number of disks")
	size := f.Int64("size", 128, "size of each, MiB")
	knobs := f.String("knobs", "lab.interval=50", "what labinit is told")
	network := f.String("network", "", "libvirt network to connect to")
	d := guest.Domain{Name: name, Agent: true}
	f.BoolVar(&d.UEFI, "uefi", false, "boot through UEFI")
	f.BoolVar(&d.Root, "root", false, "the first disk is a root file system")
	f.StringVar(&d.UUID, "uuid", "", "the domain's UUID")
	if err := f.Parse(args); err != nil {
		return err
	}
	files, err := guest.Build(ctx)
	if err != nil {
		return err
	}
	d.Files, d.Knobs, d.Network = files, *knobs, *network
	for i := range *disks {
		path := fmt.Sprintf("/var/lib/libvirt/images/%s-%s.raw", name, d.Target(i))
		if err := makeImage(ctx, d, i, h.Path(path), *size<<20); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		d.Disks = append(d.Disks, guest.Disk{File: path})
	}
	text, err := d.XML()
	if err != nil {
		return err
	}
	file := "/etc/libvirt/lab-" + name + ".xml"
	if err := h.PutFile(file, []byte(text), 0o644); err != nil {
		return err
	}
	_, err = h.Virsh(ctx, "define", file)
	return err
}

func makeImage(ctx context.Context, d guest.Domain, i int, path string, size int64) error {
	if d.Root && i == 0 {
		return guest.RootImage(ctx, d.Files, path, size)
	}
	return guest.BlankImage(path, size)
}

// waitFor prints the next announcement of word in the present console; with
// -n, the first whose n= is that large.
func waitFor(ctx context.Context, h *lab.Host, name, word string, args []string) error {
	f := flag.NewFlagSet("wait", flag.ContinueOnError)
	limit := f.Duration("timeout", 90*time.Second, "give up after this")
	n := f.Uint64("n", 0, "smallest number wanted")
	fresh := f.Bool("new", false, "ignore what was announced already")
	if err := f.Parse(args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	path := h.Path(guest.Domain{Name: name}.ConsoleFile())
	c := console.Open(path)
	if *fresh {
		var err error
		if c, err = console.OpenAtEnd(path); err != nil {
			return err
		}
	}
	for {
		l, err := c.WaitWord(ctx, word)
		if err != nil {
			return err
		}
		if l.Uint("n") >= *n {
			_, err = fmt.Println(l.Word, l.Text)
			return err
		}
	}
}

func last(h *lab.Host, name, word string) error {
	l, ok := console.Open(h.Path(guest.Domain{Name: name}.ConsoleFile())).Last(word)
	if !ok {
		return fmt.Errorf("guest %s on host %s has not announced %s", name, h.Name(), word)
	}
	_, err := fmt.Println(l.Word, l.Text)
	return err
}

// linkFiles links the guest's kernel and initramfs, as vmlinuz and rd.gz, into
// a folder, for whoever boots them without a lab.
func linkFiles(ctx context.Context, dir string) error {
	files, err := guest.Build(ctx)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, from := range map[string]string{"vmlinuz": files.Kernel, "rd.gz": files.Initramfs} {
		to := filepath.Join(dir, name)
		if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(from, to); err != nil {
			return err
		}
	}
	return nil
}
