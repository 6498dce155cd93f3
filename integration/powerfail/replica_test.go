package powerfail_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"time"

	"kvmreplica/integration/oracle"
	"kvmreplica/integration/powerfail/cutwire"
	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
)

// replicaLife plays the primary of a store that lives in the machine.
type replicaLife struct {
	*world
	http    *http.Client
	gen     delta.Generation
	epoch   uint64
	content []byte
	parent  delta.Pos // acknowledged
	cuts    map[delta.Pos][]byte
	listed  []delta.Pos // the store's points as last heard
	acks    *oracle.Acks
}

func newReplicaLife(w *world) *replicaLife {
	l := &replicaLife{
		world: w, content: make([]byte, cutwire.DiskSize), cuts: map[delta.Pos][]byte{}, acks: oracle.NewAcks(),
	}
	for i := range l.gen {
		l.gen[i] = byte(w.rng.Uint32())
	}
	return l
}

// manyPoints is where the store begins to thin points out.
const manyPoints = 400

// run is a life of n cuts.
func (l *replicaLife) run(cuts int) error {
	for i := range cuts + 1 {
		if err := l.boot(); err != nil {
			return err
		}
		if err := l.serve(); err != nil {
			return err
		}
		if err := l.recovered(); err != nil {
			return fmt.Errorf("after cut %d: %w", i, err)
		}
		if i == cuts {
			return nil
		}
		moment, writes := l.moment(4*time.Second), l.rng.IntN(60)
		done := make(chan error, 1)
		go func() { done <- l.work() }()
		l.powerGoes(moment, writes)
		err := <-done
		l.survive()
		if err != nil {
			return err
		}
	}
	return nil
}

// serve starts the store's program and waits until it answers.
func (l *replicaLife) serve() error {
	ctx, cancel := context.WithTimeout(l.ctx, patience)
	defer cancel()
	_, err := l.vm.Exec(ctx, "/bin/busybox", "sh", "-c", "/bin/cutstore /data/store /run/store >/run/store.log 2>&1 & "+
		"while ! [ -S /run/store ]; do kill -0 $! || { cat /run/store.log; exit 1; }; usleep 20000; done")
	if err != nil {
		return violated("the store does not open: %w", err)
	}
	sock, err := l.vm.Forward("/run/store")
	if err != nil {
		return err
	}
	l.http = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sock)
	}, DisableKeepAlives: true}}
	// The socket's name is there a moment before anybody listens.
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := l.state()
		if err == nil || errors.Is(err, errRefused) {
			return nil // what it says is judged by others
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the store does not answer: %w", err)
		case <-tick.C:
		}
	}
}

// call makes one request and returns the reply's body.
func (l *replicaLife) call(method, path string, body []byte) ([]byte, http.Header, error) {
	ctx, cancel := context.WithTimeout(l.ctx, patience)
	defer cancel()
	q, err := http.NewRequestWithContext(ctx, method, "http://store"+path, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	a, err := l.http.Do(q)
	if err != nil {
		return nil, nil, err
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	if err == nil && a.StatusCode != http.StatusOK {
		err = fmt.Errorf("%w: %s", errRefused, b)
	}
	return b, a.Header, err
}

var errRefused = fmt.Errorf("the store refuses")

func (l *replicaLife) state() (s cutwire.State, err error) {
	b, _, err := l.call("GET", "/state", nil)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s, err
}

// recovered judges the store as it was found.
func (l *replicaLife) recovered() error {
	s, err := l.state()
	if err != nil {
		return err
	}
	if len(s.Damage) > 0 || s.VerifyAll != "" {
		return violated("the store is damaged: %v %s", s.Damage, s.VerifyAll)
	}
	if s.Seeding {
		if !l.parent.IsZero() {
			return violated("the store is seeding, %v was acknowledged", l.parent)
		}
		return l.acks.Check(oracle.Position{})
	}
	if err := l.acks.Check(position(s.Committed)); err != nil {
		return wrong{err}
	}
	l.parent = s.Committed // what was on its way may have arrived
	l.content = bytes.Clone(l.cuts[s.Committed])
	if n := len(l.listed); n < manyPoints {
		for _, p := range l.listed {
			if !slices.Contains(s.Points, p) {
				return violated("point %v was listed before the cut and is gone", p)
			}
		}
	}
	for i, p := range append([]delta.Pos{s.Committed}, s.Points...) {
		// All would take minutes: the committed state, the newest, some others.
		if i > 0 && len(s.Points)-i > 3 && l.rng.IntN(len(s.Points)) > 10 {
			continue
		}
		if err := l.reads(i-1, p); err != nil {
			return err
		}
	}
	if _, _, err := l.call("POST", "/check", nil); err != nil {
		return violated("check: %w", err)
	}
	return nil
}

// reads compares a state with what was cut at that position.
func (l *replicaLife) reads(at int, p delta.Pos) error {
	b, h, err := l.call("GET", fmt.Sprintf("/content?at=%d", at), nil)
	if err != nil {
		return violated("point %v cannot be read: %w", p, err)
	}
	if h.Get(cutwire.PosHeader) != p.String() {
		return nil // the list moved on meanwhile; it is read again under its new number
	}
	if err := oracle.CheckEqual(oracle.Images{b}, oracle.Images{l.cuts[p]}); err != nil {
		return violated("point %v: %w", p, err)
	}
	return nil
}

func position(p delta.Pos) oracle.Position {
	return oracle.Position{Generation: p.Generation.String(), Epoch: p.Epoch, Digest: p.Digest.String()}
}

// work seeds and sends epochs until the power goes.
func (l *replicaLife) work() error {
	s, err := l.state()
	if err != nil {
		return gone(err)
	}
	if s.Seeding && s.Seeded["vda"] < cutwire.DiskSize {
		if err := l.seed(); err != nil {
			return gone(err)
		}
	}
	for {
		if err := l.ship(); err != nil {
			return gone(err)
		}
		if s, err = l.state(); err != nil {
			return gone(err)
		}
		l.listed = s.Points
	}
}

// gone passes only refusals on: other errors are the power cut.
func gone(err error) error {
	if err != nil && bytes.Contains([]byte(err.Error()), []byte(errRefused.Error())) {
		return violated("%w", err)
	}
	return nil
}

func (l *replicaLife) seed() error {
	l.touch(40)
	spec := delta.Spec{
		Header:  delta.Header{VM: cutwire.VM(), Generation: l.gen, Disks: cutwire.Disks(), Seed: true},
		Content: [][]byte{l.content}, Changed: [][]block.Range{{{Off: 0, Len: cutwire.DiskSize}}},
	}
	b, err := spec.Build()
	if err != nil {
		return err
	}
	_, _, err = l.call("PUT", "/seed", slices.Concat(append([][]byte{b.Header}, b.Chunks...)...))
	return err
}

// touch changes up to n granules, some to zeros, and returns them.
func (l *replicaLife) touch(n int) []block.Range {
	const granule = delta.Granule
	marks := make([]bool, len(l.content)/granule)
	for range 1 + l.rng.IntN(n) {
		marks[l.rng.IntN(len(marks))] = true
	}
	var out []block.Range
	for g, m := range marks {
		if !m {
			continue
		}
		p := l.content[g*granule:][:granule]
		if clear(p); l.rng.IntN(4) > 0 {
			for i := range 64 {
				p[i*64] = byte(l.rng.Uint32())
			}
		}
		out = append(out, block.Range{Off: int64(g * granule), Len: granule})
	}
	return out
}

// ship sends one epoch on top of what was acknowledged.
func (l *replicaLife) ship() error {
	l.epoch++
	changed := l.touch(60)
	if l.parent.IsZero() { // the first after seeding: what a lost seed held may differ
		changed = []block.Range{{Off: 0, Len: cutwire.DiskSize}}
	}
	spec := delta.Spec{
		Header:  delta.Header{VM: cutwire.VM(), Generation: l.gen, Epoch: l.epoch, Nonce: l.rng.Uint64(), Parent: l.parent, Disks: cutwire.Disks()},
		Changed: [][]block.Range{changed}, Content: [][]byte{l.content},
	}
	b, err := spec.Build()
	if err != nil {
		return err
	}
	if err := l.acks.Committed(position(b.Pos), position(l.parent)); err != nil {
		return wrong{err}
	}
	l.cuts[b.Pos] = bytes.Clone(l.content)
	reply, _, err := l.call("PUT", "/epoch", b.Bytes())
	if err != nil {
		return err
	}
	var pos delta.Pos
	if err := json.Unmarshal(reply, &pos); err != nil {
		return err
	}
	if pos != b.Pos {
		return violated("acknowledged %v instead of %v", pos, b.Pos)
	}
	l.parent = pos
	return l.acks.Acked(position(pos))
}
