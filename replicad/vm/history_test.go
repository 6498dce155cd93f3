package vm

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/points"
)

// history is one random life of a pair. Its operators, link and power obey the
// seed; its timing is the machine's.
type history struct {
	*pair
	r     *rand.Rand
	log   []string
	acked uint64 // the counter as the replica held it when somebody looked
	kept  map[string]bool
	tried int // promotions asked for while nobody served
	// floor is the counter that some copy held, acknowledged, before a cell.
	floor uint64
}

func envInt(name string, otherwise uint64) uint64 {
	n, err := strconv.ParseUint(os.Getenv(name), 10, 64)
	if err != nil {
		return otherwise
	}
	return n
}

// Random failover histories: kills, reboots, partitions, lost and doubled
// messages, planned and unplanned failovers, trials committed and cancelled,
// returns, hosts put back to an earlier state. Never two owners that nobody
// forced, never a fork that goes unnoticed once the hosts can talk, never an
// acknowledged state lost, and at the end one owner and a complete copy.
func TestHistories(t *testing.T) {
	if testing.Short() {
		t.Skip("plays for a while")
	}
	seeds, first := envInt("KVMREPLICA_HISTORIES", 2), uint64(1)
	if s := envInt("SEED", 0); s != 0 {
		seeds, first = 1, s
	}
	var mu sync.Mutex
	did := map[string]int{}
	t.Run("all", func(t *testing.T) {
		for seed := first; seed < first+seeds; seed++ {
			t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
				t.Parallel()
				h := &history{pair: newPair(t), r: rand.New(rand.NewPCG(seed, 11)), kept: map[string]bool{}}
				defer func() {
					if t.Failed() {
						t.Logf("SEED=%d make pairs\n%s", seed, strings.Join(h.log, "\n"))
					}
					mu.Lock()
					defer mu.Unlock()
					for _, l := range h.log {
						did[strings.Fields(l)[0]]++
					}
				}()
				h.play()
			})
		}
	})
	t.Logf("%d histories, what was done: %v", seeds, did)
}

func (h *history) note(format string, a ...any) { h.log = append(h.log, fmt.Sprintf(format, a...)) }

func (h *history) play() {
	h.protect()
	for range 5 + h.r.IntN(5) {
		h.step()
		h.revive()
		h.check()
	}
	h.note("end")
	h.settleDown()
	if o := h.rest(); o == nil {
		h.t.Fatal("nobody owns the VM")
	}
}

// any is one of the two hosts.
func (h *history) any() *side {
	if h.r.IntN(2) == 0 {
		return h.a
	}
	return h.b
}

// told runs what a person asks for; a refusal is an answer.
func (h *history) told(what string, s *side, f func(context.Context, *Manager, *VM) error) error {
	if s.vm() == nil {
		return nil
	}
	err := s.do(f)
	h.note("%s on %s: %v", what, s.name, err)
	return err
}

func (h *history) step() {
	s := h.any()
	switch k := h.r.IntN(16); k {
	case 0, 1, 2:
		h.writes()
	case 3:
		h.copy()
	case 4:
		h.note("kill %s", s.name)
		s.restart()
	case 5:
		h.note("reboot %s", s.name)
		s.reboot()
	case 6:
		h.note("partition")
		s.silent.Store(true)
	case 7:
		h.note("join")
		h.a.silent.Store(false)
		h.b.silent.Store(false)
	case 8, 9:
		if o := h.owner(); o != nil {
			_ = h.told("planned", o, planned)
		}
	case 10:
		h.unplanned(s)
	case 11:
		_ = h.told("commit", s, commit)
	case 12:
		h.lossy.Store(true) // what the trial wrote ends with it
		_ = h.told("cancel", s, cancel)
	case 13:
		if v := s.vm(); v != nil && v.record().Lineage.MayServe() && v.record().NoReverse {
			h.stopGuest(s.other)
			_ = h.told("reverse", s, reverse)
		}
	case 14:
		methods := []string{"Handshake", "PutEpoch", "Failover-promote", "Failover-release", "Beat", "Offer", "EpochProgress", "Status"}
		key := s.name + "/" + methods[h.r.IntN(len(methods))]
		what := []fault{lostRequest, lostReply, twice}[h.r.IntN(3)]
		if what == twice && strings.HasSuffix(key, "PutEpoch") {
			what = lostReply
		}
		h.note("fault %s %d", key, what)
		h.inject(key, what)
	default:
		h.putBack(s)
	}
}

func (h *history) writes() {
	for _, s := range []*side{h.a, h.b} {
		if s.hyper.runs() {
			n := 1 + h.r.IntN(4)
			h.note("write %d on %s", n, s.name)
			for range n {
				if err := s.hyper.write(); err != nil {
					h.note("  %v", err)
					break
				}
			}
		}
	}
}

// copy asks for a cut, and remembers what the replica then holds.
func (h *history) copy() {
	o := h.owner()
	if o == nil || h.a.silent.Load() || h.b.silent.Load() || h.forced.Load() {
		return
	}
	before := h.counter.Load()
	if err := h.told("copied", o, func(ctx context.Context, _ *Manager, v *VM) error { return v.SyncNow(ctx) }); err == nil {
		h.acked = before
	}
}

// unplanned takes the replica's side by force.
func (h *history) unplanned(s *side) {
	v := s.vm()
	if v == nil || v.record().Lineage.State != lineage.Replica || v.record().Incomplete {
		return
	}
	h.lossy.Store(true)
	h.forced.Store(true)
	inPlace := h.r.IntN(2) == 0
	err := h.told(fmt.Sprintf("unplanned inplace=%t", inPlace), s, failoverTo("", UnplannedOptions{Force: true, InPlace: inPlace}))
	if err == nil && h.counter.Load() < h.acked && len(h.kept) == 0 {
		h.violation("the failover on %s finds %d, the replica held %d", s.name, h.counter.Load(), h.acked)
	}
	if err == nil {
		h.acked = h.counter.Load()
	}
}

func (h *history) stopGuest(s *side) {
	if !s.hyper.runs() {
		return
	}
	h.note("shutdown on %s", s.name)
	if err := s.hyper.Shutdown(context.Background(), string(testVM), libvirt.ShutdownOptions{}); err != nil {
		h.note("  %v", err)
	}
}

// putBack copies a host's state and images, or puts it back to the copy.
func (h *history) putBack(s *side) {
	keep := filepath.Join(filepath.Dir(s.dir), "kept-"+s.name)
	parts := []string{filepath.Join(s.dir, "state"), s.root}
	if s == h.a {
		parts = append(parts, filepath.Join(filepath.Dir(s.dir), "web.raw"))
	}
	sh := func(script string, args ...string) {
		out, err := exec.Command("sh", append([]string{"-ec", script, "sh"}, args...)...).CombinedOutput()
		if err != nil {
			h.t.Errorf("%s: %v: %s", script, err, out)
		}
	}
	s.kill()
	s.hyper.halt()
	s.hyper.SetState(string(testVM), libvirt.StateOff, libvirt.ReasonNone)
	s.stopPlane()
	restore := h.kept[s.name]
	for i, p := range parts {
		at := fmt.Sprintf("%s-%d", keep, i)
		if restore {
			sh(`rm -rf "$2"; [ ! -e "$1" ] || cp -a "$1" "$2"`, at, p)
		} else {
			sh(`rm -rf "$2"; [ ! -e "$1" ] || cp -a "$1" "$2"`, p, at)
		}
	}
	if restore {
		h.note("restored %s", s.name)
		h.lossy.Store(true) // what it lost is the operator's doing
		h.forced.Store(true)
		h.acked = 0
	} else {
		h.note("snapshot of %s", s.name)
		h.kept[s.name] = true
	}
	s.reboot()
}

// settleDown ends the faults and does what health tells an operator to do.
func (h *history) settleDown() {
	h.a.silent.Store(false)
	h.b.silent.Store(false)
	h.mu.Lock()
	h.faults = map[string]fault{}
	h.mu.Unlock()
	n := 0
	h.until("the pair to be brought to rest", func() error {
		n++
		h.revive()
		h.check()
		err := h.settled()
		if err == nil {
			h.forced.Store(false)
			h.lossy.Store(false)
			return nil
		}
		if n%100 == 0 {
			h.operate()
		}
		return err
	})
}

// operate is one decision of a person who looks at both hosts.
func (h *history) operate() {
	if what, s, f := h.remedy(); f != nil {
		_ = h.told(what, s, f)
	}
}

// byForce is an operator's unplanned failover, whatever it loses.
func (h *history) byForce(s *side) (*side, action) {
	h.lossy.Store(true)
	h.forced.Store(true)
	return s, failoverTo("", UnplannedOptions{Force: true, InPlace: true})
}

// remedy is what a person who looks at both hosts does next; nil = waits.
func (h *history) remedy() (what string, s *side, f action) {
	if h.a.planOpen() || h.b.planOpen() {
		return "", nil, nil
	}
	a, b := h.a.vm().record(), h.b.vm().record()
	owns := func(r Record) bool { return r.Lineage.State == lineage.Primary || r.Lineage.State == lineage.Promoted }
	keep := h.a
	switch {
	case owns(a) && owns(b):
		// Two owners: both hosts have talked for a while, somebody must know.
		if a.Lineage.Diverged == nil && b.Lineage.Diverged == nil && a.Superseded == "" && b.Superseded == "" && a.Lineage.Discard.IsZero() && b.Lineage.Discard.IsZero() &&
			!a.NoReverse && !b.NoReverse {
			h.violation("both hosts own the VM, they talk, and neither has noticed")
		}
		for _, p := range b.Lineage.Ancestors {
			if p.Generation == a.Lineage.Generation {
				keep = h.b
			}
		}
	case owns(b):
		keep = h.b
	case !owns(a):
		if h.tried++; h.tried%2 == 0 {
			keep = h.b
		}
		s, f = h.byForce(keep)
		return "unplanned (nobody serves)", s, f
	}
	r := keep.vm().record()
	if r.Overlay != nil && !r.Overlay.Committed && r.Lineage.Diverged == nil {
		return "commit", keep, commit
	}
	if r.NoReverse || owns(a) && owns(b) || r.Lineage.Diverged != nil {
		h.stopGuest(keep.other)
		return "reverse", keep, reverse
	}
	if st, err := keep.other.vm().storeStatus(); err == nil && (st.State == points.Suspect || st.State == points.Damaged) {
		return "resync", keep.other, func(ctx context.Context, _ *Manager, v *VM) error { return v.Resync(ctx, ResyncOptions{}) }
	}
	if x := keep.vm().session(); x != nil && x.Status().Stop != nil {
		if o := keep.other; o.vm().record().Lineage.State == lineage.Replica {
			h.stopGuest(keep)
			s, f = h.byForce(o)
			return "unplanned (the other was put back)", s, f
		}
	}
	if !keep.hyper.runs() {
		return "start", keep, func(ctx context.Context, _ *Manager, v *VM) error { return v.StartGuest(ctx, StartOptions{}) }
	}
	return "", nil, nil
}
