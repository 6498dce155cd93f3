package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/integration/lab/record"
)

// disk is one mounted disk of the guest.
type disk struct {
	dev   string
	mount string // "/" for the root file system
	log   *os.File
}

func (d disk) file(name string) string { return filepath.Join(d.mount, "lab", name) }

// path is the device of disk i: vda, vdb … or, with lab.dev=sd, sda, sdb …
func (k knobs) path(i int) string { return "/dev/" + k.dev + string(rune('a'+i)) }

func waitFor(path string) error {
	for end := time.Now().Add(deviceWait); ; time.Sleep(devicePoll) {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s does not appear", path)
		}
	}
}

// openDisks formats, checks and mounts every disk.
func (g *guest) openDisks() error {
	if g.knobs.disks > record.MaxDisks {
		return fmt.Errorf("lab.disks=%d: at most %d", g.knobs.disks, record.MaxDisks)
	}
	for i := range g.knobs.disks {
		d := disk{dev: g.knobs.path(i), mount: fmt.Sprintf("/mnt/d%d", i)}
		if err := g.openDisk(&d, i == 0 && g.knobs.root); err != nil {
			return fmt.Errorf("%s: %w", d.dev, err)
		}
		if err := g.plant(i, d.dev); err != nil {
			return fmt.Errorf("plant a header on %s: %w", d.dev, err)
		}
		g.disks = append(g.disks, d)
	}
	return nil
}

func (g *guest) openDisk(d *disk, isRoot bool) error {
	if isRoot {
		d.mount = "/"
		return os.MkdirAll(d.file(""), 0o755)
	}
	if err := waitFor(d.dev); err != nil {
		return err
	}
	ext4, err := hasExt4(d.dev)
	if err != nil {
		return err
	}
	if !ext4 {
		if out, err := tool("/sbin/mke2fs", "-q", "-t", "ext4", "-F", d.dev); err != nil {
			return fmt.Errorf("mke2fs: %w: %s", err, out)
		}
		g.say("MKFS dev=%s", d.dev)
	} else if g.knobs.fsck {
		g.fsck(d.dev)
	}
	if err := os.MkdirAll(d.mount, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(d.dev, d.mount, "ext4", 0, g.knobs.mount); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	if err := os.MkdirAll(d.file(""), 0o755); err != nil && !errors.Is(err, unix.EROFS) {
		return err
	}
	return nil
}

// hasExt4 looks for the superblock's magic number.
func hasExt4(dev string) (bool, error) {
	f, err := os.Open(dev)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var magic [2]byte
	_, err = f.ReadAt(magic[:], 1024+56)
	return magic == [2]byte{0x53, 0xef}, err
}

// fsck replays the journal by a mount, as any boot would, and then checks all
// of the file system without mending anything.
func (g *guest) fsck(dev string) {
	at := "/mnt/fsck"
	if err := os.MkdirAll(at, 0o755); err == nil {
		if unix.Mount(dev, at, "ext4", 0, "") == nil {
			_ = unix.Unmount(at, 0) // e2fsck will tell
		}
	}
	out, err := tool("/sbin/e2fsck", "-fn", dev)
	g.say("FSCK dev=%s clean=%v %s", dev, err == nil, out)
}

// verify reads all logs and the load files.
func (g *guest) verify() (record.Verdict, error) {
	var logs []io.Reader
	for _, d := range g.disks {
		f, err := os.Open(d.file("log"))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			logs = append(logs, io.LimitReader(nil, 0))
			continue
		case err != nil:
			return record.Verdict{}, err
		}
		defer f.Close()
		logs = append(logs, f)
	}
	g.verifyLoad()
	g.verifyDatabase()
	return record.Verify(logs)
}

// closeDisks unmounts; the root file system is made read-only instead.
func (g *guest) closeDisks() {
	if g.knobs.root && os.Getenv(stageVar) != "" {
		_ = unix.Kill(-1, unix.SIGTERM) // the agent holds files open
		time.Sleep(100 * time.Millisecond)
	}
	for _, d := range g.disks {
		var err error
		if d.mount == "/" {
			err = unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		} else {
			err = unix.Unmount(d.mount, 0)
		}
		if err != nil {
			g.say("ERROR op=unmount dev=%s err=%q", d.dev, err.Error())
		}
	}
	g.disks = nil
}
