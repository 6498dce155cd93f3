package vm

import (
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"kvmreplica/replicad/wire"
)

// tap is a limiter that remembers.
type tap struct{ rates []int64 }

func (l *tap) Set(n int64)                                     { l.rates = append(l.rates, n) }
func (l *tap) Reader(_ context.Context, r io.Reader) io.Reader { return io.LimitReader(r, 1) }

func TestALimitCountsAtOnceAndAfterARestart(t *testing.T) {
	t.Parallel()
	w := newPair(t)
	w.protect()
	v := w.a.vm()
	l := &tap{}
	v.band = l
	if err := v.SetRate(100); !kindIs(err, wire.KindInvalid) {
		t.Errorf("a limit nothing gets through: %v", err)
	}
	must(t, v.SetRate(20<<20))
	if len(l.rates) != 1 || l.rates[0] != 20<<20 || v.record().Rate != 20<<20 || v.Status(t.Context(), "B").Rate != 20<<20 {
		t.Errorf("set: %v, record %d", l.rates, v.record().Rate)
	}
	if b, err := io.ReadAll(v.limit()(t.Context(), bytes.NewReader(make([]byte, 10)))); err != nil || len(b) != 1 {
		t.Errorf("what is sent does not pass the limiter: %d bytes, %v", len(b), err)
	}
	after := &tap{}
	m := &Manager{deps: Deps{Limiter: func() Limiter { return after }, Log: v.log, Now: time.Now}, fsys: v.mgr.fsys}
	if m.newVM(v.record()); len(after.rates) != 1 || after.rates[0] != 20<<20 {
		t.Errorf("after a restart: %v", after.rates)
	}
	if err := w.b.vm().SetRate(0); !kindIs(err, wire.KindRefused) {
		t.Errorf("the replica's host: %v", err)
	}
}
