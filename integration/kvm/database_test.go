package kvm_test

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// sighting is a number that the guest had announced as durable by a moment.
type sighting struct {
	word string
	n    uint64
	at   time.Time
}

// witness notes when which announcement was on a console.
type witness struct {
	mu   sync.Mutex
	seen []sighting
}

// watch follows a guest's console until the test ends.
func (w *world) watch(d guest.Domain) *witness {
	w.t.Helper()
	c, err := w.Console("A", d, false)
	w.must(err)
	v := &witness{}
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan struct{})
	w.t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for {
			l, err := c.Wait(ctx, ` (SYNCED|COMMITTED) n=`)
			if err != nil {
				return // the test is over
			}
			v.mu.Lock()
			v.seen = append(v.seen, sighting{word: l.Word, n: l.Uint("n"), at: time.Now()})
			v.mu.Unlock()
		}
	}()
	return v
}

// before is the highest number that was announced before a moment.
func (v *witness) before(word string, at time.Time) (n uint64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range v.seen {
		if s.word == word && s.at.Before(at) {
			n = max(n, s.n)
		}
	}
	return n
}

// sound waits for a guest's verdict on what its disks held when it booted: file
// systems without fault, a database without fault, nothing missing of what was
// announced before the cut. It returns the last transaction, after the guest
// has committed further ones.
func (w *world) sound(what string, c *console.Console, v *witness, cut time.Time) uint64 {
	w.t.Helper()
	w.booted(c, v.before("SYNCED", cut))
	l, ok := c.Last("DATABASE")
	n, least := l.Uint("highest"), v.before("COMMITTED", cut)
	switch fsck, checked := c.Last("FSCK"); {
	case !checked || fsck.Args["clean"] != "true":
		w.t.Fatalf("%s: the file system: %s", what, fsck.Raw)
	case !ok || l.Args["ok"] != "true":
		w.t.Fatalf("%s: the database: %s", what, l.Raw)
	case least == 0 || n < least:
		w.t.Fatalf("%s: transaction %d was announced before the cut, the last one found is %d", what, least, n)
	}
	if _, err := c.WaitWord(w.step(), "COMMITTED"); err != nil {
		w.t.Fatalf("%s: the database takes no more transactions: %v", what, err)
	}
	w.t.Logf("%s: %d transactions, at least %d are right", what, n, least)
	return n
}

// pointAfter waits for a recovery point of a cut that was made later, and
// returns the first one.
func (w *world) pointAfter(vm string, at time.Time) (found wire.Point) {
	w.t.Helper()
	w.eventually("there is a later recovery point", func() bool {
		for _, p := range w.points("B", vm).Points {
			if !p.Latest && p.Cut.After(at) {
				found = p
				return true
			}
		}
		return false
	})
	return found
}

// SQLite with a write-ahead log commits without a pause in a protected guest on
// two disks, while a data plane and both daemons are killed. Every recovery
// point boots as a test copy on the other host: file systems and database are
// without fault, no money is lost, no transaction is missing between others or
// was announced before the cut and is not there, and the database goes on. The
// same holds after an unplanned failover. KVMREPLICA_DATABASE=N waits for N
// points.
func TestEveryPointOfAGuestWithADatabaseBootsSound(t *testing.T) {
	want := 3
	if s := os.Getenv("KVMREPLICA_DATABASE"); s != "" {
		if _, err := fmt.Sscan(s, &want); err != nil {
			t.Fatal(err)
		}
	}
	w := up(t, estate.Options{Tools: map[string]string{"/bin/sqlite3": "sqlite3"}})
	d := w.guest("database", 61, 2, "lab.sql=1 lab.fsck=1 lab.load=256 lab.loadsize=4")
	c := w.start(d)
	v := w.watch(d)
	_, err := c.WaitWord(w.step(), "COMMITTED")
	w.must(err)
	w.eventually("a transaction was seen", func() bool { return v.before("COMMITTED", time.Now()) > 0 })
	w.protect(d, "1s")
	w.ctl("B", "point", "keep", d.Name, "all:1h")
	w.ctl("A", "vm", "limit", d.Name, "512K") // each cut travels for long, while the database writes over it
	kills := []func(){
		func() { w.killPlane("A", d) },
		func() { w.killDaemon("B") },
		func() { w.killDaemon("A") },
	}
	var ps []wire.Point
	for n := range want {
		before := v.before("COMMITTED", time.Now())
		kills[n%len(kills)]()
		w.eventually("the database goes on after the kill", func() bool { return v.before("COMMITTED", time.Now()) > before })
		ps = append(ps, w.pointAfter(d.Name, time.Now()))
	}
	var last uint64
	for _, p := range ps {
		one, cc := w.copyOf(d.Name, "--point", fmt.Sprint(p.Ordinal))
		n := w.sound(fmt.Sprintf("point %d of %s", p.Ordinal, p.Cut.Format("15:04:05.0")), cc, v, p.Cut)
		if n <= last {
			t.Errorf("point %d holds %d transactions, the one before it %d", p.Ordinal, n, last)
		}
		last = n
		w.ctl("B", "failover", "test-stop", d.Name, "--test", one.ID)
	}
	w.ctl("A", "vm", "limit", d.Name, "0") // the faster the machine, the more there is by now
	at := time.Now()
	_, err = w.WaitStatus(w.step(), "A", d.Name, "copied later", func(v status.VM) bool { return v.LastCommit.After(at) })
	w.must(err)
	w.noErrors("A", d, false)
	w.must(w.Lab.Host("A").Crash())
	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("B", "failover", "unplanned", d.Name, "--force", "--yes")
	if n := w.sound("after the failover", b, v, at); n <= last {
		t.Errorf("the newest state holds %d transactions, the last point %d", n, last)
	}
	w.noErrors("B", d, true)
}
