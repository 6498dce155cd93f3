package histories_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"kvmreplica/integration/campaign"
	"kvmreplica/integration/lab/labtest"
)

// played is one history in the campaign's file.
type played struct {
	Seed    uint64         `json:"seed"`
	Outcome string         `json:"outcome"` // ok, violation or unplayed
	Why     string         `json:"why,omitempty"`
	Seconds float64        `json:"seconds"`
	Boots   int            `json:"boots"`   // of the guest
	Records uint32         `json:"records"` // the longest line that it wrote
	Forks   int            `json:"forks"`   // that the operator had to decide
	Did     map[string]int `json:"did"`
}

// Outcomes.
const (
	fine     = "ok"
	violated = "violation"
	unplayed = "unplayed"
)

func envInt(name string, otherwise uint64) uint64 {
	n, err := strconv.ParseUint(os.Getenv(name), 10, 64)
	if err != nil {
		return otherwise
	}
	return n
}

// perWorld is how many histories one pair of hosts lives through.
const perWorld = 20

// Random failover histories of the real daemons, each with a VM of its own:
// kills, power cuts, a cut link, planned and unplanned failovers, trials
// committed and cancelled, returns, hosts put back to an earlier state. Two
// guests never run unless a person forced it, no fork goes unnoticed, nothing
// acknowledged is lost, every disk a guest finds is one that a guest wrote, and
// when the faults stop a person who follows status and health gets one owner
// and a complete copy. KVMREPLICA_HISTORIES=N plays N further ones ("make
// histories"), from seed FIRST on or after the last one, counted over all runs
// that share the file KVMREPLICA_CAMPAIGN; SEED=k plays one again.
func TestRandomFailoverHistoriesOfTheRealDaemonsForkNothingUnseenAndLoseNothingAcknowledged(t *testing.T) {
	labtest.Require(t)
	file := os.Getenv("KVMREPLICA_CAMPAIGN")
	again := envInt("SEED", 0)
	c, err := campaign.Open[played](file)
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(c.Entries, func(p played) bool { return p.Seed == again }) {
		c = &campaign.File[played]{} // what is played again is no further one
	}
	seeds := make(chan uint64)
	go func() {
		defer close(seeds)
		if again != 0 {
			seeds <- again
			return
		}
		first := envInt("FIRST", 1)
		for _, p := range c.Entries {
			first = max(first, p.Seed+1)
		}
		for s := first; s < first+envInt("KVMREPLICA_HISTORIES", 2); s++ {
			seeds <- s
		}
	}()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range envInt("KVMREPLICA_LABS", 1) {
		wg.Go(func() {
			var w *world
			defer func() { end(t, w) }()
			for seed := range seeds {
				p, left := playOne(t, w, seed)
				w = left
				mu.Lock()
				err := c.Add(p)
				mu.Unlock()
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	t.Log(totals(c.Entries))
}

// playOne plays a history in a world, or in a new one, and returns the world if
// it is fit for another.
func playOne(t *testing.T, w *world, seed uint64) (p played, left *world) {
	ctx := t.Context()
	if w == nil {
		var err error
		if w, err = newWorld(ctx); err != nil {
			t.Errorf("make an estate: %v", err)
			return played{Seed: seed, Outcome: unplayed, Why: err.Error()}, nil
		}
	}
	h := newHistory(w, seed)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	err := h.play(ctx)
	p = h.played(err)
	t.Logf("seed %d: %s in %.1fs, %d boots, %d records, %d forks", seed, p.Outcome, p.Seconds, p.Boots, p.Records, p.Forks)
	w.used++
	if envInt("SEED", 0) != 0 && err == nil {
		t.Log("\n" + h.story())
	}
	if err != nil {
		t.Errorf("%v\nSEED=%d make histories\n%s", err, seed, h.story())
		w.logs(t)
	}
	if err = errors.Join(err, h.forget()); err != nil || w.used >= perWorld {
		end(t, w)
		return p, nil
	}
	return p, w
}

func end(t *testing.T, w *world) {
	if w == nil {
		return
	}
	if err := w.down(); err != nil {
		t.Errorf("take the estate down: %v", err)
	}
}

func (h *history) played(err error) played {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := played{Seed: h.seed, Outcome: fine, Seconds: time.Since(h.began).Round(100 * time.Millisecond).Seconds(), Boots: h.boots, Forks: h.forks, Did: h.done}
	switch {
	case errors.Is(err, errViolation):
		p.Outcome, p.Why = violated, err.Error()
	case err != nil:
		p.Outcome, p.Why = unplayed, err.Error()
	}
	for _, l := range h.book.lives {
		p.Records = max(p.Records, l.high)
	}
	return p
}

// totals adds a campaign up.
func totals(all []played) string {
	did, outcomes := map[string]int{}, map[string]int{}
	seconds, boots, records, forks := 0.0, 0, uint32(0), 0
	for _, p := range all {
		outcomes[p.Outcome]++
		seconds, boots, records, forks = seconds+p.Seconds, boots+p.Boots, records+p.Records, forks+p.Forks
		for k, n := range p.Did {
			did[k] += n
		}
	}
	var keys []string
	for k := range did {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	s := fmt.Sprintf("the whole campaign: %d histories %v in %.0f s, %d boots, %d records, %d forks; done:", len(all), outcomes, seconds, boots, records, forks)
	for _, k := range keys {
		s += fmt.Sprintf(" %s %d,", k, did[k])
	}
	return s[:len(s)-1]
}
