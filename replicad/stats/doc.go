// Package stats keeps a VM's measurements as Hyper-V Replica does: counters over
// windows that begin at a fixed time of the day, a bounded history of closed
// windows, and a reset.
//
// It guarantees that every cycle is counted in exactly one window, also over
// restarts of a session (whose own counters begin at zero again) and of the
// daemon (up to what Save kept), and that a reset hides figures, never faults:
// health does not depend on it.
//
// The caller feeds it the session's running totals in order (Observe), saves it
// now and then (Marshal) and must not call it from two goroutines at once. It
// reads no clock and no file.
package stats
