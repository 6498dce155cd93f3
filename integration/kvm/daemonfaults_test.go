package kvm_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kvmreplica/integration/campaign"
	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab"
	"kvmreplica/integration/lab/labtest"
)

// daemonFault is what strace does to a replicad that runs.
type daemonFault struct {
	host, call, errno string
	when              string // which of each thread's calls, as strace writes it
}

func (f daemonFault) String() string {
	return fmt.Sprintf("%s %s %s on %s", f.call, f.errno, f.when, f.host)
}

// lasting says that every call fails, with an error that nobody may just repeat.
func (f daemonFault) lasting() bool {
	return f.when == "1+" && f.errno != "EINTR" && f.errno != "EAGAIN" && f.call != "write" // what says it is a write
}

// cause is the error as a person reads it.
func (f daemonFault) cause() string {
	for e := syscall.Errno(1); e < 200; e++ {
		if unix.ErrnoName(e) == f.errno {
			return e.Error()
		}
	}
	return f.errno
}

// daemonFaults is what runs every time; KVMREPLICA_FAULTS=full makes it every
// call with every error it can give, the first, a later one, and all of them,
// any other text those whose name matches it.
func daemonFaults(t *testing.T) []daemonFault {
	t.Helper()
	want := os.Getenv("KVMREPLICA_FAULTS")
	if want == "" {
		return []daemonFault{
			{"A", "fdatasync", "EIO", "1+"},
			{"A", "openat", "EMFILE", "1+"},
			{"B", "fdatasync", "EIO", "1+"},
			{"B", "pwrite64", "ENOSPC", "1+"},
			{"B", "accept4", "ENFILE", "1"},
		}
	}
	var all []daemonFault
	for _, c := range []struct {
		call   string
		errnos []string
	}{
		{"openat", []string{"EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EINTR"}},
		{"write", []string{"EIO", "ENOSPC", "EDQUOT", "ENOMEM", "EINTR"}},
		{"pwrite64", []string{"EIO", "ENOSPC", "EDQUOT", "ENOMEM", "EINTR"}},
		{"fdatasync", []string{"EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR"}},
		{"renameat", []string{"EIO", "ENOSPC", "EDQUOT", "EROFS", "ENOMEM"}},
		{"unlinkat", []string{"EIO", "EROFS", "ENOMEM"}},
		{"connect", []string{"ENOMEM", "EINTR", "EAGAIN"}},
		{"accept4", []string{"EMFILE", "ENFILE", "ENOMEM", "EINTR", "EAGAIN"}},
	} {
		for _, errno := range c.errnos {
			for _, when := range []string{"1", "5", "1+"} {
				for _, host := range []string{"A", "B"} {
					if f := (daemonFault{host, c.call, errno, when}); want == "full" || matching(t, want, f.String()) {
						all = append(all, f)
					}
				}
			}
		}
	}
	return all
}

func matching(t *testing.T, pattern, text string) bool {
	t.Helper()
	ok, err := regexp.MatchString(pattern, text)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

// System calls of a real replicad fail, on the primary or on the replica, while
// a client writes over four connections. No request of the client fails; when
// the calls work again replication goes on by itself (a daemon that ended is
// started again, as systemd does), what the replica holds is a legal cut not
// older than what was acknowledged, nothing was copied whole, and while every
// call fails the cause is said.
func TestFailingSystemCallsOfADaemonAreOvercome(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	seed := seeded(t)
	c, err := campaign.Open[killRound]("")
	w.must(err)
	s := &siege{world: w, rng: rand.New(rand.NewPCG(seed, 5)), rounds: c, seed: seed, env: []string{traced}}
	s.prepare()
	for _, h := range []string{"A", "B"} {
		w.must(w.Daemon(h).Kill())
		w.must(w.StartDaemon(w.step(), h, s.env...))
	}
	var table []string
	for i, f := range daemonFaults(t) {
		hits, row := s.fail(i, f)
		table = append(table, row)
		if hits == 0 && f.call == "fdatasync" && f.when == "1+" {
			t.Errorf("%s: no call failed", f)
		}
	}
	s.final()
	t.Logf("\n%s", strings.Join(table, "\n"))
}

// traced keeps a Go program alive under strace: see labtest.Inject.
const traced = "GODEBUG=asyncpreemptoff=1"

// reachWithin is how long calls are waited for, a few cycles, and enoughHits how
// many of them end that wait.
const (
	reachWithin = 10 * time.Second
	enoughHits  = 3
)

// fail is one round; it returns how many calls have failed, and a line that
// says what came of it.
func (s *siege) fail(i int, f daemonFault) (hits int, row string) {
	s.t.Helper()
	ended, told := "went on", "not said"
	s.round(i, f.String(), func() {
		d := s.Daemon(f.host)
		from := s.logged()
		fault := labtest.Inject(s.t, d.Pid(), f.call, f.errno, f.when)
		ctx, cancel := context.WithTimeout(s.t.Context(), reachWithin)
		defer cancel()
		answers := s.prod(ctx, i, f)
		_ = waitFor(ctx, func() bool { return fault.Hits() >= enoughHits }) // counted below
		s.progress(100)
		if f.lasting() && fault.Hits() > 0 {
			s.eventually("the cause of "+f.String()+" is said", func() bool { return s.says(f, answers, from) || over(d) })
		}
		fault.End()
		hits = fault.Hits()
		if s.says(f, answers, from) {
			told = "said"
		}
		if over(d) {
			ended = "was started again"
			s.must(s.StartDaemon(s.step(), f.host, s.env...))
		}
	})
	row = fmt.Sprintf("%-30s %5d calls failed; the daemon %s; the cause is %s; %d operations", f, hits, ended, told, s.ops)
	s.t.Log(row)
	return hits, row
}

// prod lets a daemon keep something, make connections and take them, well or
// not; it returns what the person who asks for that is told.
func (s *siege) prod(ctx context.Context, i int, f daemonFault) string {
	other := map[string]string{"A": "B", "B": "A"}[f.host]
	asks := map[string][]string{other: {"peer", "test", estate.Peer(f.host)}}
	switch {
	case f.call == "connect" || f.call == "accept4":
		asks[f.host] = []string{"peer", "test", estate.Peer(other)}
	case f.host == "A":
		asks = map[string][]string{"A": {"vm", "limit", s.d.Name, fmt.Sprint(1<<30 + i)}} // replaces the record
	default:
		asks = map[string][]string{"B": {"point", "keep", s.d.Name, fmt.Sprintf("all:%dm", 60+i)}} // the same
	}
	var mu sync.Mutex
	var said strings.Builder
	var wg sync.WaitGroup
	for host, args := range asks {
		wg.Go(func() {
			out, _ := s.Ctl(ctx, host, args...) // it may fail: that is what is looked at
			mu.Lock()
			defer mu.Unlock()
			said.WriteString(out)
		})
	}
	wg.Wait()
	return said.String()
}

// over reports that a daemon has ended.
func over(d *lab.Daemon) bool {
	select {
	case <-d.Done():
		return true
	default:
		return false
	}
}

// logged is how long the daemons' logs are.
func (s *siege) logged() map[string]int {
	s.t.Helper()
	n := map[string]int{}
	for _, h := range []string{"A", "B"} {
		b, err := os.ReadFile(s.Daemon(h).LogPath)
		s.must(err)
		n[h] = len(b)
	}
	return n
}

// says reports that the cause was told, to whoever asked or in a daemon's log.
func (s *siege) says(f daemonFault, answers string, since map[string]int) bool {
	s.t.Helper()
	if strings.Contains(answers, f.cause()) {
		return true
	}
	for h, from := range since {
		b, err := os.ReadFile(s.Daemon(h).LogPath)
		s.must(err)
		if bytes.Contains(b[min(from, len(b)):], []byte(f.cause())) {
			return true
		}
	}
	return false
}
