package cbt

import (
	"iter"
	"math/bits"
	"sync/atomic"
)

// summaryShift: one summary bit covers 2^6 words of 64 granules (16 MiB).
const summaryShift = 6

// bitmap is a set of granules: a flat array of words, which may live in shared
// memory, and a summary in ordinary memory that says which blocks of 64 words
// may be non-zero. set is safe with everything else; reset and the bulk
// readers need a set nobody adds to, or tolerate what arrives meanwhile.
//
// Invariant: a non-zero word has its summary bit set whenever no set is in
// progress.
type bitmap struct {
	n     uint64 // granules
	words []uint64
	sum   []uint64
	count atomic.Int64
}

// wordsFor is the number of words for n granules.
func wordsFor(n uint64) uint64 { return (n + 63) / 64 }

func newBitmap(n uint64, words []uint64) *bitmap {
	w := wordsFor(n)
	if words == nil {
		words = make([]uint64, w)
	}
	return &bitmap{n: n, words: words[:w], sum: make([]uint64, wordsFor((w+63)>>summaryShift))}
}

// span is a half-open interval of granules or regions.
type span struct{ lo, hi uint64 }

// mask is the bits of word w that lie in [lo, hi).
func mask(w, lo, hi uint64) uint64 {
	m := ^uint64(0)
	if lo > w*64 {
		m <<= lo - w*64
	}
	if hi < (w+1)*64 {
		m &= ^uint64(0) >> ((w+1)*64 - hi)
	}
	return m
}

// set adds granules [lo, hi).
func (b *bitmap) set(lo, hi uint64) {
	if lo >= hi {
		return
	}
	for w := lo / 64; w <= (hi-1)/64; w++ {
		b.or(w, mask(w, lo, hi))
	}
}

// or adds the bits m to word w.
func (b *bitmap) or(w, m uint64) {
	if atomic.LoadUint64(&b.words[w])&m == m {
		return
	}
	old := atomic.OrUint64(&b.words[w], m)
	if added := m &^ old; added != 0 {
		b.count.Add(int64(bits.OnesCount64(added)))
	}
	b.touchSummary(w)
}

func (b *bitmap) touchSummary(w uint64) {
	s, bit := w>>(summaryShift+6), uint64(1)<<(w>>summaryShift&63)
	if atomic.LoadUint64(&b.sum[s])&bit == 0 {
		atomic.OrUint64(&b.sum[s], bit)
	}
}

// andNot removes the bits m from word w.
func (b *bitmap) andNot(w, m uint64) {
	old := atomic.AndUint64(&b.words[w], ^m)
	if gone := old & m; gone != 0 {
		b.count.Add(-int64(bits.OnesCount64(gone)))
	}
}

// clear removes granules [lo, hi).
func (b *bitmap) clear(lo, hi uint64) {
	if lo >= hi {
		return
	}
	for w := lo / 64; w <= (hi-1)/64; w++ {
		b.andNot(w, mask(w, lo, hi))
	}
}

func (b *bitmap) word(w uint64) uint64 { return atomic.LoadUint64(&b.words[w]) }

// has reports whether granule g is in the set.
func (b *bitmap) has(g uint64) bool { return b.word(g/64)>>(g%64)&1 != 0 }

// any reports whether a granule of [lo, hi) is in the set and not in without,
// which may be nil.
func (b *bitmap) any(lo, hi uint64, without *bitmap) bool {
	if lo >= hi {
		return false
	}
	for w := lo / 64; w <= (hi-1)/64; w++ {
		m := b.word(w) & mask(w, lo, hi)
		if m != 0 && without != nil {
			m &^= without.word(w)
		}
		if m != 0 {
			return true
		}
	}
	return false
}

// all reports whether every granule of [lo, hi) is in the set.
func (b *bitmap) all(lo, hi uint64) bool {
	if lo >= hi {
		return true
	}
	for w := lo / 64; w <= (hi-1)/64; w++ {
		m := mask(w, lo, hi)
		if b.word(w)&m != m {
			return false
		}
	}
	return true
}

// blocks yields the ranges of words that may be non-zero, in ascending order.
func (b *bitmap) blocks() iter.Seq[span] {
	return func(yield func(span) bool) {
		for s := range b.sum {
			for v := atomic.LoadUint64(&b.sum[s]); v != 0; v &= v - 1 {
				lo := (uint64(s)*64 + uint64(bits.TrailingZeros64(v))) << summaryShift
				hi := min(lo+1<<summaryShift, uint64(len(b.words)))
				if !yield(span{lo, hi}) {
					return
				}
			}
		}
	}
}

// lowestRun is the first run of ones in v, which is not zero.
func lowestRun(v uint64) (lo, n uint64) {
	lo = uint64(bits.TrailingZeros64(v))
	return lo, uint64(bits.TrailingZeros64(^(v >> lo)))
}

// without is v without n bits from lo on.
func without(v, lo, n uint64) uint64 { return v &^ (^uint64(0) >> (64 - n) << lo) }

// runs yields maximal runs of granules in ascending order.
func (b *bitmap) runs() iter.Seq[span] {
	return func(yield func(span) bool) {
		var run span
		for blk := range b.blocks() {
			for w := blk.lo; w < blk.hi; w++ {
				for v := b.word(w); v != 0; {
					lo, n := lowestRun(v)
					v = without(v, lo, n)
					next := span{w*64 + lo, w*64 + lo + n}
					if next.lo == run.hi {
						run.hi = next.hi
						continue
					}
					if run.lo < run.hi && !yield(run) {
						return
					}
					run = next
				}
			}
		}
		if run.lo < run.hi {
			yield(run)
		}
	}
}

// merge adds everything in o, word by word: at every instant a granule of o is
// in b or still in o. With move, o is emptied on the way.
func (b *bitmap) merge(o *bitmap, move bool) {
	for blk := range o.blocks() {
		for w := blk.lo; w < blk.hi; w++ {
			if v := o.word(w); v != 0 {
				b.or(w, v)
				if move {
					o.andNot(w, v)
				}
			}
		}
	}
	if move {
		o.reset()
	}
}

// reset empties the set. Nobody may be adding to it.
func (b *bitmap) reset() {
	for blk := range b.blocks() {
		for w := blk.lo; w < blk.hi; w++ {
			if b.word(w) != 0 {
				atomic.StoreUint64(&b.words[w], 0)
			}
		}
	}
	for s := range b.sum {
		atomic.StoreUint64(&b.sum[s], 0)
	}
	b.count.Store(0)
}

// bytes is the size of the set in bytes of a disk of the given size.
func (b *bitmap) bytes(size int64) int64 {
	return min(b.count.Load()<<granuleShift, size)
}

// subtract removes everything in o.
func (b *bitmap) subtract(o *bitmap) {
	if b.count.Load() == 0 {
		return
	}
	for blk := range o.blocks() {
		for w := blk.lo; w < blk.hi; w++ {
			if v := o.word(w); v != 0 && b.word(w)&v != 0 {
				b.andNot(w, v)
			}
		}
	}
}

// adopt takes note of word w, found to hold v already.
func (b *bitmap) adopt(w, v uint64) {
	b.count.Add(int64(bits.OnesCount64(v)))
	b.touchSummary(w)
}

func popcount(words []uint64) (n int64) {
	for _, w := range words {
		n += int64(bits.OnesCount64(w))
	}
	return n
}
