package session

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"kvmreplica/replicad/wire"
)

// slowBody is a stream that has nothing more for now; closing it fails the read
// that waits, as closing an HTTP response does.
type slowBody struct{ reading, closed, failed chan struct{} }

func (b *slowBody) Read([]byte) (int, error) {
	close(b.reading)
	<-b.closed
	return 0, io.ErrUnexpectedEOF
}

func (b *slowBody) Close() error {
	close(b.closed)
	<-b.failed // the reader has seen it
	return nil
}

func TestAnEarlyNoOfTheOtherHostIsNotBlamedOnTheSource(t *testing.T) {
	b := &slowBody{make(chan struct{}), make(chan struct{}), make(chan struct{})}
	s := &Session{}
	_, err := s.transfer(context.Background(), b, func(_ context.Context, r io.Reader) error {
		go func() { // as HTTP's transport does, which goes on reading behind an answer
			defer close(b.failed)
			_, _ = r.Read(make([]byte, 1))
		}()
		<-b.reading
		return &wire.Error{Kind: wire.KindNoSpace, Text: "the replica is full"}
	})
	var w *wire.Error
	if !errors.As(err, &w) || w.Kind != wire.KindNoSpace || classify(err) != ClassNoSpace {
		t.Fatalf("%v, class %s", err, classify(err))
	}
}

// A link error behind a failed read is that read's fault: a resend over the
// link would read the same bytes and fail for ever.
func TestASourceThatFailsHalfWayIsBlamedWhateverTheLinkSays(t *testing.T) {
	for _, before := range []int{0, 1, 3000} {
		boom := errors.New("the disk cannot be read")
		s := &Session{}
		frames := io.NopCloser(io.MultiReader(bytes.NewReader(make([]byte, before)), iotest.ErrReader(boom)))
		n, err := s.transfer(t.Context(), frames, func(_ context.Context, r io.Reader) error {
			_, _ = io.Copy(io.Discard, r)
			return &wire.Error{Kind: wire.KindUnavailable, Text: "the connection was reset"}
		})
		if n != int64(before) || !errors.Is(err, boom) || classify(err) != ClassSource {
			t.Errorf("after %d bytes: %d sent, %v, class %s", before, n, err, classify(err))
		}
	}
}
