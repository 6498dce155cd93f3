package main

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"sync"
	"time"
)

// Background load: blocks of 4 KiB at random places of a preallocated file on
// each disk. A block carries its own number and a checksum, so that a copy can
// be checked: number (8 bytes), boot (8), filler, CRC-32C (4).
const (
	loadBlock = 4096
	loadTick  = 100 * time.Millisecond
)

func loadContent(number, boot uint64) []byte {
	b := make([]byte, loadBlock)
	binary.LittleEndian.PutUint64(b, number)
	binary.LittleEndian.PutUint64(b[8:], boot)
	src := rand.NewPCG(number, boot)
	for i := 16; i+8 <= loadBlock-4; i += 64 { // enough to defeat compression a little
		binary.LittleEndian.PutUint64(b[i:], src.Uint64())
	}
	binary.LittleEndian.PutUint32(b[loadBlock-4:], loadSum(b))
	return b
}

func loadSum(b []byte) uint32 {
	return crc32.Checksum(b[:loadBlock-4], crc32.MakeTable(crc32.Castagnoli))
}

// verifyLoad checks every block of every load file.
func (g *guest) verifyLoad() {
	for _, d := range g.disks {
		f, err := os.Open(d.file("load"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			g.say("ERROR op=load err=%q", err.Error())
			continue
		}
		blocks, bad := countLoad(f)
		_ = f.Close()
		g.say("LOAD dev=%s blocks=%d bad=%d", d.dev, blocks, bad)
	}
}

func countLoad(r io.Reader) (blocks, bad uint64) {
	b := make([]byte, loadBlock)
	for {
		if _, err := io.ReadFull(r, b); err != nil {
			return blocks, bad
		}
		if binary.LittleEndian.Uint64(b) != blocks || binary.LittleEndian.Uint32(b[loadBlock-4:]) != loadSum(b) {
			bad++
		}
		blocks++
	}
}

// startLoad begins the background load and returns what ends it.
func (g *guest) startLoad(boot uint64) (stop func()) {
	if g.knobs.load == 0 {
		return func() {}
	}
	var files []*os.File
	for _, d := range g.disks {
		f, err := prepareLoad(d.file("load"), g.knobs.loadSize/loadBlock, boot)
		if err != nil {
			g.say("ERROR op=load err=%q", err.Error())
			return func() {}
		}
		files = append(files, f)
	}
	g.say("LOADING rate=%d", g.knobs.load)
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { g.loadLoop(files, boot, quit) })
	return func() {
		close(quit)
		wg.Wait()
		for _, f := range files {
			_ = f.Close() // a lost write shows in the next verification
		}
	}
}

// prepareLoad fills a new file, so that the load never allocates.
func prepareLoad(path string, blocks int64, boot uint64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0o644)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	part := path + ".new" // a crash in between leaves no half file
	if f, err = os.Create(part); err != nil {
		return nil, err
	}
	for i := range blocks {
		if _, err := f.Write(loadContent(uint64(i), boot)); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	if err := f.Sync(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, os.Rename(part, path)
}

// loadLoop writes its share of blocks ten times a second and syncs in turn.
func (g *guest) loadLoop(files []*os.File, boot uint64, quit <-chan struct{}) {
	tick := time.NewTicker(loadTick)
	defer tick.Stop()
	perTick := max(int(g.knobs.load*int64(loadTick)/int64(time.Second)/loadBlock), 1)
	for round := 0; ; round++ {
		select {
		case <-quit:
			return
		case <-tick.C:
		}
		f := files[round%len(files)]
		for range perTick {
			n := rand.Int64N(g.knobs.loadSize / loadBlock)
			if _, err := f.WriteAt(loadContent(uint64(n), boot), n*loadBlock); err != nil {
				g.say("ERROR op=load err=%q", err.Error())
				return
			}
		}
		if round%10 < len(files) {
			if err := f.Sync(); err != nil {
				g.say("ERROR op=load err=%q", err.Error())
				return
			}
		}
	}
}
