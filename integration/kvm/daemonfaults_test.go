package kvm_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"kvmreplica/integration/campaign"
	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/labtest"
)

// Every sync of a real replicad fails for a while, on the primary, then on the
// replica, while a client writes over four connections. No request of the
// client fails; when syncs work again replication goes on by itself (a daemon
// that ended is started again, as systemd does), what the replica holds is a
// legal cut, and nothing was copied whole.
func TestFailingSystemCallsOfADaemonAreOvercome(t *testing.T) {
	w := up(t, estate.Options{Config: anyClient})
	seed := seeded(t)
	c, err := campaign.Open[killRound]("")
	w.must(err)
	s := &siege{world: w, rng: rand.New(rand.NewPCG(seed, 5)), rounds: c, seed: seed, env: []string{traced}}
	s.prepare()
	for i, h := range []string{"A", "B"} {
		w.must(w.Daemon(h).Kill())
		w.must(w.StartDaemon(w.step(), h, s.env...))
		if s.fail(i, h, "fdatasync", "EIO") == 0 {
			t.Errorf("no sync of the daemon on %s failed", h)
		}
	}
	s.final()
}

// traced keeps a Go program alive under strace: see labtest.Inject.
const traced = "GODEBUG=asyncpreemptoff=1"

// reachWithin is how long a call is waited for: a few cycles.
const reachWithin = 10 * time.Second

// fail is one round; it returns how many calls have failed.
func (s *siege) fail(i int, host, call, errno string) (hits int) {
	s.t.Helper()
	what := fmt.Sprintf("%s %s on %s", call, errno, host)
	ended := "went on"
	s.round(i, what, func() {
		d := s.Daemon(host)
		fault := labtest.Inject(s.t, d.Pid(), call, errno, "1+")
		ctx, cancel := context.WithTimeout(s.t.Context(), reachWithin)
		defer cancel()
		_ = waitFor(ctx, func() bool { return fault.Hits() > 0 }) // counted below
		s.progress(100)
		fault.End()
		hits = fault.Hits()
		select {
		case <-d.Done():
			ended = "was started again"
			s.must(s.StartDaemon(s.step(), host, s.env...))
		default:
		}
	})
	s.t.Logf("%s: %d calls failed; the daemon %s; %d operations", what, hits, ended, s.ops)
	return hits
}
