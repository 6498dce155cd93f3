package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// headerRoom is what ext4 leaves free at the start of a disk.
const headerRoom = 1024

// plant makes a disk look like an image in a format that refers to a file of
// the host: whoever guesses the format opens that file.
func (g *guest) plant(disk int, dev string) error {
	if g.knobs.header == "" {
		return nil
	}
	h := make([]byte, headerRoom)
	if n := copy(h, header(disk, g.knobs.header)); n == headerRoom {
		return errors.New("lab.header: the path is too long")
	}
	f, err := os.OpenFile(dev, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(h, 0)
	return errors.Join(err, f.Sync(), f.Close())
}

// header is one of three kinds, by the disk's number: qcow2 with a backing
// file, qcow2 with a backing file in QEMU's JSON, VMDK with an extent.
func header(disk int, path string) []byte {
	switch disk % 3 {
	case 0:
		return qcow2Header(path)
	case 1:
		return qcow2Header(fmt.Sprintf(`json:{"driver":"raw","file":{"driver":"file","filename":%q}}`, path))
	default:
		return fmt.Appendf(nil, "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 128 FLAT %q 0\n", path)
	}
}

// qcow2Header is version 2's: big endian, 72 bytes, then the backing file's name.
func qcow2Header(backing string) []byte {
	const clusterBits = 16
	var b bytes.Buffer
	for _, v := range []any{
		[]byte("QFI\xfb"), uint32(2), uint64(72), uint32(len(backing)), uint32(clusterBits), uint64(256 << 20), uint32(0), // plain
		uint32(1), uint64(3 << clusterBits), // L1 table
		uint64(1 << clusterBits), uint32(1), // refcount table
		uint32(0), uint64(0), // no snapshots
	} {
		_ = binary.Write(&b, binary.BigEndian, v) // memory takes everything
	}
	b.WriteString(backing)
	return b.Bytes()
}
