package replicad

import (
	"context"
	"errors"
	"time"

	"kvmreplica/internal/version"
	"kvmreplica/replicad/vm"
	"kvmreplica/replicad/wire"
)

// How a primary is asked again when its answer is missing: this often, until
// nobody has said for so long that the plan is under way.
const (
	askAgain    = 2 * time.Second
	askPatience = 2 * time.Minute
)

// hello is what this host says of itself.
func (d *Daemon) hello() wire.HelloRequest {
	return wire.HelloRequest{Min: wire.ProtocolMin, Max: wire.ProtocolMax, Host: d.id.Host(), Name: d.name, Version: version.String(), Now: time.Now()}
}

// primary is what asking needs of the other host.
type primary interface {
	Hello(ctx context.Context, r wire.HelloRequest) (wire.HelloReply, error)
	Failover(ctx context.Context, r wire.FailoverRequest) (wire.FailoverReply, error)
	Status(ctx context.Context, vm wire.VMID) (wire.PeerVM, error)
}

// asking asks the primary for something it does once, and finds out what became
// of it when the answer is lost.
type asking struct {
	c               primary
	served          func() bool // this host is the primary by now
	name, vm        string      // of the other host, of the VM
	pause, patience time.Duration
	note            func(string)
}

func unavailable(err error) bool {
	var w *wire.Error
	return errors.As(err, &w) && w.Kind == wire.KindUnavailable
}

// planned asks for a planned failover. The request expires soon, by the other
// host's own clock, and repeated it has the answer of the first. An error of a
// request that may have been received says that its outcome is unknown.
func (a *asking) planned(ctx context.Context, hello wire.HelloRequest, q wire.FailoverRequest) (wire.FailoverReply, error) {
	there, err := a.c.Hello(ctx, hello)
	if err != nil {
		var w *wire.Error
		if errors.As(err, &w) && w.Kind == wire.KindUnavailable {
			err = &wire.Error{Kind: w.Kind, Text: "the primary " + a.name + " cannot be asked: " + w.Text, Hint: "replicactl peer test " + a.name + "; when it is dead: replicactl failover unplanned " + a.vm}
		}
		return wire.FailoverReply{}, err
	}
	q.Before = there.Now.Add(vm.AskedWithin)
	reply, err := a.c.Failover(ctx, q)
	if !unavailable(err) {
		return a.taken(reply, err)
	}
	a.note("The answer is missing (" + err.Error() + "); asking what became of the request.")
	tick := time.NewTicker(a.pause)
	defer tick.Stop()
	for silent := time.Now(); time.Since(silent) < a.patience; {
		if a.served() {
			return wire.FailoverReply{State: "accepted"}, nil
		}
		select {
		case <-ctx.Done():
			return wire.FailoverReply{}, a.unknown(ctx.Err())
		case <-tick.C:
		}
		var again error
		if reply, again = a.c.Failover(ctx, q); again == nil {
			return a.taken(reply, nil)
		}
		if st, serr := a.c.Status(ctx, q.VM); serr == nil && st.Interrupted != "" {
			silent = time.Now() // a plan is under way there
		} else if !unavailable(again) {
			return wire.FailoverReply{}, a.unknown(again)
		}
	}
	return wire.FailoverReply{}, a.unknown(err)
}

func (a *asking) taken(reply wire.FailoverReply, err error) (wire.FailoverReply, error) {
	if err == nil && reply.State != "accepted" {
		err = &wire.Error{Kind: wire.KindRefused, Text: a.name + ": " + reply.Detail, Hint: "replicactl vm status " + a.vm}
	}
	return reply, err
}

func (a *asking) unknown(err error) error {
	return &wire.Error{
		Kind: wire.KindUnavailable, Text: "the primary " + a.name + " was asked, and whether it fails the VM over is UNKNOWN: " + err.Error(),
		Hint: "look on both hosts: replicactl vm status " + a.vm + "; replicactl failover log " + a.vm + "; it is not asked again by itself",
	}
}
