package nbd_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
)

// BenchmarkAgainstPeers compares our server with qemu-nbd and nbdkit's file
// plugin: same image on tmpfs, one connection, rounds interleaved, a client
// that costs little. Run it with
//
//	go test ./nbd -run '^$' -bench AgainstPeers -benchtime 1x
//
// The "x" metrics are ours divided by theirs: operations per second (higher is
// better) and server CPU per operation (lower is better).
func BenchmarkAgainstPeers(b *testing.B) {
	requires(b, "qemu-nbd")
	requires(b, "nbdkit")
	dir, err := os.MkdirTemp("/dev/shm", "nbdb")
	if err != nil {
		b.Skipf("needs tmpfs on /dev/shm: %v", err)
	}
	defer os.RemoveAll(dir)
	img := filepath.Join(dir, "disk.img")
	const size = 512 << 20
	must(b, os.WriteFile(img, make([]byte, size), 0o600)) // allocated, warm
	servers := []*benchServer{
		startServer(b, "ours", dir, os.Args[0], "-test.run=^$"),
		startServer(b, "qemu-nbd", dir, "qemu-nbd", "-t", "-k", filepath.Join(dir, "qemu-nbd"), "--shared=0", "--cache=writeback",
			"--image-opts", "driver=raw,file.driver=file,file.locking=off,file.filename="+img),
		startServer(b, "nbdkit", dir, "nbdkit", "-f", "-U", filepath.Join(dir, "nbdkit"), "file", img),
	}
	servers = append(servers, trackedServer(b, dir, size)...)
	for _, w := range []benchLoad{
		{cmdWrite, 4096, 1, false},
		{cmdRead, 4096, 1, false},
		{cmdWrite, 4096, 16, false},
		{cmdRead, 4096, 16, false},
		{cmdWrite, 4096, 64, false},
		{cmdRead, 4096, 64, false},
		{cmdWrite, 65536, 8, true},
		{cmdRead, 65536, 8, true},
		{cmdWrite, 1 << 20, 8, true},
		{cmdRead, 1 << 20, 8, true},
		{cmdFlush, 4096, 1, false},
	} {
		b.Run(w.String(), func(b *testing.B) {
			w.compare(b, servers, size)
		})
	}
}

// benchLoad is a workload. cmdFlush means pairs of write and flush.
type benchLoad struct {
	cmd        uint16
	size       int
	depth      int
	sequential bool
}

func (w benchLoad) String() string {
	kind := map[uint16]string{cmdRead: "read", cmdWrite: "write", cmdFlush: "write+flush"}[w.cmd]
	return fmt.Sprintf("%s-%dK-q%d", kind, w.size>>10, w.depth)
}

const (
	benchRounds = 3
	benchRound  = 300 * time.Millisecond
)

// compare runs rounds in turn and reports medians.
func (w benchLoad) compare(b *testing.B, servers []*benchServer, size int64) {
	rate, cpu := make([][]float64, len(servers)), make([][]float64, len(servers))
	for round := range benchRounds {
		for i, s := range servers {
			ops, took, used := s.run(b, w, size, uint64(round))
			rate[i] = append(rate[i], float64(ops)/took.Seconds())
			cpu[i] = append(cpu[i], used.Seconds()*1e6/float64(ops))
		}
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(rate[0]), "ops/s")
	b.ReportMetric(median(cpu[0]), "cpu-us/op")
	for i, s := range servers[1:] {
		b.ReportMetric(median(rate[0])/median(rate[i+1]), "x-"+s.name)
		b.ReportMetric(median(cpu[0])/median(cpu[i+1]), "x-cpu-"+s.name)
	}
	if last := len(servers) - 1; servers[last].name == tracked {
		for i := 1; i < last; i++ {
			b.ReportMetric(median(rate[last])/median(rate[i]), tracked+"-x-"+servers[i].name)
			b.ReportMetric(median(cpu[last])/median(cpu[i]), tracked+"-x-cpu-"+servers[i].name)
		}
	}
}

// tracked is our server with change tracking on, as a guest's data plane is.
const tracked = "tracked"

// trackedServer starts the built program with tracking, on an image of its own;
// none when it was not built (make build).
func trackedServer(b *testing.B, dir string, size int64) []*benchServer {
	b.Helper()
	bin, err := filepath.Abs("../bin/replicad")
	must(b, err)
	if _, err := os.Stat(bin); err != nil {
		b.Logf("without tracking: %v (run make build)", err)
		return nil
	}
	img := filepath.Join(dir, "tracked.img")
	must(b, os.WriteFile(img, make([]byte, size), 0o600))
	state := filepath.Join(dir, "state")
	return []*benchServer{startServer(b, tracked, dir, bin, "nbd", img, "--socket", filepath.Join(dir, tracked), "--state", state)}
}

func median(v []float64) float64 {
	lo, hi := v[0], v[0]
	sum := 0.0
	for _, x := range v {
		lo, hi, sum = min(lo, x), max(hi, x), sum+x
	}
	return (sum - lo - hi) / float64(len(v)-2)
}

// benchServer is a server process.
type benchServer struct {
	name, socket string
	pid          int
}

// benchEnv makes the test binary a server: see TestMain.
const benchEnv = "NBD_BENCH_DIR"

func startServer(b *testing.B, name, dir, tool string, args ...string) *benchServer {
	b.Helper()
	s := &benchServer{name: name, socket: filepath.Join(dir, name)}
	cmd := exec.Command(tool, args...)
	cmd.Env = append(os.Environ(), benchEnv+"="+dir)
	must(b, cmd.Start())
	s.pid = cmd.Process.Pid
	b.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for deadline := time.Now().Add(patience); ; {
		if nc, err := net.Dial("unix", s.socket); err == nil {
			_ = nc.Close()
			return s
		}
		if time.Now().After(deadline) {
			b.Fatalf("%s does not listen", name)
		}
		<-time.After(10 * time.Millisecond)
	}
}

// serveBench is the server side of startServer in a process of its own.
func serveBench(dir string) error {
	f, err := block.OpenFile(filepath.Join(dir, "disk.img"), block.FileOptions{NoLock: true})
	if err != nil {
		return err
	}
	ln, err := net.Listen("unix", filepath.Join(dir, "ours"))
	if err != nil {
		return err
	}
	srv := nbd.NewServer(nbd.Options{})
	if err := srv.Add(nbd.Export{Device: f, MaxPiece: benchPiece()}); err != nil {
		return err
	}
	return srv.Serve(ctxUntilKilled(), ln)
}

// run keeps depth requests under way for one round.
func (s *benchServer) run(b *testing.B, w benchLoad, size int64, seed uint64) (ops int, took, cpu time.Duration) {
	nc, err := net.Dial("unix", s.socket)
	must(b, err)
	defer nc.Close()
	r := &raw{Conn: nc, t: b}
	r.read(18)
	r.send(uint32(3))
	r.option(optStructured, nil)
	if types, text := r.option(optGo, make([]byte, 6)); types[len(types)-1] != 1 {
		b.Fatalf("%s: GO refused: %s", s.name, text)
	}
	l := &loader{w: w, size: size, rng: rand.New(rand.NewPCG(seed, 1)), in: make([]byte, 2<<20)}
	for range w.depth {
		l.next()
	}
	startCPU, start := cpuOf(b, s.pid), time.Now()
	for time.Since(start) < benchRound {
		if _, err := nc.Write(l.out); err != nil {
			b.Fatal(err)
		}
		l.out = l.out[:0]
		n, err := nc.Read(l.in[l.have:])
		must(b, err)
		l.have += n
		for done := l.parse(b); done > 0; done-- {
			ops++
			l.next()
		}
	}
	took, cpu = time.Since(start), cpuOf(b, s.pid)-startCPU
	_, err = nc.Write(l.out)
	must(b, err)
	for left := w.depth; left > 0; left -= l.parse(b) { // some servers die of a client that leaves early
		n, err := nc.Read(l.in[l.have:])
		must(b, err)
		l.have += n
	}
	r.request(0, cmdDisc, 0, 0, 0)
	return ops, took, cpu
}

// loader makes requests and recognises replies; it looks at no payload.
type loader struct {
	w     benchLoad
	size  int64
	rng   *rand.Rand
	turn  int64
	out   []byte
	in    []byte
	have  int
	skip  int  // payload of a chunk still to come
	ended bool // that chunk ends a reply
}

var benchPayload = make([]byte, 1<<20)

func (l *loader) next() {
	slots := l.size / int64(l.w.size)
	at := l.turn % slots
	if !l.w.sequential {
		at = l.rng.Int64N(slots)
	}
	cmd, n := l.w.cmd, uint32(l.w.size)
	off := uint64(at * int64(l.w.size))
	if cmd == cmdFlush {
		if l.turn%2 == 0 {
			cmd = cmdWrite
		} else {
			off, n = 0, 0
		}
	}
	l.turn++
	l.out = binary.BigEndian.AppendUint32(l.out, magicRequest)
	l.out = binary.BigEndian.AppendUint32(l.out, uint32(cmd))
	l.out = binary.BigEndian.AppendUint64(l.out, uint64(l.turn))
	l.out = binary.BigEndian.AppendUint64(l.out, off)
	l.out = binary.BigEndian.AppendUint32(l.out, n)
	if cmd == cmdWrite {
		l.out = append(l.out, benchPayload[:n]...)
	}
}

// parse consumes what was received and counts the replies that ended.
func (l *loader) parse(b *testing.B) (done int) {
	p := l.in[:l.have]
	for {
		if l.skip > 0 {
			n := min(l.skip, len(p))
			p, l.skip = p[n:], l.skip-n
			if l.skip > 0 {
				break
			}
			if l.ended {
				done++
			}
			continue
		}
		if len(p) < 16 {
			break
		}
		if binary.BigEndian.Uint32(p) == magicSimple {
			if e := binary.BigEndian.Uint32(p[4:]); e != 0 {
				b.Fatalf("server answers %d", e)
			}
			p = p[16:]
			done++
			continue
		}
		if len(p) < 20 {
			break
		}
		l.skip, l.ended = int(binary.BigEndian.Uint32(p[16:])), p[5]&1 == 1
		if p = p[20:]; l.skip == 0 && l.ended {
			done++
		}
	}
	l.have = copy(l.in, p)
	return done
}

// cpuOf is the CPU time a process has used, all its threads together.
func cpuOf(b *testing.B, pid int) time.Duration {
	tasks, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/schedstat")
	must(b, err)
	sum := time.Duration(0)
	for _, name := range tasks {
		f, err := os.Open(name)
		if err != nil {
			continue // a thread that ended
		}
		text, err := io.ReadAll(f)
		_ = f.Close()
		if w := strings.Fields(string(text)); err == nil && len(w) > 0 {
			ns, _ := strconv.ParseInt(w[0], 10, 64)
			sum += time.Duration(ns)
		}
	}
	return sum
}

// benchPiece is Export.MaxPiece of our side: NBD_BENCH_PIECE bytes.
func benchPiece() int {
	n, _ := strconv.Atoi(os.Getenv("NBD_BENCH_PIECE"))
	return n
}
