package block

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"os"

	"golang.org/x/sys/unix"
)

// Kind says what an image is stored in.
type Kind string

// The kinds of images.
const (
	KindFile        Kind = "file"
	KindBlockDevice Kind = "block-device"
)

// Identity tells whether an image is the one we tracked and whether somebody
// wrote to it meanwhile. For block devices Device is the device's own number,
// Inode a digest of the name it has for life (the UUID of a mapped device or
// logical volume, a disk's world-wide name; 0 = none) and the times are zero: the
// node in /dev is made anew at each boot.
type Identity struct {
	Kind      Kind   `json:"kind"`
	Size      int64  `json:"size"` // in whole sectors, as File.Size
	Device    uint64 `json:"device"`
	Inode     uint64 `json:"inode"`
	BirthTime int64  `json:"birth_time"` // ns since 1970, 0 when unknown
	MtimeNS   int64  `json:"mtime_ns"`
	CtimeNS   int64  `json:"ctime_ns"`
}

// SameImage reports whether id and o are the same object with the same size;
// times of the content are left out.
func (id Identity) SameImage(o Identity) bool {
	id.MtimeNS, id.CtimeNS, o.MtimeNS, o.CtimeNS = 0, 0, 0, 0
	if id.Kind == KindBlockDevice && (id.Inode == 0 || o.Inode == 0) {
		id.Inode, o.Inode = 0, 0 // one of them has no such name, or was not asked
	}
	return id == o
}

// Lasting reports whether the identity holds without Device. Many file systems
// (btrfs, ZFS, NFS, overlay) get another number at each boot, and disks are found
// in another order: between two boots that number says nothing, an inode with its
// time of birth or a device's name for life does.
func (id Identity) Lasting() bool {
	if id.Kind == KindBlockDevice {
		return id.Inode != 0
	}
	return id.BirthTime != 0
}

// Renumbered reports whether only Device tells o from id, and both are Lasting.
func (id Identity) Renumbered(o Identity) bool {
	if id.Device == o.Device || !id.Lasting() || !o.Lasting() {
		return false
	}
	id.Device = o.Device
	return id.SameImage(o)
}

// Identity reads the identity of the open image.
func (f *File) Identity() (Identity, error) {
	if err := f.enter(); err != nil {
		return Identity{}, err
	}
	defer f.leave()
	var st unix.Statx_t
	const mask = unix.STATX_BASIC_STATS | unix.STATX_BTIME
	if err := unix.Statx(f.fd, "", unix.AT_EMPTY_PATH, mask, &st); err != nil {
		return Identity{}, &os.PathError{Op: "statx", Path: f.path, Err: err}
	}
	if f.blockDev {
		size, err := blockDeviceSize(f.fd)
		if err != nil {
			return Identity{}, fmt.Errorf("identity of %s: %w", f.path, err)
		}
		return Identity{
			Kind: KindBlockDevice, Size: size, Device: unix.Mkdev(st.Rdev_major, st.Rdev_minor),
			Inode: deviceName(fmt.Sprintf("/sys/dev/block/%d:%d", st.Rdev_major, st.Rdev_minor)),
		}, nil
	}
	id := Identity{
		Kind:    KindFile,
		Size:    roundUp(int64(st.Size)),
		Device:  unix.Mkdev(st.Dev_major, st.Dev_minor),
		Inode:   st.Ino,
		MtimeNS: nanos(st.Mtime),
		CtimeNS: nanos(st.Ctime),
	}
	if st.Mask&unix.STATX_BTIME != 0 {
		id.BirthTime = nanos(st.Btime)
	}
	return id, nil
}

// deviceName is a digest of the name that a block device has for life, 0 when it
// has none. dir is its directory below /sys/dev/block; a partition's name is its
// disk's, with its number.
func deviceName(dir string) uint64 {
	part, err := os.ReadFile(dir + "/partition")
	if err == nil {
		dir += "/.." // of where the link leads: not cleaned
	}
	for _, f := range []string{"dm/uuid", "md/uuid", "wwid", "device/wwid"} {
		b, err := os.ReadFile(dir + "/" + f)
		if name := bytes.TrimSpace(b); err == nil && len(name) > 0 {
			h := fnv.New64a()
			_, _ = h.Write([]byte(f + "=" + string(name) + "#" + string(part))) // never fails
			return h.Sum64() | 1
		}
	}
	return 0
}

func nanos(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }
