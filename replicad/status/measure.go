package status

import "time"

// Window is what was measured in a span of time, with the names of Hyper-V
// Replica's measurements.
type Window struct {
	From           time.Time     `json:"from"`
	To             time.Time     `json:"to,omitzero"` // zero while the window is open
	Cycles         int64         `json:"cycles"`      // cuts the replica holds
	Empty          int64         `json:"empty_cycles"`
	Missed         int64         `json:"cycles_missed"`
	Errors         int64         `json:"errors"`
	Resumed        int64         `json:"epochs_resumed"`
	Abandoned      int64         `json:"epochs_abandoned"`
	RawBytes       int64         `json:"raw_bytes"`  // changed bytes shipped, before compression
	SentBytes      int64         `json:"sent_bytes"` // bytes on the wire
	LargestBytes   int64         `json:"largest_bytes"`
	Latency        time.Duration `json:"latency_sum_ns"` // cut to commit, over cycles that were not empty
	LargestLatency time.Duration `json:"largest_latency_ns"`
	RPOMax         time.Duration `json:"rpo_max_ns"` // oldest that the replica's copy was
	LastError      string        `json:"last_error,omitempty"`
}

// AverageBytes is the size of a cycle that was not empty.
func (w Window) AverageBytes() int64 { return w.RawBytes / max(1, w.Cycles-w.Empty) }

// AverageLatency is the time from cut to commit of such a cycle.
func (w Window) AverageLatency() time.Duration {
	return w.Latency / time.Duration(max(1, w.Cycles-w.Empty))
}

// Measurements are a VM's statistics on the host that ships it.
type Measurements struct {
	Name    string    `json:"name"`
	Window  Window    `json:"window"` // the open one
	Until   time.Time `json:"until"`  // when it ends
	History []Window  `json:"history"`
}
