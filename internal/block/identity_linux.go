package block

import (
	"fmt"
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
// and Inode and the times are zero: the node in /dev is made anew at each boot.
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
	return id == o
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
		return Identity{Kind: KindBlockDevice, Size: size, Device: unix.Mkdev(st.Rdev_major, st.Rdev_minor)}, nil
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

func nanos(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }
