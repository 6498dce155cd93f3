package peer

import (
	"context"
	"io"
	"testing"
)

// BenchmarkPutEpoch is one stream over loopback, both ends on this machine.
func BenchmarkPutEpoch(b *testing.B) {
	const size = 64 << 20
	p, r, c := pairOf(b)
	r.svc.put = func(_ context.Context, body io.Reader) error { _, err := io.Copy(io.Discard, body); return err }
	r.own.set(vmA, Relation{Peer: p.id.Host(), Receives: true})
	b.SetBytes(size)
	for b.Loop() {
		if _, err := c.PutEpoch(context.Background(), key(), 0, io.LimitReader(&counting{}, size)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStatus is one small call on an open connection.
func BenchmarkStatus(b *testing.B) {
	_, _, c := pairOf(b)
	for b.Loop() {
		if _, err := c.Status(context.Background(), vmA); err != nil {
			b.Fatal(err)
		}
	}
}
