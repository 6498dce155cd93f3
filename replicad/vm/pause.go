package vm

import (
	"context"
	"math/rand/v2"
	"time"
)

// pause is a growing, jittered wait between tries.
type pause struct{ next time.Duration }

const (
	pauseFirst = 250 * time.Millisecond
	pauseMost  = 15 * time.Second
)

func newPause() *pause { return &pause{next: pauseFirst} }

// wait returns false when ctx ended first.
func (p *pause) wait(ctx context.Context) bool {
	t := time.NewTimer(p.next/2 + rand.N(p.next))
	defer t.Stop()
	p.next = min(2*p.next, pauseMost)
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
