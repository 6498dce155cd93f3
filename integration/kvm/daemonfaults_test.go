package kvm_test

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
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
// call (234 kinds) with every error it can give, the first, a later one, and all of them;
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

// faultRound is one round in the campaign's file.
type faultRound struct {
	Seed       uint64 `json:"seed"`
	Fault      string `json:"fault"`
	Failed     int    `json:"failed"`    // calls
	Restarted  bool   `json:"restarted"` // the daemon ended, and was started again
	Said       bool   `json:"said"`      // the cause, to whoever asked or in a log
	Operations int    `json:"operations"`
}

// byNeed puts first what a campaign has seen least of: kinds that are not in its
// file, then those that reached no call, so that a run that ends early is gone
// on with.
func byNeed(faults []daemonFault, seen []faultRound) []daemonFault {
	need := map[string]int{}
	for _, r := range seen {
		need[r.Fault]++
		if r.Failed > 0 {
			need[r.Fault] += len(seen)
		}
	}
	faults = slices.Clone(faults)
	slices.SortStableFunc(faults, func(a, b daemonFault) int { return cmp.Compare(need[a.String()], need[b.String()]) })
	return faults
}

// faultTotals counts a campaign: kinds of fault, those of them that reached a
// call, and operations of the client.
func faultTotals(rounds []faultRound) (kinds, reached, ops int) {
	hit := map[string]bool{}
	for _, r := range rounds {
		hit[r.Fault] = hit[r.Fault] || r.Failed > 0
		ops += r.Operations
	}
	for _, ok := range hit {
		if ok {
			reached++
		}
	}
	return len(hit), reached, ops
}

func TestACampaignOfFaultsBeginsWithWhatItHasNotSeen(t *testing.T) {
	kinds := []daemonFault{{"A", "openat", "EIO", "1"}, {"B", "openat", "EIO", "1"}, {"A", "write", "EIO", "5"}}
	seen := []faultRound{
		{Fault: kinds[0].String(), Failed: 2, Operations: 10},
		{Fault: kinds[1].String(), Operations: 5},
		{Fault: kinds[1].String(), Operations: 5},
		{Fault: kinds[1].String(), Operations: 5},
	}
	if got, want := byNeed(kinds, seen), []daemonFault{kinds[2], kinds[1], kinds[0]}; !slices.Equal(got, want) {
		t.Errorf("the order is %v, want %v", got, want)
	}
	if k, r, ops := faultTotals(seen); k != 2 || r != 1 || ops != 25 {
		t.Errorf("totals: %d kinds, %d reached, %d operations", k, r, ops)
	}
}

// System calls of a real replicad fail, on the primary or on the replica, while
// a client writes over four connections. No request of the client fails; when
// the calls work again replication goes on by itself (a daemon that ended is
// started again, as systemd does), what the replica holds is a legal cut not
// older than what was acknowledged, nothing was copied whole, and while every
// call fails the cause is said. "make faults" counts the rounds over all runs
// that share the file KVMREPLICA_CAMPAIGN.
func TestFailingSystemCallsOfADaemonAreOvercome(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	seed := seeded(t)
	path := os.Getenv("KVMREPLICA_CAMPAIGN")
	if os.Getenv("KVMREPLICA_FAULTS") == "" {
		path = "" // what runs every time is no campaign
	}
	c, err := campaign.Open[faultRound](path)
	w.must(err)
	s := &siege{world: w, rng: rand.New(rand.NewPCG(seed, 5)), seed: seed, env: []string{traced}}
	s.prepare()
	spare := w.smallGuest("spare", 61, 1<<20)
	w.must(w.Define(w.step(), "A", spare))
	s.spare = spare.Name
	for _, h := range []string{"A", "B"} {
		w.must(w.Daemon(h).Kill())
		w.must(w.StartDaemon(w.step(), h, s.env...))
	}
	for i, f := range byNeed(daemonFaults(t), c.Entries) {
		r := s.fail(i, f)
		w.must(c.Add(r))
		t.Logf("%+v", r)
		if r.Failed == 0 && f.call == "fdatasync" && f.when == "1+" {
			t.Errorf("%s: no call failed", f)
		}
	}
	s.final()
	kinds, reached, ops := faultTotals(c.Entries)
	t.Logf("the whole campaign: %d kinds, %d of which reached a call; %d operations", kinds, reached, ops)
}

// traced keeps a Go program alive under strace: see labtest.Inject.
const traced = "GODEBUG=asyncpreemptoff=1"

// reachWithin is how long calls are waited for, a few cycles, and enoughHits how
// many of them end that wait. They are provoked again each time prodAgain has
// passed; manyFaults is more than there are kinds.
const (
	reachWithin = 15 * time.Second
	enoughHits  = 3
	prodAgain   = 300 * time.Millisecond
	manyFaults  = 1000
)

// fail is one round; it returns what came of it.
func (s *siege) fail(i int, f daemonFault) faultRound {
	s.t.Helper()
	r := faultRound{Seed: s.seed, Fault: f.String()}
	s.round(i, f.String(), func() {
		d := s.Daemon(f.host)
		from := s.logged()
		fault := labtest.Inject(s.t, d.Pid(), f.call, f.errno, f.when)
		ctx, cancel := context.WithTimeout(s.t.Context(), reachWithin)
		defer cancel()
		var answers strings.Builder
		for n, enough := 0, false; !enough && ctx.Err() == nil; n++ {
			answers.WriteString(s.prod(ctx, i+n*manyFaults, f))
			soon, cancel := context.WithTimeout(ctx, prodAgain)
			enough = waitFor(soon, func() bool { return fault.Hits() >= enoughHits || over(d) }) == nil // counted below
			cancel()
		}
		s.progress(100)
		if f.lasting() && fault.Hits() > 0 {
			s.eventually("the cause of "+f.String()+" is said", func() bool { return s.says(f, answers.String(), from) || over(d) })
		}
		fault.End()
		r.Failed = fault.Hits()
		r.Said = s.says(f, answers.String(), from)
		if r.Restarted = s.ended(f.host, d); r.Restarted {
			s.must(s.StartDaemon(s.step(), f.host, s.env...))
		}
	})
	r.Operations = s.ops
	return r
}

// prod lets a daemon keep something, remove something, make connections and take
// them, well or not; it returns what the person who asks for that is told.
func (s *siege) prod(ctx context.Context, i int, f daemonFault) string {
	other := map[string]string{"A": "B", "B": "A"}[f.host]
	asks := map[string][]string{other: {"peer", "test", estate.Peer(f.host)}}
	switch {
	case f.call == "connect" || f.call == "accept4":
		asks[f.host] = []string{"peer", "test", estate.Peer(other)}
	case f.call == "unlinkat" && i/manyFaults%2 == 0:
		asks = map[string][]string{"A": {"vm", "enable", s.spare, "--to", estate.Peer("B"), "--yes"}, "B": {"point", "mount", s.d.Name}}
	case f.call == "unlinkat":
		asks = map[string][]string{"A": {"vm", "disable", s.spare, "--yes"}, "B": {"point", "unmount", s.d.Name}}
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

// ended waits until a daemon answers, or has ended: one whose runtime failed may
// still be writing what it knows.
func (s *siege) ended(host string, d *lab.Daemon) bool {
	s.t.Helper()
	s.eventually("the daemon on "+host+" answers or ends", func() bool {
		if over(d) {
			return true
		}
		ctx, cancel := context.WithTimeout(s.t.Context(), reachWithin)
		defer cancel()
		_, err := s.Status(ctx, host, s.d.Name)
		return err == nil
	})
	return over(d)
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
