package nbd

import "time"

// A sync is handed to a worker because it may take milliseconds. Where it takes
// microseconds (memory, a cache that survives power loss, nothing to write) the
// hand-over costs more than the sync, so the loop does it itself as long as the
// export's recent syncs were quick.
const (
	// quickAlone: nothing else waits in the connection.
	quickAlone = 100 * time.Microsecond
	// quickAmong: other requests wait behind it.
	quickAmong = 20 * time.Microsecond
	// slowSync is what a sync is believed to take before one was seen.
	slowSync = time.Millisecond
)

// sync answers a FLUSH, or a request with FUA whose data is written.
func (c *conn) sync(h header) error {
	limit := quickAlone
	if c.r < c.w || c.budget.inFlight() > 0 {
		limit = quickAmong
	}
	if time.Duration(c.exp.syncCost.Load()) > limit {
		return c.park(h, 0)
	}
	if err := c.flush(); err != nil {
		return err
	}
	return c.reply(h, errnoOf(c.exp.sync(), cmdFlush))
}

// sync syncs the device and keeps a running mean of what that takes.
func (e *export) sync() error {
	start := time.Now()
	err := e.Device.Sync()
	cost := e.syncCost.Load() // another sync may be lost here: it is a mean
	e.syncCost.Store(cost - cost/8 + int64(time.Since(start))/8)
	return err
}
