package vm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/wire"
)

// A replica may begin with images that the administrator of its host has put
// there, such as a restored backup or the copy of an earlier relationship: they
// are compared and only what differs is sent. Putting them into the directory
// existingDir is the consent; no primary can lay hands on any other file.
const existingDir = "existing"

// given is where an image for d is expected.
func given(d Disk) string {
	return filepath.Join(filepath.Dir(d.Path), existingDir, filepath.Base(d.Path))
}

// checkGiven says what is missing before anything is made.
func (r *Record) checkGiven() error {
	for _, d := range r.Disks {
		refuse := func(format string, a ...any) error {
			return &wire.Error{
				Kind: wire.KindRefused, Text: fmt.Sprintf(format, a...),
				Hint: fmt.Sprintf("on the replica host put a raw copy of %s, %d bytes, at %s", d.Name, d.Size, given(d)),
			}
		}
		st, err := os.Lstat(given(d))
		switch {
		case absent(err):
			return refuse("no image lies ready for disk %s", d.Name)
		case err != nil:
			return fmt.Errorf("look for existing images: %w", err)
		case !st.Mode().IsRegular():
			return refuse("%s is not a regular file", given(d))
		case st.Size() != d.Size:
			return refuse("the image for disk %s has %d bytes, the disk has %d", d.Name, st.Size(), d.Size)
		}
	}
	return nil
}

// takeGiven moves the images to where a replica's lie and makes a store around
// them. It may be repeated after a crash at any place.
func (v *VM) takeGiven() error {
	r := v.record()
	for _, d := range r.Disks {
		if err := rename(given(d), d.Path); err != nil && !absent(err) {
			return fmt.Errorf("take over the existing image of %s: %w", d.Name, err)
		}
	}
	s, err := points.Open(v.storeConfig())
	if err == nil && s.Status().State == points.Seeding {
		for _, d := range r.Disks {
			err = errors.Join(err, s.SeedAssume(string(d.Name)))
		}
		return errors.Join(err, s.Close())
	}
	if err == nil {
		return s.Close()
	}
	return v.adoptBase(delta.Pos{}, true)
}

// giveBack is the way back while nothing was committed into the images: they
// are still as they were given.
func (v *VM) giveBack() error {
	var errs []error
	for _, d := range v.record().Disks {
		if err := rename(d.Path, given(d)); err != nil && !absent(err) {
			errs = append(errs, fmt.Errorf("put the image of %s back: %w", d.Name, err))
		}
	}
	return errors.Join(errs...)
}

// rename moves a file durably and never onto another.
func rename(from, to string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return errors.Join(syncDir(filepath.Dir(to)), syncDir(filepath.Dir(from)))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
