package fsxtest

import (
	"bytes"
	"fmt"
	"iter"
	"os"
)

// fullVar asks for sweeps without gaps: "1" for all of it, "I/N" for every N-th
// case from the I-th on, so that a long sweep can be shared out.
const fullVar = "KVMREPLICA_FULL"

// Share decides which cases of a sweep are run: every usual-th, unless
// KVMREPLICA_FULL asks for all, or for a share of all.
func Share(usual int) func(i int) bool {
	from, every := 0, usual
	if v := os.Getenv(fullVar); v != "" {
		from, every = 1, 1
		if _, err := fmt.Sscanf(v, "%d/%d", &from, &every); err != nil || every < 1 {
			from, every = 1, 1
		}
		from--
	}
	return func(i int) bool { return i%every == from%every }
}

// Full reports whether KVMREPLICA_FULL is set.
func Full() bool { return os.Getenv(fullVar) != "" }

// Damages yields what a small file may have become: each byte with one bit
// flipped and inverted, and every truncation, with words for people. Each
// content is the receiver's own.
func Damages(content []byte) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		for i := range content {
			for _, mask := range []byte{1 << (i % 8), 0xFF} {
				c := bytes.Clone(content)
				c[i] ^= mask
				if !yield(fmt.Sprintf("byte %d ^ %#02x", i, mask), c) {
					return
				}
			}
		}
		for n := range content {
			if !yield(fmt.Sprintf("cut to %d bytes", n), bytes.Clone(content[:n])) {
				return
			}
		}
	}
}
