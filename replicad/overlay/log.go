package overlay

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// LogName is the presence log in the overlay's directory.
const LogName = "overlay"

// Phase is how far the overlay's life has come; it never goes back.
type Phase byte

// The phases.
const (
	// Running: the guest's writes are beside the disks and can be dropped.
	Running Phase = 1
	// Committed: they stay; the disks below are being brought to them.
	Committed Phase = 2
	// Done: the disks below hold everything, nothing here counts any more.
	Done Phase = 3
)

// String is the name people read.
func (p Phase) String() string {
	switch p {
	case Running:
		return "running"
	case Committed:
		return "committed"
	case Done:
		return "done"
	}
	return fmt.Sprintf("phase-%d", byte(p))
}

// Head says what an overlay is about; it never changes.
type Head struct {
	VM delta.VM `json:"vm"`
	// Generation is the one whose writes the overlay holds, At the state below.
	Generation delta.Generation `json:"generation"`
	At         delta.Pos        `json:"at"`
	Disks      []delta.Disk     `json:"disks"`
	Created    time.Time        `json:"created"`
	// Set is random, made by Create, so that nothing of another overlay is taken for this one's.
	Set [16]byte `json:"set"`
}

// Errors of durable overlays. Test with errors.Is.
var (
	// ErrExists: there is another overlay in the directory.
	ErrExists = errors.New("an overlay with a guest's writes exists already")
	// ErrOther: the overlay belongs to another VM, generation or state.
	ErrOther = errors.New("the overlay belongs to something else")
	// ErrLogged: the presence log cannot be read as one.
	ErrLogged = errors.New("the overlay's presence log is damaged")
)

// Kinds of records in the log.
const (
	recHead  = 'H'
	recWords = 'W'
	recPhase = 'P'

	wordLen = 16
	// maxWords bounds one record.
	maxWords = 1 << 16
)

func logOptions() fsx.LogOptions {
	return fsx.LogOptions{MaxRecord: 1 + maxWords*wordLen, MaxSize: 4 << 30}
}

// Create makes an empty overlay durable; the disks' data files must exist. The
// same one again is a no-op.
func Create(dir fsx.FS, h Head) error {
	old, err := Read(dir)
	switch {
	case err == nil && old.Head.same(h):
		return nil
	case err == nil:
		return fmt.Errorf("create overlay at %v: %w (at %v)", h.At, ErrExists, old.Head.At)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if h.Set == [16]byte{} {
		if _, err := rand.Read(h.Set[:]); err != nil {
			return fmt.Errorf("create overlay: %w", err)
		}
	}
	rec, err := encodeHead(h)
	if err != nil {
		return fmt.Errorf("create overlay: %w", err)
	}
	l, err := fsx.CreateLog(dir, LogName, h.Set, logOptions(), rec)
	if err != nil {
		return fmt.Errorf("create overlay: %w", err)
	}
	return l.Close()
}

func (h Head) same(o Head) bool {
	return h.VM == o.VM && h.Generation == o.Generation && h.At == o.At
}

// Info is what a log says without being opened.
type Info struct {
	Head  Head
	Phase Phase
	// Bytes are in the overlay, by disk, as of the last flush.
	Bytes map[string]int64
}

// Read reads a log and changes nothing. Absence is fs.ErrNotExist.
func Read(dir fsx.FS) (Info, error) {
	c, err := fsx.ReadLog(dir, LogName, logOptions())
	if err != nil {
		return Info{}, err
	}
	d, err := decodeLog(c)
	if err != nil {
		return Info{}, err
	}
	out := Info{Head: d.head, Phase: d.phase, Bytes: map[string]int64{}}
	for i, k := range d.head.Disks {
		out.Bytes[k.Name] = d.in[i].bytes(k.Size)
	}
	return out, nil
}

// Remove drops the overlay's log, durably: nothing of the overlay counts from
// then on. The data files are the caller's. Absence is fine.
func Remove(dir fsx.FS) error {
	if err := dir.Remove(LogName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("drop overlay: %w", err)
	}
	if err := dir.SyncDir("."); err != nil {
		return fmt.Errorf("drop overlay: %w", err)
	}
	return nil
}

func encodeHead(h Head) ([]byte, error) {
	b, err := json.Marshal(h)
	return append([]byte{recHead}, b...), err
}

// decoded is what the records add up to.
type decoded struct {
	head  Head
	phase Phase
	in    []presence
}

func decodeLog(c fsx.LogContent) (decoded, error) {
	d := decoded{phase: Running}
	for i, r := range c.Records {
		if len(r) == 0 || (i == 0) != (r[0] == recHead) {
			return d, fmt.Errorf("%w: record %d", ErrLogged, i)
		}
		var err error
		switch body := r[1:]; r[0] {
		case recHead:
			err = d.readHead(body)
		case recPhase:
			if len(body) != 1 || Phase(body[0]) < d.phase || Phase(body[0]) > Done {
				err = errors.New("no such phase")
				break
			}
			d.phase = Phase(body[0])
		case recWords:
			err = d.readWords(body)
		default:
			err = fmt.Errorf("unknown kind %q, written by a newer version", r[0])
		}
		if err != nil {
			return d, fmt.Errorf("%w: record %d: %w", ErrLogged, i, err)
		}
	}
	if len(c.Records) == 0 {
		return d, fmt.Errorf("%w: no head", ErrLogged)
	}
	return d, nil
}

// What a damaged head can make us allocate.
const (
	maxDisk  = 1 << 46
	maxDisks = 64
)

func (d *decoded) readHead(b []byte) error {
	if err := json.Unmarshal(b, &d.head); err != nil {
		return err
	}
	if n := len(d.head.Disks); n == 0 || n > maxDisks {
		return fmt.Errorf("%d disks", n)
	}
	for _, k := range d.head.Disks {
		if k.Name == "" || k.Size <= 0 || k.Size > maxDisk {
			return fmt.Errorf("disk %.32q has %d bytes", k.Name, k.Size)
		}
		d.in = append(d.in, newPresence(k.Size))
	}
	return nil
}

func (d *decoded) readWords(b []byte) error {
	if len(b)%wordLen != 0 {
		return errors.New("half a word")
	}
	for ; len(b) > 0; b = b[wordLen:] {
		k, v := wordKey(binary.LittleEndian.Uint64(b)), binary.LittleEndian.Uint64(b[8:])
		if k.disk() >= len(d.in) || k.word() >= len(d.in[k.disk()]) || v&(v>>1)&0x5555555555555555 != 0 {
			return fmt.Errorf("word %x is not of these disks", uint64(k))
		}
		d.in[k.disk()][k.word()].Store(v)
	}
	return nil
}

// wordKey names a word of presence: the disk in the upper 16 bits.
type wordKey uint64

func keyOf(disk, word int) wordKey { return wordKey(uint64(disk)<<48 | uint64(word)) }
func (k wordKey) disk() int        { return int(k >> 48) }
func (k wordKey) word() int        { return int(k & (1<<48 - 1)) }

// bytes counts what is present or zeroed.
func (p presence) bytes(size int64) (n int64) {
	for r := range p.runs(0, size) {
		if r.state != below {
			n += r.Len
		}
	}
	return n
}

// journal is the open log. Its methods are safe for concurrent use.
type journal struct {
	fs   fsx.FS
	head Head

	mu    sync.Mutex
	log   *fsx.Log // guarded by mu
	size  int64    // bytes of words in it; guarded by mu
	limit int64    // size at which it is written anew; guarded by mu
	least int64    // the least limit
}

// compactAt is the least size at which the log is written anew.
const compactAt = 16 << 20

// words makes the states of words durable; later ones win.
func (j *journal) words(ws map[wordKey]uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, r := range encodeWords(ws) {
		if err := j.log.Append(r); err != nil {
			return fmt.Errorf("record what the overlay holds: %w", err)
		}
		j.size += int64(len(r)) + 512
	}
	if j.size > j.limit {
		return j.compact()
	}
	return nil
}

func encodeWords(ws map[wordKey]uint64) [][]byte {
	var out [][]byte
	var rec []byte
	for _, k := range slices.Sorted(maps.Keys(ws)) {
		if rec == nil {
			rec = []byte{recWords}
		}
		rec = binary.LittleEndian.AppendUint64(rec, uint64(k))
		rec = binary.LittleEndian.AppendUint64(rec, ws[k])
		if len(rec) > (maxWords-1)*wordLen {
			out, rec = append(out, rec), nil
		}
	}
	if rec != nil {
		out = append(out, rec)
	}
	return out
}

// compact replaces the log by one that says the same in fewer words. It looks
// at the log itself: memory knows more than what is durable.
func (j *journal) compact() error {
	c, err := fsx.ReadLog(j.fs, LogName, logOptions())
	if err != nil {
		return fmt.Errorf("write the overlay's log anew: %w", err)
	}
	d, err := decodeLog(c)
	if err != nil {
		return fmt.Errorf("write the overlay's log anew: %w", err)
	}
	all := map[wordKey]uint64{}
	for i, p := range d.in {
		for w := range p {
			if v := p[w].Load(); v != 0 {
				all[keyOf(i, w)] = v
			}
		}
	}
	recs := append([][]byte{c.Records[0]}, encodeWords(all)...)
	if d.phase != Running {
		recs = append(recs, []byte{recPhase, byte(d.phase)})
	}
	l, err := fsx.CreateLog(j.fs, LogName, j.head.Set, logOptions(), recs...)
	if err != nil {
		return fmt.Errorf("write the overlay's log anew: %w", err)
	}
	old := j.log
	j.log, j.size = l, int64(len(all)*wordLen)
	j.limit = max(j.least, 3*j.size)
	return old.Close()
}

// phase makes the next phase durable.
func (j *journal) phase(p Phase) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.log.Append([]byte{recPhase, byte(p)}); err != nil {
		return fmt.Errorf("record that the overlay is %s: %w", p, err)
	}
	return nil
}

func (j *journal) close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.log.Close()
}
