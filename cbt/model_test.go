package cbt_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
)

// guest is one writer. It numbers its writes 1, 2, 3, ... over all disks, waits
// for each before the next, and owns sectors that share granules with those of
// the other guests. Whatever a cut shows of it must be the state after some
// prefix of its writes (I3), at least the finished, at most the begun ones.
type guest struct {
	id, of int
	mu     sync.Mutex
	log    []placed // by number-1; guarded by mu
	done   int      // writes finished; guarded by mu
}

type placed struct {
	disk   string
	sector int64
}

const sector = 512

func (q *guest) run(w *world, rnd *rand.Rand, writes int) error {
	for range writes {
		n := w.names[rnd.IntN(len(w.names))]
		sectors := w.sizes[n] / sector
		at := rnd.Int64N(sectors/int64(q.of))*int64(q.of) + int64(q.id)
		q.mu.Lock()
		q.log = append(q.log, placed{n, at})
		num := uint64(len(q.log))
		q.mu.Unlock()
		p := make([]byte, sector)
		for i := 0; i < sector; i += 16 {
			binary.LittleEndian.PutUint64(p[i:], num)
			binary.LittleEndian.PutUint64(p[i+8:], uint64(q.id))
		}
		d := w.g.Disk(n)
		_, err := d.TryWriteAt(p, at*sector)
		if errors.Is(err, block.ErrWouldBlock) {
			_, err = d.WriteAt(p, at*sector)
		}
		if err != nil {
			return err
		}
		q.mu.Lock()
		q.done++
		q.mu.Unlock()
	}
	return nil
}

// counts is how many writes were finished and begun.
func (q *guest) counts() (done, begun int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.done, len(q.log)
}

// explain checks that content is some prefix of the guest's writes. Nothing is
// said of what was kept back.
func (q *guest) explain(w *world, content map[string][]byte, least, most int, keep map[string]int64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	kept := func(p placed) bool {
		from, ok := keep[p.disk]
		return ok && p.sector*sector >= from
	}
	seen := func(p placed) uint64 { return binary.LittleEndian.Uint64(content[p.disk][p.sector*sector:]) }
	var k uint64
	for _, p := range q.log[:most] {
		if !kept(p) {
			k = max(k, seen(p))
		}
	}
	// k is the newest write shown; earlier ones must be there unless
	// overwritten by one up to k. The oldest allowed prefix is least.
	last := map[placed]uint64{}
	for i, p := range q.log[:most] {
		if num := uint64(i + 1); num <= max(k, uint64(least)) {
			last[p] = num
		}
	}
	for p, num := range last {
		if got := seen(p); got != num && !kept(p) {
			return fmt.Errorf("guest %d: %s sector %d shows write %d, want %d (newest shown %d, finished %d, begun %d)", q.id, p.disk, p.sector, got, num, k, least, most)
		}
	}
	return nil
}

func TestEveryCutIsAPrefixOfWhatEachGuestWrote(t *testing.T) {
	shm := shmDir(t)
	rapid.Check(t, func(rt *rapid.T) {
		disks := rapid.IntRange(1, 3).Draw(rt, "disks")
		sizes := map[string]int64{}
		for i := range disks {
			sizes[fmt.Sprintf("vd%c", 'a'+i)] = rapid.Int64Range(8, 700).Draw(rt, "sectors") * sector
		}
		w := newWorld(sizes)
		w.dir = shm
		if rapid.Bool().Draw(rt, "small capture") {
			w.edit = func(c *cbt.Config) { c.CaptureBytes = 3 * granule }
		}
		if err := w.create(blocktest.NewHost()); err != nil {
			rt.Fatal(err)
		}
		seed := rapid.Uint64().Draw(rt, "seed")
		guests := rapid.IntRange(1, 4).Draw(rt, "guests")
		if err := campaign(w, seed, guests, rapid.IntRange(1, 6).Draw(rt, "cuts")); err != nil {
			rt.Fatal(err)
		}
	})
}

// campaign runs guests against cuts, then compares everything.
func campaign(w *world, seed uint64, guests, cuts int) error {
	var qs []*guest
	var wg sync.WaitGroup
	errs := make(chan error, guests)
	for i := range guests {
		q := &guest{id: i, of: guests}
		qs = append(qs, q)
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs <- q.run(w, rand.New(rand.NewPCG(seed, uint64(i))), 400)
		}()
	}
	rnd := rand.New(rand.NewPCG(seed, 99))
	var err error
	for range cuts {
		if err = oneCut(w, qs, rnd); err != nil {
			break
		}
	}
	wg.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	if err != nil {
		return err
	}
	if err := oneCut(w, qs, nil); err != nil { // at rest: everything must be there
		return err
	}
	for _, n := range w.names {
		if !bytes.Equal(w.content[n], w.h.Disk(n, w.sizes[n]).Content()) {
			return fmt.Errorf("disk %s: at rest the replica differs", n)
		}
	}
	if e, err := w.g.Freeze(ctx); err != nil || !e.Empty() {
		return fmt.Errorf("something is dirty at rest: %w", err)
	}
	return w.g.Close(ctx)
}

// oneCut freezes, checks what it shows and acks or abandons. Without rnd it
// must be acked.
func oneCut(w *world, qs []*guest, rnd *rand.Rand) error {
	least, most := make([]int, len(qs)), make([]int, len(qs))
	for i, q := range qs {
		least[i], _ = q.counts()
	}
	e, err := w.g.Freeze(ctx)
	if err != nil {
		return err
	}
	for i, q := range qs {
		_, most[i] = q.counts()
	}
	if e.Empty() {
		return nil
	}
	keep := map[string]int64{}
	if rnd != nil && rnd.IntN(2) == 0 {
		n := w.names[rnd.IntN(len(w.names))]
		keep[n] = rnd.Int64N(w.sizes[n]/granule+1) * granule
		if err := e.Keep(n, keep[n]); err != nil && !errors.Is(err, cbt.ErrOverrun) {
			return err
		}
	}
	if rnd != nil && rnd.IntN(4) == 0 {
		return e.Abandon()
	}
	old, oldPos := w.content, w.pos
	if err := w.ship(e); err != nil {
		if rnd == nil || !errors.Is(err, cbt.ErrOverrun) {
			return err
		}
		return e.Abandon()
	}
	for i, q := range qs {
		if err := q.explain(w, w.content, least[i], most[i], keep); err != nil {
			return err
		}
	}
	if rnd != nil && rnd.IntN(4) == 0 {
		w.content, w.pos = old, oldPos // the replica lost it before committing
		return e.Abandon()
	}
	if err := e.Ack(w.pos); err != nil && !errors.Is(err, cbt.ErrOverrun) {
		return err
	} else if err != nil {
		return errors.Join(e.Abandon(), w.g.Adopt(w.pos))
	}
	return nil
}
