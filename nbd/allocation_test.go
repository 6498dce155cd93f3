package nbd_test

import (
	"encoding/binary"
	"io"
	"net"
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// The steady data path takes nothing from the heap, inline or parked. The
// client here reuses its buffers, so that what is counted is the server's.
func TestSteadyDataPathDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools forget on purpose")
	}
	// Without a bound of dirty bytes: beyond it writes are parked, which is
	// not the steady state.
	f, err := block.OpenFile(newFile(t, 64<<20).Path(), block.FileOptions{DirtyLimit: -1, NoLock: true})
	must(t, err)
	defer f.Close()
	for _, c := range []struct {
		name string
		dev  block.Device
		cmd  uint16
		size int
		max  float64
	}{
		{"inline read", f, cmdRead, 4096, 0},
		{"inline write", f, cmdWrite, 4096, 0},
		{"sendfile", f, cmdRead, 64 << 10, 0},
		{"long write", f, cmdWrite, 1 << 20, 0},
		{"parked read", plain{f}, cmdRead, 4096, 0},
		{"parked write", plain{f}, cmdWrite, 4096, 0},
		// Flushes are parked only while they are slow, so that some of the 16
		// workers may start late: a few allocations each, over 50 runs.
		{"flush", f, cmdFlush, 0, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, nbd.Options{}, nbd.Export{Device: c.dev})
			r := s.connect(t)
			r.enter(true)
			// 16 requests at once, then all their answers.
			const batch = 16
			var out []byte
			for i := range uint64(batch) {
				out = binary.BigEndian.AppendUint32(out, magicRequest)
				out = binary.BigEndian.AppendUint32(out, uint32(c.cmd))
				out = binary.BigEndian.AppendUint64(out, i)
				out = binary.BigEndian.AppendUint64(out, i*uint64(c.size))
				out = binary.BigEndian.AppendUint32(out, uint32(c.size))
				if c.cmd == cmdWrite {
					out = append(out, make([]byte, c.size)...)
				}
			}
			in := make([]byte, batch*(c.size+64))
			round := func() { exchange(t, r.Conn, out, in, c.cmd, c.size, batch) }
			for range 20 { // workers, pools
				round()
			}
			// Pools are emptied by each collection; a few refills are not the path.
			if n := testing.AllocsPerRun(50, round); n > c.max+0.5 {
				t.Errorf("%v allocations per %d requests", n, batch)
			}
		})
	}
}

// exchange sends requests and waits until the answers' bytes are all there.
func exchange(t *testing.T, nc net.Conn, out, in []byte, cmd uint16, size, batch int) {
	want := batch * 16
	if cmd == cmdRead {
		want = batch * (28 + size)
		if size >= 16<<10 {
			want += batch * 20 // the chunk that ends the reply
		}
	}
	if _, err := nc.Write(out); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(nc, in[:want]); err != nil {
		t.Fatal(err)
	}
}
