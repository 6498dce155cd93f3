package vm

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"testing"
)

// A message of a planned failover is lost on the way, its answer is lost, or it
// arrives twice.
func TestALostMessageOfAPlannedFailoverEndsWithOneOwner(t *testing.T) {
	for _, m := range []string{"Handshake", "PutEpoch", "Failover-promote", "Beat", "Offer", "EpochProgress"} {
		for f, name := range map[fault]string{lostRequest: "request", lostReply: "reply", twice: "twice"} {
			if f == twice && m == "PutEpoch" {
				continue // a body is not sent twice by one call
			}
			t.Run(m+" "+name, func(t *testing.T) {
				t.Parallel()
				w := newPair(t)
				w.protect()
				w.inject("A/"+m, f)
				if err := w.a.do(planned); err != nil {
					t.Log(err)
				}
				if o := w.rest(); o != w.b {
					t.Fatal("B does not own the VM")
				}
			})
		}
	}
}

func (s *side) died() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fs.dead.Load()
}

// Replacing a state file fails once, or the daemon dies there, at every such
// replacement of a planned failover, on either side.
func TestACrashOrAFullDiskAtAStateFileEndsWithOneOwner(t *testing.T) {
	if testing.Short() {
		t.Skip("a sweep over every replacement")
	}
	every := 4
	if os.Getenv("KVMREPLICA_MODEL") != "" {
		every = 1
	}
	for _, host := range []string{"A", "B"} {
		for _, crash := range []bool{false, true} {
			for n := 1; n <= 24; n += every {
				t.Run(fmt.Sprintf("%s crash %t at %d", host, crash, n), func(t *testing.T) {
					t.Parallel()
					w := newPair(t)
					w.protect()
					s := w.a
					if host == "B" {
						s = w.b
					}
					var left atomic.Int64
					left.Store(int64(n))
					dead := s.fs.dead
					s.refuseWrites(func(string) error {
						if left.Add(-1) != 0 {
							return nil
						}
						if crash {
							dead.Store(true)
						}
						return errors.New("no space left on device")
					})
					ended := make(chan struct{})
					go func() { defer close(ended); _ = w.a.do(planned) }() // it may succeed, fail, or be continued
					w.until("the end of the command", func() error {
						if s.died() {
							s.restart()
						}
						select {
						case <-ended:
							return nil
						default:
							return errors.New("it runs")
						}
					})
					w.rest()
				})
			}
		}
	}
}

// The old primary's daemon dies, or its disk is full, anywhere in giving up its
// own writes; the return is asked for until it is done.
func TestACrashInTheReleaseOfAnOldPrimaryIsMadeGood(t *testing.T) {
	for _, crash := range []bool{false, true} {
		for n := 1; n <= 5; n++ {
			t.Run(fmt.Sprintf("crash %t at %d", crash, n), func(t *testing.T) {
				t.Parallel()
				w := newPair(t)
				w.protect()
				w.losePrimary()
				w.a.reboot()
				w.until("A to learn of the promotion", w.primaryHeld)
				w.forced.Store(false)
				var left atomic.Int64
				left.Store(int64(n))
				dead := w.a.fs.dead
				w.a.refuseWrites(func(string) error {
					if left.Add(-1) != 0 {
						return nil
					}
					if crash {
						dead.Store(true)
					}
					return errors.New("no space left on device")
				})
				w.until("the return", func() error {
					if w.a.died() {
						w.a.restart()
					}
					if !w.b.vm().record().NoReverse {
						return nil
					}
					if w.b.planOpen() {
						return errors.New("the return goes on")
					}
					return errors.Join(w.b.do(reverse), errors.New("not yet"))
				})
				if o := w.rest(); o != w.b {
					t.Fatal("B does not own the VM")
				}
			})
		}
	}
}
