package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"sync"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

var seed = flag.Uint64("nbd.seed", 0, "seed of the random tests; 0 draws one")

func newSeed(t *testing.T) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("replay with -nbd.seed=%d", s)
	return rand.New(rand.NewPCG(s, 0))
}

// sluggish delays each write a little and some a lot, so that writes of an
// ended connection are still under way when the next one has been answered.
type sluggish struct {
	plain
	mu  sync.Mutex
	rng *rand.Rand
}

func (d *sluggish) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	pause := time.Duration(d.rng.IntN(200)) * time.Microsecond
	if d.rng.IntN(8) == 0 {
		pause = 20 * time.Millisecond
	}
	d.mu.Unlock()
	<-time.After(pause)
	return d.plain.WriteAt(p, off)
}

// A client that loses its connection at random moments and resends what was
// not answered ends with the last version of every block.
func TestResendingClientNeverSeesAnOldVersion(t *testing.T) {
	const blocks, blockSize, batch = 16, 4096, 8
	rng := newSeed(t)
	dev := &sluggish{plain: plain{newFile(t, blocks*blockSize)}, rng: rand.New(rand.NewPCG(rng.Uint64(), 1))}
	s := serve(t, nbd.Options{Workers: 4}, nbd.Export{Device: dev, SingleClient: true})
	version := make([]byte, blocks)
	content := func(b int) []byte { return bytes.Repeat([]byte{version[b]}, blockSize) }
	r := s.connect(t)
	r.enter(true)
	for range 60 {
		open := map[int]bool{} // blocks written and not answered
		for _, b := range rng.Perm(blocks)[:batch] {
			version[b]++
			open[b] = true
		}
		for first := true; len(open) > 0; first = false {
			for b := range open {
				r.request(0, cmdWrite, uint64(b), uint64(b)*blockSize, blockSize, content(b)...)
			}
			answers := len(open)
			if cut := first && rng.IntN(2) == 0; cut {
				answers = rng.IntN(len(open))
			}
			for range answers {
				b, errno := r.simple()
				if errno != 0 {
					t.Fatalf("answer %d", errno)
				}
				delete(open, int(b))
			}
			if len(open) > 0 {
				must(t, r.Close())
				r = s.connect(t)
				r.enter(true)
			}
		}
		for b := range blocks {
			expect(t, dev, int64(b)*blockSize, content(b))
		}
	}
}

// QEMU's own client across a restart of the server: the write that hung is
// sent again, and the guest sees no error.
func TestQEMUResendsAcrossARestart(t *testing.T) {
	requires(t, "qemu-io")
	f := newFile(t, 1<<20)
	dev := newHeld(t, 1<<20)
	first := nbd.NewServer(nbd.Options{})
	must(t, first.Add(nbd.Export{Device: dev}))
	sock := t.TempDir() + "/s"
	ln, err := net.Listen("unix", sock)
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- first.Serve(t.Context(), ln) }()

	var out bytes.Buffer
	cmd := exec.Command("qemu-io", "-c", "write -P 6 64k 64k", "-c", "flush", "-c", "read -P 6 64k 64k",
		"--image-opts", "driver=nbd,reconnect-delay=20,server.type=unix,server.path="+sock)
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	<-dev.gate.Held()
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := first.Shutdown(short); err == nil {
		t.Fatal("Shutdown did not notice the write that hangs")
	}
	second := nbd.NewServer(nbd.Options{})
	must(t, second.Add(nbd.Export{Device: f}))
	if ln, err = net.Listen("unix", sock); err != nil {
		t.Fatal(err)
	}
	go second.Serve(t.Context(), ln) //nolint:errcheck // ends with the test
	if err := cmd.Wait(); err != nil || bytes.Contains(out.Bytes(), []byte("failed")) {
		t.Fatalf("qemu-io: %v\n%s", err, out.String())
	}
	expect(t, f, 64<<10, bytes.Repeat([]byte{6}, 64<<10))
	dev.gate.Open()
	must(t, <-served)
}

// A reply is never torn or mixed with another, whoever sends it: loop and
// workers answer at the same time.
func TestRepliesOfLoopAndWorkersDoNotMix(t *testing.T) {
	f, want := patterned(t, 4<<20)
	rng := newSeed(t)
	s := serve(t, nbd.Options{}, nbd.Export{Device: halfParked{plain{f}}})
	r := s.connect(t)
	r.enter(true)
	offs := make([]uint64, 400)
	lens := make([]uint32, len(offs))
	var p []byte
	for i := range offs {
		lens[i] = uint32(1 + rng.IntN(100<<10))
		offs[i] = uint64(rng.IntN(4<<20 - int(lens[i])))
		p = binary.BigEndian.AppendUint32(p, magicRequest)
		p = binary.BigEndian.AppendUint32(p, uint32(cmdRead))
		p = binary.BigEndian.AppendUint64(p, uint64(i))
		p = binary.BigEndian.AppendUint64(p, offs[i])
		p = binary.BigEndian.AppendUint32(p, lens[i])
	}
	go io.Copy(r, bytes.NewReader(p)) //nolint:errcheck // the replies tell
	for range offs {
		c := r.chunk()
		if c.typ != 1 || c.flags != 1 {
			t.Fatalf("chunk type %d flags %d", c.typ, c.flags)
		}
		off, data := binary.BigEndian.Uint64(c.data), c.data[8:]
		if off != offs[c.cookie] || len(data) != int(lens[c.cookie]) || !bytes.Equal(data, want[off:off+uint64(len(data))]) {
			t.Fatalf("reply to %d is wrong", c.cookie)
		}
	}
}

// halfParked answers every second sector inline.
type halfParked struct{ plain }

func (d halfParked) TryReadAt(p []byte, off int64) (int, error) {
	if off/512%2 == 0 {
		return 0, block.ErrWouldBlock
	}
	return d.ReadAt(p, off)
}
