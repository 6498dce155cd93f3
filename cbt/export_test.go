package cbt

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"

	"golang.org/x/sys/unix"
)

// Kill gives up a Group the way SIGKILL does: nothing more becomes durable,
// shared memory stays.
func Kill(g *Group) {
	g.gate.Lock()
	g.refuse = errKilled
	g.gate.Unlock()
	var maps []*mapping
	for _, d := range g.disks {
		if st := d.st.Load(); st.shm != nil {
			maps = append(maps, st.shm.mapping)
		}
	}
	if vm := g.share.Load(); vm != nil {
		maps = append(maps, vm.mapping)
	}
	_ = g.drop()
	for _, m := range maps {
		_ = unix.Munmap(m.mem)
	}
}

type killed struct{}

func (killed) Error() string { return "killed" }

var errKilled = killed{}

func newWriter(b *bytes.Buffer) *bufio.Writer { return bufio.NewWriter(b) }

func newReader(b []byte) *bufio.Reader { return bufio.NewReader(bytes.NewReader(b)) }

func isFeature(err error) bool { return errors.Is(err, ErrFeature) }

// resealed is b as it is and with right checksums, so that a fuzzer gets past
// them.
func resealed(b []byte) [][]byte {
	c := bytes.Clone(b)
	copy(c, superMagic)
	clear(c[superCRC:])
	h := hash16(c[:superHash])
	copy(c[superHash:], h[:])
	binary.LittleEndian.PutUint32(c[superCRC:], crc32.Checksum(c[:superCRC], crcTable))
	return [][]byte{b, c}
}
