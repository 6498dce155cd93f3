package kernel_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/session/sessiontest"
)

const (
	databaseDisk  = 24 << 20
	transactions  = 30
	accounts      = 50
	pointsChecked = 8
)

// ledger knows which transactions a cut must and may contain.
type ledger struct {
	mu     sync.Mutex
	issued int
	acked  int
	bounds map[uint64][2]int // by epoch: at least, at most
}

// marked notes the ledger around each freeze.
type marked struct {
	*dataplane.Client
	l *ledger
}

func (m marked) Freeze(ctx context.Context, r dataplane.FreezeRequest) (dataplane.Epoch, error) {
	m.l.mu.Lock()
	least := m.l.acked
	m.l.mu.Unlock()
	e, err := m.Client.Freeze(ctx, r)
	if err == nil && !e.Empty {
		m.l.mu.Lock()
		m.l.bounds[e.Epoch] = [2]int{least, m.l.issued}
		m.l.mu.Unlock()
	}
	return e, err
}

// TestEveryPointOfADatabaseIsConsistent: SQLite with a write-ahead log on ext4
// on the kernel's NBD client on our export, replicated while it commits. Each
// recovery point becomes a disk of another machine: ext4 replays its journal,
// SQLite its log; every account is there, no money is lost, and every
// transaction that was answered before the cut is in it.
func TestEveryPointOfADatabaseIsConsistent(t *testing.T) {
	long(t)
	tools := map[string]string{"/bin/sqlite3": "sqlite3"}
	m := boot(t, tools)
	m.sh(fmt.Sprintf("truncate -s %d /data/vda.raw", databaseDisk))
	m.serve(dataplane.DiskConfig{Name: "vda", Kind: dataplane.Raw, Path: "/data/vda.raw"})
	m.start("hold", "/bin/knbd hold 0 "+m.cfg.NBDSocket()+" vda 1", "attached")
	m.sh("/sbin/mke2fs -q -t ext4 -F /dev/nbd0 && mkdir -p /mnt/n && mount -t ext4 /dev/nbd0 /mnt/n")
	m.sql(fmt.Sprintf("pragma journal_mode=wal; create table account(id integer primary key, money integer); create table log(id integer primary key, note blob);"+
		"with recursive n(i) as (select 1 union all select i+1 from n where i<%d) insert into account select i, 100 from n;", accounts))
	l := &ledger{bounds: map[uint64][2]int{}}
	store, s, stop := m.replicate(l)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range transactions {
		l.mu.Lock()
		l.issued = i + 1
		l.mu.Unlock()
		m.sql(fmt.Sprintf("pragma synchronous=full; pragma wal_autocheckpoint=20; begin; "+
			"update account set money=money-1 where id=%d; update account set money=money+1 where id=%d; insert into log values(%d, randomblob(3000)); commit;",
			1+rng.IntN(accounts), 1+rng.IntN(accounts), i+1))
		l.mu.Lock()
		l.acked = i + 1
		l.mu.Unlock()
	}
	ctx, cancel := context.WithTimeout(m.ctx, patience)
	defer cancel()
	last, err := s.SyncFinal(ctx)
	must(t, err)
	m.Cut() // the host is gone; what counts now is the replica
	stop()
	must(t, store.ApplyAll(ctx))
	all := []delta.Pos{last}
	for _, p := range store.Points() {
		must(t, p.Damage)
		if _, known := l.bounds[p.Pos.Epoch]; known && p.Pos != last {
			all = append(all, p.Pos)
		}
	}
	rng.Shuffle(len(all)-1, func(i, j int) { all[i+1], all[j+1] = all[j+1], all[i+1] })
	checked := all[:min(len(all), pointsChecked)]
	if len(checked) < 3 {
		t.Fatalf("only %d recovery points", len(checked))
	}
	var disks []string
	for _, p := range checked {
		disks = append(disks, offer(t, store, p))
	}
	c := boot(t, tools, disks...)
	for i, p := range checked {
		found := c.sh(fmt.Sprintf("mkdir -p /p && mount -t ext4 /dev/vd%c /p && cd /p && /bin/sqlite3 db 'pragma integrity_check; select count(*), sum(money) from account; select count(*), coalesce(max(id), 0) from log;'; "+
			"cd / && umount /p && /sbin/e2fsck -fn /dev/vd%c >/dev/null 2>&1; echo fsck $?", 'b'+i, 'b'+i))
		bounds := l.bounds[p.Epoch]
		var count, highest int
		lines := strings.Split(found, "\n")
		if len(lines) != 4 || lines[0] != "ok" || lines[1] != fmt.Sprintf("%d|%d", accounts, accounts*100) || lines[3] != "fsck 0" {
			t.Fatalf("point %v: %s", p, found)
		}
		if _, err := fmt.Sscanf(lines[2], "%d|%d", &count, &highest); err != nil || count != highest || highest < bounds[0] || highest > bounds[1] {
			t.Fatalf("point %v holds %d transactions up to %d, %d to %d are right", p, count, highest, bounds[0], bounds[1])
		}
		t.Logf("point %v: %d transactions (%d to %d)", p, highest, bounds[0], bounds[1])
	}
	t.Logf("%d of %d recovery points checked", len(checked), len(all))
}

// sql runs statements; it returns when they are committed.
func (m *machine) sql(text string) {
	m.t.Helper()
	_, err := m.Exec(m.ctx, "/bin/sqlite3", "-bail", "/mnt/n/db", text)
	must(m.t, err)
}

// replicate ships the data plane's disk into a store on this machine.
func (m *machine) replicate(l *ledger) (*points.Store, *session.Session, func()) {
	m.t.Helper()
	vm, err := delta.ParseVM(string(vmID))
	must(m.t, err)
	cfg := points.Config{VM: vm, Policy: points.Policy{MinDistance: time.Millisecond}, Limits: points.Limits{SpoolStep: 1 << 20}}
	must(m.t, (&points.Dir{Path: m.t.TempDir()}).Configure(&cfg))
	store, err := points.Create(cfg, []delta.Disk{{Name: "vda", Size: databaseDisk}})
	must(m.t, err)
	m.t.Cleanup(func() { _ = store.Close() })
	s := session.New(session.Config{
		VM: vmID, Name: "guest", Source: marked{m.plane, l}, Interval: 300 * time.Millisecond, Verified: true, Holes: true,
		Replica: &sessiontest.Replica{Get: func() (*points.Store, error) { return store, nil }, Generation: delta.Generation{7}},
	})
	ctx, cancel := context.WithCancel(context.WithoutCancel(m.ctx))
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{s.Run, store.Run} {
		wg.Go(func() {
			if err := run(ctx); !errors.Is(err, context.Canceled) {
				m.t.Error(err)
			}
		})
	}
	stop := sync.OnceFunc(func() { cancel(); wg.Wait() })
	m.t.Cleanup(stop)
	return store, s, stop
}

// offer serves a copy of a recovery point on a unix socket.
func offer(t *testing.T, store *points.Store, p delta.Pos) string {
	t.Helper()
	v, err := store.View(p)
	must(t, err)
	defer v.Close()
	d, err := v.Disk("vda")
	must(t, err)
	b := make([]byte, d.Size())
	_, err = d.ReadAt(b, 0)
	must(t, err)
	copied := block.NewMem(d.Size())
	_, err = copied.WriteAt(b, 0)
	must(t, err)
	srv := nbd.NewServer(nbd.Options{})
	must(t, srv.Add(nbd.Export{Device: copied}))
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(context.Background(), ln) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := errors.Join(srv.Shutdown(ctx), <-served); err != nil && !errors.Is(err, nbd.ErrServerClosed) {
			t.Error(err)
		}
	})
	return socket
}
