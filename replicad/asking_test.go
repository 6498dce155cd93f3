package replicad

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kvmreplica/replicad/wire"
)

// forgetful is a primary whose answers get lost.
type forgetful struct {
	now     time.Time
	deaf    bool    // to the greeting
	answers []error // of Failover, one after the other; nil = accepted; the last counts on
	asked   []wire.FailoverRequest
	plan    string
}

var errLost = &wire.Error{Kind: wire.KindUnavailable, Text: "connection reset by peer"}

func (f *forgetful) Hello(context.Context, wire.HelloRequest) (wire.HelloReply, error) {
	if f.deaf {
		return wire.HelloReply{}, errLost
	}
	return wire.HelloReply{Now: f.now}, nil
}

func (f *forgetful) Failover(_ context.Context, q wire.FailoverRequest) (wire.FailoverReply, error) {
	err := f.answers[min(len(f.asked), len(f.answers)-1)]
	f.asked = append(f.asked, q)
	if err != nil {
		return wire.FailoverReply{}, err
	}
	return wire.FailoverReply{State: "accepted"}, nil
}

func (f *forgetful) Status(context.Context, wire.VMID) (wire.PeerVM, error) {
	return wire.PeerVM{Interrupted: f.plan}, nil
}

// A request for a planned failover expires by the primary's clock; when its
// answer is lost the same request is repeated, and nobody is told that it did
// not happen unless that is so.
func TestALostAnswerToAPlannedFailoverIsUnknownAndNeverAskedAnew(t *testing.T) {
	expired := &wire.Error{Kind: wire.KindConflict, Text: "expired"}
	refused := &wire.Error{Kind: wire.KindRefused, Text: "may not ask"}
	for name, c := range map[string]struct {
		f      forgetful
		served int // this host is the primary after so many requests; 0 = never
		says   string
		asked  int // at least
	}{
		"answered":                 {f: forgetful{answers: []error{nil}}, asked: 1},
		"refused":                  {f: forgetful{answers: []error{refused}}, says: "may not ask", asked: 1},
		"nobody there":             {f: forgetful{deaf: true, answers: []error{nil}}, says: "cannot be asked"},
		"lost once":                {f: forgetful{answers: []error{errLost, nil}}, asked: 2},
		"lost, and it happened":    {f: forgetful{answers: []error{errLost}}, served: 3, asked: 3},
		"lost for good":            {f: forgetful{answers: []error{errLost}}, says: "UNKNOWN", asked: 3},
		"restarted there":          {f: forgetful{answers: []error{errLost, expired}}, says: "UNKNOWN", asked: 2},
		"restarted in the plan":    {f: forgetful{answers: []error{errLost, expired}, plan: "planned"}, served: 90, asked: 90},
		"refused after a loss":     {f: forgetful{answers: []error{errLost, refused}}, says: "UNKNOWN", asked: 2},
		"its plan takes long":      {f: forgetful{answers: []error{errLost}, plan: "planned"}, served: 200, asked: 200},
		"unavailable while asking": {f: forgetful{answers: []error{errLost, errLost, errLost, nil}}, asked: 4},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := c.f
				f.now = time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC) // its clock is what counts
				a := &asking{
					c: &f, served: func() bool { return c.served > 0 && len(f.asked) >= c.served }, name: "kvm-a", vm: "web",
					pause: askAgain, patience: askPatience, note: func(string) {},
				}
				_, err := a.planned(t.Context(), wire.HelloRequest{}, wire.FailoverRequest{Request: "r"})
				if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
					t.Fatalf("got %v", err)
				}
				if len(f.asked) < c.asked {
					t.Errorf("asked %d times", len(f.asked))
				}
				for _, q := range f.asked {
					if q.Request != "r" || !q.Before.Equal(f.now.Add(30*time.Second)) {
						t.Errorf("asked with %+v", q)
					}
				}
				var w *wire.Error
				if errors.As(err, &w) && c.says == "UNKNOWN" && !strings.Contains(w.Hint, "failover log web") {
					t.Errorf("the next command is missing: %q", w.Hint)
				}
			})
		})
	}
}
