package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// Config is what an overlay that lasts needs.
type Config struct {
	// FS is the directory of the presence log.
	FS fsx.FS
	// Shared is a boot-scoped directory (tmpfs): what was answered and not
	// flushed outlives the process there, as it would in a plain image's page
	// cache. Nil means that it does not.
	Shared fsx.FS
	// BootID names this boot of the host; it is required with Shared.
	BootID string
	// Below opens the disk under the overlay: the state the guest began with, or
	// the image when it holds that state itself. It is the caller's.
	Below func(disk string) (block.Device, error)
	// Data opens the file a disk's writes go to, as large as the disk; the
	// overlay closes it.
	Data func(disk string, size int64) (block.Device, error)
	// CompactAt is the size in bytes at which the log is written anew; 0 = 16 MiB.
	CompactAt int64
}

// Durable is the overlay of one VM: all its disks over one log. What a guest
// flushed is there after a power cut, what it was answered after the death of
// the process. Its methods are safe for concurrent use.
//
// Lock order: Disk.syncing, Disk.swap, Disk.locks, Disk.mu; Durable.mu; journal.mu.
type Durable struct {
	cfg   Config
	log   *journal
	disks []*Disk

	mu     sync.Mutex
	phase  Phase // guarded by mu
	shared fsx.File
	closed atomic.Bool
}

// Open opens an overlay that Create made. An overlay that is Done opens as its
// disks below.
func Open(cfg Config) (*Durable, error) {
	l, c, err := fsx.OpenLog(cfg.FS, LogName, logOptions())
	if err != nil {
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	o := &Durable{cfg: cfg}
	d, err := decodeLog(c)
	if err == nil {
		o.log = &journal{fs: cfg.FS, head: d.head, log: l, size: c.End, least: cfg.CompactAt}
		if o.log.least <= 0 {
			o.log.least = compactAt
		}
		o.log.limit = max(o.log.least, 3*c.End)
		o.phase = d.phase
		err = o.openDisks(d)
	}
	if err == nil && d.phase != Done {
		err = o.openShared()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open overlay: %w", err), o.closeDisks(), l.Close())
	}
	return o, nil
}

func (o *Durable) openDisks(d decoded) error {
	for i, k := range d.head.Disks {
		dev, err := o.cfg.Below(k.Name)
		if err != nil {
			return fmt.Errorf("disk %s: %w", k.Name, err)
		}
		x := &Disk{o: o, index: i, name: k.Name, size: k.Size, below: dev, in: d.in[i], pending: map[int]bool{}}
		if d.phase == Done {
			x.mode.Store(modePlain)
			o.disks = append(o.disks, x)
			continue
		}
		if dev.Size() < k.Size {
			return fmt.Errorf("disk %s: %d bytes below, the overlay is of %d", k.Name, dev.Size(), k.Size)
		}
		if x.data, err = o.cfg.Data(k.Name, k.Size); err != nil {
			return fmt.Errorf("disk %s: %w", k.Name, err)
		}
		o.disks = append(o.disks, x)
		if x.data.Size() < k.Size {
			return fmt.Errorf("disk %s: the overlay's file has %d bytes, the disk %d", k.Name, x.data.Size(), k.Size)
		}
		x.used.Store(x.in.bytes(x.size))
	}
	return nil
}

// Head is what the overlay is about.
func (o *Durable) Head() Head { return o.log.head }

// Phase is how far it has come.
func (o *Durable) Phase() Phase {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.phase
}

// Disk finds a disk, nil if there is none.
func (o *Durable) Disk(name string) *Disk {
	for _, d := range o.disks {
		if d.name == name {
			return d
		}
	}
	return nil
}

// Bytes are in the overlay now, over all disks.
func (o *Durable) Bytes() (n int64) {
	for _, d := range o.disks {
		if d.mode.Load() != modePlain {
			n += d.used.Load()
		}
	}
	return n
}

// Commit makes it durable that the writes stay; it changes nothing else.
func (o *Durable) Commit() error { return o.enter(Committed) }

// enter makes a phase durable, once.
func (o *Durable) enter(p Phase) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.phase >= p {
		return nil
	}
	if err := o.log.phase(p); err != nil {
		return err
	}
	o.phase = p
	return nil
}

// Close releases the log and the data files; it does not imply Sync. What is
// below stays open. Nothing may be in flight.
func (o *Durable) Close() error {
	if o.closed.Swap(true) {
		return block.ErrClosed
	}
	return errors.Join(o.closeDisks(), o.log.close())
}

func (o *Durable) closeDisks() error {
	var err error
	for _, d := range o.disks {
		unlock := d.still()
		if !d.shut.Swap(true) && d.data != nil {
			err = errors.Join(err, d.data.Close())
		}
		unlock()
	}
	if o.shared != nil {
		err = errors.Join(err, o.shared.Close())
		o.shared = nil
	}
	return err
}

// The boot-scoped copy: a head of 512 bytes, then the words of every disk.
const (
	sharedName  = "overlay"
	sharedMagic = "KVROVS1\n"
	sharedHead  = 512
)

// openShared takes over what an earlier process of this boot had answered.
func (o *Durable) openShared() error {
	if o.cfg.Shared == nil {
		return nil
	}
	head := o.sharedHead()
	f, err := o.cfg.Shared.Open(sharedName, os.O_RDWR)
	if err == nil {
		have := make([]byte, sharedHead)
		if _, rerr := f.ReadAt(have, 0); rerr == nil && string(have) == string(head) {
			o.shared = f
			return o.readShared()
		}
		if err := f.Close(); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return o.makeShared(head)
}

func (o *Durable) sharedHead() []byte {
	b := append(make([]byte, 0, sharedHead), sharedMagic...)
	b = append(b, o.log.head.Set[:]...)
	b = append(b, o.cfg.BootID...)
	b = append(b, make([]byte, sharedHead-4-len(b))...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// makeShared begins the copy anew; its head comes last.
func (o *Durable) makeShared(head []byte) error {
	f, err := o.cfg.Shared.Open(sharedName, os.O_RDWR|os.O_CREATE|os.O_TRUNC)
	if err != nil {
		return err
	}
	o.shared = f
	at := int64(sharedHead)
	for _, d := range o.disks {
		d.sharedAt = at
		at += int64(len(d.in)) * 8
		for w := range d.in {
			if d.in[w].Load() != 0 {
				if err := d.share(w); err != nil {
					return err
				}
			}
		}
	}
	if n, err := f.Size(); err != nil {
		return err
	} else if n < at {
		if err := f.Truncate(at); err != nil {
			return err
		}
	}
	_, err = f.WriteAt(head, 0)
	return err
}

func (o *Durable) readShared() error {
	at := int64(sharedHead)
	buf := make([]byte, 64<<10)
	for _, d := range o.disks {
		d.sharedAt = at
		for w := 0; w < len(d.in); {
			n := min(len(buf)/8, len(d.in)-w)
			if _, err := o.shared.ReadAt(buf[:n*8], at+int64(w)*8); err != nil {
				return fmt.Errorf("read the boot's copy of what is present: %w", err)
			}
			for i := range n {
				logged := d.in[w+i].Load()
				if v := newer(binary.LittleEndian.Uint64(buf[i*8:]), logged); v != logged {
					d.in[w+i].Store(v)
					d.pending[w+i] = true
				}
			}
			w += n
		}
		d.used.Store(d.in.bytes(d.size))
		at += int64(len(d.in)) * 8
	}
	return nil
}

// newer joins a word of the boot's copy with the logged one. A granule never
// goes back below: where the copy says so, writing it had failed.
func newer(copied, logged uint64) uint64 {
	for g := range perWord {
		if copied>>(2*g)&3 == uint64(below) {
			copied |= logged & (3 << (2 * g))
		}
	}
	return copied
}
