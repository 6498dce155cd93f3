package nbd_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"kvmreplica/nbd"
)

const (
	diffSize  = 8 << 20
	diffSlots = 64 // requests of one batch lie in different ones: they may overtake each other
	diffBatch = 16
)

// diffRequest is one request of the stream that both servers get.
type diffRequest struct {
	flags, cmd uint16
	off        uint64
	length     uint32
	payload    []byte
}

func (q diffRequest) String() string {
	return fmt.Sprintf("command %d flags %#x, %d bytes at %d", q.cmd, q.flags, q.length, q.off)
}

// TestRandomRequestsAreAnsweredAsByNbdkit sends the same stream to our server
// and to nbdkit's memory plugin: same errors, same data, same disk at the end.
//
// Differences that are allowed, and why, stand in diffAllowed.
func TestRandomRequestsAreAnsweredAsByNbdkit(t *testing.T) {
	requires(t, "nbdkit")
	n := 20_000
	if s := os.Getenv("KVMREPLICA_DIFFERENTIAL"); s != "" {
		var err error
		n, err = strconv.Atoi(s)
		must(t, err)
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KVMREPLICA_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		must(t, err)
	}
	t.Logf("KVMREPLICA_SEED=%d", seed)
	ours := serve(t, nbd.Options{}, nbd.Export{Device: newFile(t, diffSize)}).connect(t)
	theirs := nbdkitMemory(t).connect(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	var refused, allowed, bytesRead int
	for _, r := range []*raw{ours, theirs} {
		r.enter(false)
	}
	for done := 0; done < n; {
		batch := diffStream(rng)
		for _, r := range []*raw{ours, theirs} {
			must(t, r.SetDeadline(time.Now().Add(10*patience)))
		}
		sent := make(chan error, 2)
		for _, r := range []*raw{ours, theirs} {
			go func() { sent <- r.trySend(diffBytes(batch)) }()
		}
		a, b := diffReplies(ours, batch), diffReplies(theirs, batch)
		must(t, <-sent)
		must(t, <-sent)
		for i, q := range batch {
			if a[i].errno != b[i].errno {
				if why := diffAllowed(q, a[i].errno, b[i].errno); why == "" {
					t.Fatalf("request %d: %v: we answer %d, nbdkit %d", done+i, q, a[i].errno, b[i].errno)
				}
				allowed++
			}
			if a[i].errno != 0 {
				refused++
			}
			if !bytes.Equal(a[i].data, b[i].data) {
				t.Fatalf("request %d: %v: we read other data than nbdkit", done+i, q)
			}
			bytesRead += len(a[i].data)
		}
		done += len(batch)
	}
	whole := []diffRequest{{cmd: cmdRead, length: diffSize}}
	for _, r := range []*raw{ours, theirs} {
		must(t, r.trySend(diffBytes(whole)))
	}
	if a, b := diffReplies(ours, whole), diffReplies(theirs, whole); a[0].errno != 0 || !bytes.Equal(a[0].data, b[0].data) {
		t.Fatal("the disks differ at the end")
	}
	t.Logf("%d requests, %d refused by both, %d differences of the allowed kinds, %d MiB compared", n, refused-allowed, allowed, bytesRead>>20)
}

// diffAllowed says why two different answers are both right; "" = they are not.
func diffAllowed(q diffRequest, ours, theirs uint32) string {
	if q.length == 0 && ours == 0 && (theirs == errInval || theirs == errNoSpace) {
		return "the protocol leaves a length of zero open; nothing happens here, as with qemu-nbd, and nbdkit refuses"
	}
	return ""
}

func nbdkitMemory(t *testing.T) service {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbdk")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	sock := filepath.Join(dir, "s")
	cmd := exec.Command("nbdkit", "-f", "-U", sock, "memory", strconv.Itoa(diffSize))
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for end := time.Now().Add(patience); ; {
		c, err := net.Dial("unix", sock)
		if err == nil {
			_ = c.Close()
			return service{socket: sock}
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// diffStream makes a batch; now and then a request that must be refused.
func diffStream(rng *rand.Rand) []diffRequest {
	slots := rng.Perm(diffSlots)[:diffBatch]
	var out []diffRequest
	for _, s := range slots {
		const slot = diffSize / diffSlots
		q := diffRequest{cmd: []uint16{cmdRead, cmdRead, cmdWrite, cmdWrite, cmdFlush, cmdTrim, cmdZeroes, cmdZeroes}[rng.IntN(8)]}
		if q.cmd != cmdFlush {
			q.off = uint64(s*slot) + uint64(rng.IntN(slot))
			q.length = uint32(1 + rng.IntN(slot-int(q.off)%slot))
			if rng.IntN(2) == 0 {
				q.off = q.off / 512 * 512
			}
			if q.length > 4096 && rng.IntN(8) > 0 {
				q.length = q.length%4096 + 1
			}
		}
		if rng.IntN(4) == 0 && q.cmd != cmdRead && q.cmd != cmdFlush {
			q.flags |= flagFUA
		}
		if rng.IntN(4) == 0 && q.cmd == cmdZeroes {
			q.flags |= flagNoHole
		}
		if rng.IntN(16) == 0 {
			spoil(rng, &q)
		}
		if q.cmd == cmdWrite {
			q.payload = make([]byte, q.length)
			for i := range q.payload {
				q.payload[i] = byte(rng.Uint32())
			}
		}
		out = append(out, q)
	}
	return out
}

// spoil makes a request wrong in one way.
func spoil(rng *rand.Rand, q *diffRequest) {
	switch rng.IntN(6) {
	case 0: // behind the end
		q.off += diffSize
	case 1: // across the end
		q.off, q.length = diffSize-uint64(q.length)/2, max(q.length, 2)
	case 2: // overflows
		q.off = ^uint64(0) - uint64(rng.IntN(10))
	case 3:
		q.length = 0
	case 4:
		q.flags |= 1 << (5 + rng.IntN(11))
	case 5:
		if q.cmd != cmdWrite {
			q.cmd, q.length = 20+uint16(rng.IntN(1000)), 0
		}
	}
}

func diffBytes(batch []diffRequest) []byte {
	var p []byte
	for i, q := range batch {
		p = binary.BigEndian.AppendUint32(p, magicRequest)
		p = binary.BigEndian.AppendUint16(p, q.flags)
		p = binary.BigEndian.AppendUint16(p, q.cmd)
		p = binary.BigEndian.AppendUint64(p, uint64(i))
		p = binary.BigEndian.AppendUint64(p, q.off)
		p = binary.BigEndian.AppendUint32(p, q.length)
		p = append(p, q.payload...)
	}
	return p
}

type diffReply struct {
	errno uint32
	data  []byte
}

// diffReplies reads the answers to a batch, in whatever order they come.
func diffReplies(r *raw, batch []diffRequest) []diffReply {
	r.t.Helper()
	out := make([]diffReply, len(batch))
	for range batch {
		cookie, errno := r.simple()
		out[cookie].errno = errno
		if q := batch[cookie]; errno == 0 && q.cmd == cmdRead {
			out[cookie].data = r.read(int(q.length))
		}
	}
	return out
}
