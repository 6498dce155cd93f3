package session

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// answering is a source of which only the stream is asked, and a replica that
// answers what it was told to.
type answering struct {
	Source
	Replica
	pos delta.Pos
}

func (answering) Frames(context.Context, uint64, uint32) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader([]byte("an epoch"))), nil
}

func (a answering) PutEpoch(_ context.Context, _ wire.EpochKey, _ uint32, body io.Reader) (delta.Pos, error) {
	_, err := io.Copy(io.Discard, body)
	return a.pos, err
}

func TestAnAnswerForAnotherEpochIsNoCommit(t *testing.T) {
	held := dataplane.Epoch{Generation: gen("A"), Epoch: 5, Nonce: 1, Bytes: 8}
	for text, want := range map[string]bool{"A/5": true, "A/4": false, "A/6": false, "B/5": false, "-": false} {
		at, err := pos(text)
		if err != nil {
			t.Fatal(err)
		}
		a := answering{pos: at}
		ev := New(Config{VM: "vm", Name: "web", Source: a, Replica: a}).Perform(t.Context(), DoShip{Epoch: held})
		switch ev := ev.(type) {
		case EvShipped:
			if !want {
				t.Errorf("the answer %s counts as %+v", text, ev)
			}
		case EvFailed:
			if want || ev.Class != ClassCorrupt || !strings.Contains(ev.Text, "answers with position") {
				t.Errorf("the answer %s: %+v", text, ev)
			}
		default:
			t.Errorf("the answer %s: %T", text, ev)
		}
	}
}
