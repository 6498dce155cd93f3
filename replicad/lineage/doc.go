// Package lineage knows which history a copy of a VM belongs to, and what two
// hosts may do when their histories meet.
//
// Decide compares the two halves of a handshake and names the one thing that
// may happen next. It is pure: both hosts run it on the same two halves and
// read their own duty from the answer. Lineage is a host's durable record of
// its part (generation, ancestors, role) with every legal change of role in
// one table.
//
// It guarantees that doubt never ends in "nothing to do": every outcome either
// ships, compares, or stops; that no wall clock takes part; and that a case
// that is not listed is refused.
//
// Callers must persist a changed Lineage before they act on it, persist
// Decision.Diverged where it is set, and treat Refusal outcomes as final until
// an operator speaks.
package lineage
