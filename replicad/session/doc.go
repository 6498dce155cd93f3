// Package session ships one virtual machine from its primary to its replica:
// handshake, initial copy, digest comparison, and then one epoch per interval.
//
// The decisions live in Machine, which has no goroutine, clock or I/O: it takes
// the time and an event and returns actions. Session is the shell that runs
// them against a Source (the data plane) and a Replica (the peer).
//
// It guarantees that an epoch is acknowledged to the data plane only with the
// position the replica committed, that every failure but a refusal by the
// handshake table is retried with growing, jittered pauses for as long as Run
// runs, that an epoch interrupted by the network continues at the first chunk
// the replica has not verified, that a disk which is added later joins piece by
// piece without a later cut of the others (see Joining), and that Status is one immutable value.
//
// Callers run one Session per VM, keep what Status calls durable (Verified,
// Scrub) if they want it across restarts, and act on Stop conditions: those
// wait for a person.
package session
