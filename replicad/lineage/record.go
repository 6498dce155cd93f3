package lineage

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// NewGeneration makes the name of a new run as primary: 128 bits of rand,
// never zero.
func NewGeneration(rand io.Reader) (delta.Generation, error) {
	var g delta.Generation
	if _, err := io.ReadFull(rand, g[:]); err != nil {
		return delta.Generation{}, fmt.Errorf("read random generation: %w", err)
	}
	if g.IsZero() {
		return delta.Generation{}, errors.New("random source returned only zeros")
	}
	return g, nil
}

// State is a host's part in a VM's replication, as far as data safety goes.
//
//	            demote            seal            follow
//	primary ───────────► demoting ────► demoted ─────────► replica
//	   ▲  ▲                 │              │                  │
//	   │  └──── take-back ──┴──────────────┘                  │ promote
//	   │            (checked, or forced: new generation)      ▼
//	   └───────────────────── commit ─────────────────── promoted ── cancel ─► replica
type State string

// The states.
const (
	Primary  State = "primary"  // serves guest writes in Generation
	Demoting State = "demoting" // planned failover under way; the final epoch is being shipped
	Demoted  State = "demoted"  // sealed at Sealed; may not serve writes
	Replica  State = "replica"  // follows
	Promoted State = "promoted" // owns Generation; waiting for commit or cancel
)

// Lineage is the durable record of one VM's history on this host. It is a
// value: Apply returns the changed record, the caller makes it durable before
// acting on it.
type Lineage struct {
	// VM guards against a state directory copied from another VM.
	VM    wire.VMID `json:"vm"`
	State State     `json:"state"`
	// Generation is the one this host owns (primary side) or follows (replica
	// side; zero while nothing is committed).
	Generation delta.Generation `json:"generation,omitzero"`
	// Ancestors are the parents of Generation, nearest first, at most
	// wire.MaxAncestors.
	Ancestors []delta.Pos `json:"ancestors,omitempty"`
	// Sealed is where a clean demotion ended; zero = not sealed.
	Sealed delta.Pos `json:"sealed,omitzero"`
	// Before is the newest position held when Generation was made here; it
	// differs from Parent when an older recovery point was promoted.
	Before delta.Pos `json:"before,omitzero"`
	// Forced records that Generation was made without the peer's consent. It
	// is never cleared within a generation.
	Forced bool `json:"forced,omitempty"`
	// Diverged is sticky until an operator names the side to discard.
	Diverged *Divergence `json:"diverged,omitempty"`
	// GivenUp are generations made here and cancelled before anything of them
	// left this host, newest first; none is ever owned or followed again.
	GivenUp []delta.Generation `json:"given_up,omitempty"`
	// Discard is the generation whose own writes an operator of this host gave up.
	Discard delta.Generation `json:"discard,omitzero"`
}

// Divergence says what was found.
type Divergence struct {
	Row    string           `json:"row"`    // Decision.Row
	Reason string           `json:"reason"` // Decision.Reason
	Other  delta.Generation `json:"other,omitzero"`
}

// Parent is where Generation began; zero for a first generation.
func (l Lineage) Parent() delta.Pos {
	if len(l.Ancestors) == 0 {
		return delta.Pos{}
	}
	return l.Ancestors[0]
}

// MayServe reports whether this host may serve guest writes of the VM.
func (l Lineage) MayServe() bool {
	return l.Diverged == nil && (l.State == Primary || l.State == Promoted)
}

// Role is what this host answers in a handshake (wire.HandshakeReply.Role).
func (l Lineage) Role() string {
	switch l.State {
	case Primary, Demoting, Promoted:
		return RolePrimary
	case Demoted, Replica:
		return RoleReplica
	}
	return RoleNone
}

// New starts the record of a VM: as the primary of generation g, or as a
// replica when g is zero.
func New(vm wire.VMID, g delta.Generation) Lineage {
	if g.IsZero() {
		return Lineage{VM: vm, State: Replica}
	}
	return Lineage{VM: vm, State: Primary, Generation: g}
}

// Validate refuses a record that no sequence of transitions could have made.
func (l Lineage) Validate() error {
	switch l.State {
	case Primary, Demoting, Promoted:
		if l.Generation.IsZero() {
			return fmt.Errorf("lineage of %s: state %s without a generation", l.VM, l.State)
		}
	case Demoted:
		if l.Sealed.IsZero() || l.Sealed.Generation != l.Generation {
			return fmt.Errorf("lineage of %s: demoted without a seal in its generation", l.VM)
		}
	case Replica:
	default:
		return fmt.Errorf("lineage of %s: unknown state %.32q", l.VM, l.State)
	}
	if len(l.Ancestors) > wire.MaxAncestors {
		return fmt.Errorf("lineage of %s: %d ancestors, at most %d", l.VM, len(l.Ancestors), wire.MaxAncestors)
	}
	if slices.ContainsFunc(l.Ancestors, func(a delta.Pos) bool {
		return a.Generation.IsZero() || a.Generation == l.Generation
	}) {
		return fmt.Errorf("lineage of %s: a generation is its own ancestor", l.VM)
	}
	return nil
}
