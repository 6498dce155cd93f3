package cbt

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"

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

// LastWriter is the epoch that counts as the last that wrote to a region.
func LastWriter(d *Disk, region int) uint32 { return d.st.Load().lastTag[region].Load() }

// KeepAndDie calls Keep and has it die at the first bit that becomes active, as
// a kill might. It returns how many granules are in neither bitmap then. The
// group can only be killed afterwards.
func (e *Epoch) KeepAndDie(disk string) (missing int, died bool) {
	st := e.byName[disk].st
	active := st.fine[e.slot^1]
	words := active.words
	active.words = nil
	func() {
		defer func() { died = recover() != nil }()
		_ = e.Keep(disk, 0) // it does not return
	}()
	active.words = words
	for g := range st.granules {
		if !st.fine[e.slot].has(g) && !st.fine[e.slot^1].has(g) {
			missing++
		}
	}
	return missing, died
}

// HoldRange is a write that has its range, and has seen its mark, and got no
// further: it has no tag yet.
func HoldRange(d *Disk, off, n int64) (release func()) {
	lo, hi := granuleSpan(off, n)
	id := d.ranges.lock(lo, hi)
	return func() { d.ranges.unlock(id) }
}

// ExhaustShared makes a disk's shared memory one that can be neither reserved
// nor replaced by ordinary memory; mend takes it back.
func ExhaustShared(d *Disk) (mend func(), err error) {
	shm := d.st.Load().shm
	f, mem := shm.f, shm.mem
	ro, err := os.Open(shm.path) // no room can be reserved through it
	if err != nil {
		return nil, err
	}
	shm.f, shm.mem = ro, mem[1:] // no page begins there
	return func() {
		shm.f, shm.mem = f, mem
		_ = ro.Close()
	}, nil
}
