package main

import (
	"math/rand/v2"
	"os"
	"time"

	"kvmreplica/integration/lab/record"
)

// write appends records until the power key, lab.max or an error.
func (g *guest) write(v record.Verdict) {
	boot := rand.Uint64()
	for i := range g.disks {
		if err := g.openLog(i, v.Highest); err != nil {
			g.say("ERROR op=open n=%d err=%q", v.Highest, err.Error())
			return
		}
	}
	stopLoad, stopDatabase := g.startLoad(boot), g.startDatabase()
	n := g.appendAll(v.Highest, boot)
	stopDatabase()
	stopLoad()
	g.say("LAST n=%d powerkey=%v", n, g.pressed())
	for _, d := range g.disks {
		if err := d.log.Close(); err != nil {
			g.say("ERROR op=close err=%q", err.Error())
		}
	}
}

// openLog opens the log of disk i behind its last good record.
func (g *guest) openLog(i int, highest uint64) error {
	f, err := os.OpenFile(g.disks[i].file("log"), os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	g.disks[i].log = f
	disks := uint64(len(g.disks))
	mine := (highest + disks - 1 - uint64(i)) / disks // records 1..highest on disk i
	if err := f.Truncate(int64(mine) * record.Size); err != nil {
		return err
	}
	if _, err := f.Seek(0, 2); err != nil {
		return err
	}
	dir, err := os.Open(g.disks[i].file(""))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync() // the name must survive what the first record survives
}

// appendAll returns the number of the last durable record.
func (g *guest) appendAll(last, boot uint64) uint64 {
	var worst time.Duration
	said := time.Now()
	for n := last + 1; !g.pressed() && (g.knobs.max == 0 || n <= g.knobs.max); n++ {
		began := time.Now()
		log := g.disks[record.Disk(n, len(g.disks))].log
		r := record.Record{Number: n, Millis: began.UnixMilli(), Boot: boot, Disks: uint32(len(g.disks))}
		_, err := log.Write(r.Encode())
		if err == nil {
			err = log.Sync()
		}
		if err != nil {
			g.say("ERROR op=append n=%d err=%q", n, err.Error())
			return last
		}
		last = n
		took := time.Since(began)
		worst = max(worst, took)
		if n == 1 || time.Since(said) >= g.knobs.announce {
			g.say("SYNCED n=%d last_ms=%d worst_ms=%d", n, took.Milliseconds(), worst.Milliseconds())
			said, worst = time.Now(), 0
		}
		select {
		case <-g.powerKey:
		case <-time.After(g.knobs.interval):
		}
	}
	return last
}
