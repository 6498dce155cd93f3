package lineage

import (
	"fmt"
	"slices"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Event changes a host's part.
type Event string

// The events.
const (
	// Demote: a planned failover begins.
	Demote Event = "demote"
	// Seal: the final epoch is acknowledged at Change.At and the image sealed.
	Seal Event = "seal"
	// TakeBack: the demotion ends without a hand-over. From Demoted only with
	// the peer's durable answer that it did not and will not promote.
	TakeBack Event = "take-back"
	// ForceTakeBack: the same without that answer; needs a new generation.
	ForceTakeBack Event = "force-take-back"
	// Follow: the peer owns Change.Generation now, or (from Replica) the
	// committed position moved into that generation.
	Follow Event = "follow"
	// Promote: this host owns Change.Generation from position Change.At on,
	// with the old primary's consent.
	Promote Event = "promote"
	// ForcePromote: the same without consent (unplanned failover): an operator
	// decided for this host's data, which also settles a divergence.
	ForcePromote Event = "force-promote"
	// Commit: the promotion stays.
	Commit Event = "commit"
	// Cancel: the promotion is taken back; its writes were on an overlay and
	// are gone. Change.At is the committed position that counts again.
	Cancel Event = "cancel"
	// Discard: an operator gave up this host's own writes; it will follow.
	Discard Event = "discard"
	// Keep: an operator decided for this host's data; the mark is cleared.
	Keep Event = "keep"
	// Diverge: a handshake found what Change.Diverged says.
	Diverge Event = "diverge"
)

// Change is an event with its particulars.
type Change struct {
	Event      Event
	Generation delta.Generation
	// At: the seal (Seal), the parent of the new generation (Promote,
	// ForcePromote, ForceTakeBack), the committed position (Follow, Cancel).
	At delta.Pos
	// Before is the newest position held, for Promote and ForcePromote of an
	// older point; zero means At.
	Before delta.Pos
	// Prior is the lineage before the promotion that Cancel takes back; nil
	// means that the promotion was at the newest position.
	Prior *Lineage
	// Ancestors of Generation, for Follow.
	Ancestors []delta.Pos
	Diverged  *Divergence
	// PeerConfirmed carries the peer's durable answer for TakeBack.
	PeerConfirmed bool
}

type edge struct {
	from  State
	event Event
}

// legal is the whole table; what is not in it is refused.
func legal() map[edge]State {
	return map[edge]State{
		{Primary, Demote}:         Demoting,
		{Primary, Discard}:        Replica,
		{Primary, Keep}:           Primary,
		{Primary, Diverge}:        Primary,
		{Demoting, Seal}:          Demoted,
		{Demoting, TakeBack}:      Primary,
		{Demoting, Keep}:          Demoting,
		{Demoting, Diverge}:       Demoting,
		{Demoted, TakeBack}:       Primary,
		{Demoted, ForceTakeBack}:  Primary,
		{Demoted, Follow}:         Replica,
		{Demoted, Discard}:        Replica,
		{Demoted, Keep}:           Demoted,
		{Demoted, Diverge}:        Demoted,
		{Replica, Promote}:        Promoted,
		{Replica, ForcePromote}:   Promoted,
		{Replica, Follow}:         Replica,
		{Replica, Discard}:        Replica,
		{Replica, Keep}:           Replica,
		{Replica, Diverge}:        Replica,
		{Promoted, Commit}:        Primary,
		{Promoted, Cancel}:        Replica,
		{Promoted, Discard}:       Replica,
		{Promoted, Keep}:          Promoted,
		{Promoted, Diverge}:       Promoted,
		{Primary, ForcePromote}:   Primary, // offline recovery of a primary's own image: a recorded new generation
		{Demoting, ForceTakeBack}: Primary,
	}
}

// TransitionError is a refused change of role.
type TransitionError struct {
	From  State
	Event Event
	Why   string
}

func (e *TransitionError) Error() string {
	return fmt.Sprintf("%s is not possible in state %s: %s", e.Event, e.From, e.Why)
}

// Transition is the table alone: where event leads from a state.
func Transition(from State, event Event) (State, error) {
	if to, ok := legal()[edge{from, event}]; ok {
		return to, nil
	}
	return "", &TransitionError{From: from, Event: event, Why: "no such transition"}
}

// Apply returns l after c. It changes nothing in l; the caller makes the
// result durable before it acts on it.
func (l Lineage) Apply(c Change) (Lineage, error) {
	to, err := Transition(l.State, c.Event)
	if err != nil {
		return l, err
	}
	n := l
	n.Ancestors = slices.Clone(l.Ancestors)
	n.State = to
	if why := n.particulars(l.State, c); why != "" {
		return l, &TransitionError{From: l.State, Event: c.Event, Why: why}
	}
	if err := n.Validate(); err != nil {
		return l, &TransitionError{From: l.State, Event: c.Event, Why: err.Error()}
	}
	return n, nil
}

// despiteDivergence: the event is an operator's choice, or lets nobody serve or
// ship. A planned failover that meets a divergence must be able to end: until
// it has, neither host can take the choice.
func (e Event) despiteDivergence(from State) bool {
	switch e {
	case Diverge, Discard, Keep, Cancel, TakeBack, ForceTakeBack:
		return true
	}
	return e == ForcePromote && from == Replica
}

// particulars applies what the table cannot say; it returns why not.
func (l *Lineage) particulars(from State, c Change) string {
	if l.Diverged != nil && !c.Event.despiteDivergence(from) {
		return "the copies have diverged; an operator must name the side to discard first"
	}
	switch c.Event {
	case Seal:
		if c.At.Generation != l.Generation {
			return "the seal is not in this host's generation"
		}
		l.Sealed = c.At
	case TakeBack:
		if from == Demoted && !c.PeerConfirmed {
			return "the peer has not confirmed that it did not and will not promote"
		}
		l.Sealed = delta.Pos{}
	case Promote, ForcePromote, ForceTakeBack:
		return l.newGeneration(c)
	case Follow:
		if c.Generation.IsZero() {
			return "no generation to follow"
		}
		if slices.Contains(l.GivenUp, c.Generation) {
			return "that generation was made here and given up"
		}
		// A freshly demoted host keeps its seal: it proves to the new primary
		// where its content stands. The first epoch committed ends it.
		if from == Replica && c.Generation != l.Generation {
			l.Sealed, l.Before, l.Forced, l.Discard = delta.Pos{}, delta.Pos{}, false, delta.Generation{}
		}
		l.Generation, l.Ancestors = c.Generation, bounded(c.Ancestors)
	case Cancel:
		return l.cancel(c)
	case Discard:
		if l.Generation.IsZero() {
			return "there is nothing to discard"
		}
		l.Discard, l.Diverged, l.Before, l.Forced = l.Generation, nil, delta.Pos{}, false
	case Keep:
		if l.Diverged == nil {
			return "nothing has diverged"
		}
		l.Diverged = nil
	case Diverge:
		if c.Diverged == nil {
			return "no finding given"
		}
		if l.Diverged == nil {
			d := *c.Diverged
			l.Diverged = &d
		}
	}
	return ""
}

// maxGivenUp bounds what is remembered; the oldest are forgotten.
const maxGivenUp = 64

// cancel goes back to what was before the promotion, and remembers that its
// generation is void.
func (l *Lineage) cancel(c Change) string {
	given := append([]delta.Generation{l.Generation}, l.GivenUp...)
	given = given[:min(len(given), maxGivenUp)]
	if c.Prior != nil {
		if c.Prior.VM != l.VM || c.Prior.State != Replica || c.Prior.Generation != c.At.Generation && !has(c.Prior.Ancestors, c.At.Generation) {
			return "it is not what this host was before the promotion"
		}
		*l = *c.Prior
		l.Ancestors, l.GivenUp, l.Diverged = slices.Clone(l.Ancestors), given, nil
		return ""
	}
	l.Generation, l.Before, l.Forced, l.Diverged, l.GivenUp = c.At.Generation, delta.Pos{}, false, nil, given
	if len(l.Ancestors) > 0 {
		l.Ancestors = l.Ancestors[1:]
	}
	return ""
}

func (l *Lineage) newGeneration(c Change) string {
	switch {
	case slices.Contains(l.GivenUp, c.Generation):
		return "that generation was given up here"
	case c.Generation.IsZero() || c.Generation == l.Generation:
		return "it needs a new generation"
	case c.At.IsZero():
		return "there is no complete copy to promote"
	case !l.Generation.IsZero() && c.At.Generation != l.Generation && !has(l.Ancestors, c.At.Generation):
		return "the position is not on this host's chain"
	}
	// A parent in an older generation drops what lies between.
	chain := l.Ancestors
	for len(chain) > 0 && c.At.Generation != l.Generation {
		at := chain[0].Generation
		chain = chain[1:]
		if at == c.At.Generation {
			break
		}
	}
	l.Ancestors = bounded(append([]delta.Pos{c.At}, chain...))
	l.Generation = c.Generation
	l.Before = c.Before
	if l.Before.IsZero() {
		l.Before = c.At
	}
	l.Sealed, l.Discard = delta.Pos{}, delta.Generation{}
	l.Forced = c.Event != Promote
	if c.Event == ForcePromote {
		l.Diverged = nil
	}
	return ""
}

// bounded keeps the nearest ancestors; a peer whose last common ancestor was
// dropped is "unrelated", which refuses and never ships.
func bounded(chain []delta.Pos) []delta.Pos {
	return slices.Clone(chain[:min(len(chain), wire.MaxAncestors)])
}
