package vm

import (
	"errors"
	"fmt"
	"testing"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// forgery makes one handshake of a sound pair into what a foreign, copied or
// restored host would say. It is called before the question is sent, with r nil,
// and with the answer.
type forgery func(q *wire.HandshakeRequest, r *wire.HandshakeReply)

// forgedCell is a row that two hosts of one history cannot meet in.
type forgedCell struct {
	as forgery
	// before brings the pair where the forgery fits.
	before func(h *history)
	// first: during the first copy, and only a few times.
	first bool
	// copies: the row's outcome compares or copies; something may travel.
	copies bool
	// marks: the primary records a divergence, and keeps it.
	marks bool
}

// answer forges the answer alone.
func answer(f func(q *wire.HandshakeRequest, r *wire.HandshakeReply)) forgery {
	return func(q *wire.HandshakeRequest, r *wire.HandshakeReply) {
		if r != nil {
			f(q, r)
		}
	}
}

func thereAndBack(h *history) {
	must(h.t, h.a.do(planned))
	h.rest()
	must(h.t, h.b.do(planned))
	h.rest()
}

// forgeries are the rows that the pair of cells_test cannot be brought into.
func forgeries() map[string]forgedCell {
	strange := delta.Generation{0xf0, 1, 2, 3}
	at := func(g delta.Generation, e uint64) delta.Pos {
		return delta.Pos{Generation: g, Epoch: e, Digest: delta.Digest{7}}
	}
	seeding := func(r *wire.HandshakeReply, g delta.Generation, cursor int64) {
		r.Generation, r.Committed, r.Sealed, r.VerifyAll = g, delta.Pos{}, false, ""
		r.Seeding = map[wire.DiskName]int64{"vda": cursor}
	}
	return map[string]forgedCell{
		"no-generation": {as: func(q *wire.HandshakeRequest, r *wire.HandshakeReply) { q.Generation = delta.Generation{} }},
		"unknown-role":  {as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) { r.Role = "owner" })},
		"other-vm": {as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) {
			r.VM = "deadbeef-0000-4000-8000-0000000000bb"
		})},
		"malformed-position":      {as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) { r.Generation = strange })},
		"discards-our-generation": {marks: true, as: answer(func(q *wire.HandshakeRequest, r *wire.HandshakeReply) { r.Discard = q.Generation })},
		"one-name-two-contents":   {marks: true, as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) { r.Committed.Digest[0] ^= 1 })},
		"two-primaries-one-generation": {marks: true, as: answer(func(q *wire.HandshakeRequest, r *wire.HandshakeReply) {
			r.Role, r.Generation, r.Committed = lineage.RolePrimary, q.Generation, delta.Pos{}
		})},
		"sealed-in-our-generation": {marks: true, as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) { r.Sealed = true })},
		"unrelated-primary": {as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) {
			r.Role, r.Generation, r.Committed, r.Ancestors = lineage.RolePrimary, strange, delta.Pos{}, nil
		})},
		"unrelated": {as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) {
			r.Generation, r.Committed, r.Ancestors = strange, at(strange, 4), nil
		})},
		"no-replica": {as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) {
			*r = wire.HandshakeReply{Role: lineage.RoleNone}
		})},
		"other-disks": {as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) { r.Disks = []wire.DiskName{"vdz"} })},
		"seed-from-the-future": {as: answer(func(q *wire.HandshakeRequest, r *wire.HandshakeReply) {
			seeding(r, strange, 4096)
			r.Ancestors = []delta.Pos{at(q.Generation, 1)}
		})},
		"seed-after-ack": {copies: true, as: answer(func(q *wire.HandshakeRequest, r *wire.HandshakeReply) { seeding(r, q.Generation, 4096) })},
		"seed-from-existing-images": {first: true, copies: true, as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) {
			seeding(r, delta.Generation{}, 0)
			r.VerifyAll = "it was given existing images"
		})},
		"seed-of-another-generation": {first: true, copies: true, as: answer(func(_ *wire.HandshakeRequest, r *wire.HandshakeReply) {
			seeding(r, strange, 4096)
		})},
		"beyond-the-fork": {before: thereAndBack, as: answer(func(q *wire.HandshakeRequest, r *wire.HandshakeReply) {
			p := q.Ancestors[0]
			r.Generation, r.Committed, r.Sealed = p.Generation, at(p.Generation, p.Epoch+5), false
			r.Ancestors = q.Ancestors[1:]
		})},
		"before-base": {copies: true, before: func(h *history) { h.a.restart(); h.rest() }, as: answer(func(q *wire.HandshakeRequest, r *wire.HandshakeReply) {
			r.Committed, r.Ancestors = at(q.Generation, q.Base.Epoch-1), nil
		})},
	}
}

// Each cell that only a foreign, copied or restored host can bring about stops
// replication at once with its reason, or has everything compared; the guest
// goes on, the replica stays what it was, and what both sides mark stays marked.
// When the impostor is gone and a person has decided where one must, the pair
// is whole again and nothing that was acknowledged is missing.
func TestEveryForgedCellHarmsNothing(t *testing.T) {
	t.Parallel()
	for row, c := range forgeries() {
		t.Run(row, func(t *testing.T) {
			t.Parallel()
			h := &history{pair: newPair(t), kept: map[string]bool{}}
			times := 0
			if c.first {
				forge := forgery(func(q *wire.HandshakeRequest, r *wire.HandshakeReply) {
					if times++; times <= 6 { // question and answer, three times
						c.as(q, r)
					}
				})
				h.a.forge.Store(&forge)
				h.protectWhile(h.retry)
			} else {
				h.protect()
				h.synced()
				if c.before != nil {
					c.before(h)
				}
				h.synced()
				h.a.forge.Store(&c.as)
				h.a.restart()
			}
			h.floor = h.counter.Load()
			c.stand(h, row)
			h.a.forge.Store(nil)
			if c.marks {
				h.retry()
				h.write(h.a, 1)
				if h.a.vm().record().Lineage.Diverged == nil {
					t.Error("a divergence was forgotten when the other host told another story")
				}
			}
			cell{row: row, keepA: true}.leave(t, h)
		})
	}
}

// stand is how the pair fares while the forgery lasts.
func (c forgedCell) stand(h *history, row string) {
	h.t.Helper()
	held, err := h.b.vm().storeStatus()
	if err != nil {
		h.t.Fatal(err)
	}
	h.until("the cell "+row, func() error {
		h.retry()
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.rows[row] == 0 {
			return fmt.Errorf("met only %v", h.rows)
		}
		return nil
	})
	h.write(h.a, 3) // the guest goes on
	if c.first || c.copies {
		return
	}
	h.until("A to say why it stands still", func() error {
		s := h.a.vm().session()
		if s == nil {
			return errors.New("no session")
		}
		if st := s.Status(); st.Stop == nil && st.Failures == 0 {
			return errors.New("it does not")
		}
		return nil
	})
	if c.marks {
		h.until("A to mark it", func() error { return h.a.reported(h.t.Context()) })
	}
	now, err := h.b.vm().storeStatus()
	if err != nil {
		h.t.Fatal(err)
	}
	if now.Committed != held.Committed {
		h.t.Errorf("the replica went from %v to %v", held.Committed, now.Committed)
	}
}
