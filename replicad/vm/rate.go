package vm

import (
	"context"
	"fmt"
	"io"

	"kvmreplica/replicad/wire"
)

// Limiter bounds streams, all together, to a rate that may change at any time.
type Limiter interface {
	// Set is in bytes per second; 0 means no limit.
	Set(bytesPerSecond int64)
	Reader(ctx context.Context, r io.Reader) io.Reader
}

// minRate keeps a limited transfer from looking like one that stands still.
const minRate = 16 << 10

// SetRate bounds what this host sends of the VM, in bytes per second; 0 = no
// limit but the host's. It takes effect at once, also on what is under way.
func (v *VM) SetRate(rate int64) error {
	if rate != 0 && rate < minRate {
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("a limit of %d bytes per second", rate), Hint: fmt.Sprintf("at least %d, or 0 for none", minRate)}
	}
	if v.band == nil || !v.Serves() {
		return v.notShipping()
	}
	if err := v.update(func(r *Record) error { r.Rate = rate; return nil }); err != nil {
		return err
	}
	v.band.Set(rate)
	return nil
}

// limit is what the session puts around its bulk bodies.
func (v *VM) limit() func(context.Context, io.Reader) io.Reader {
	if v.band == nil {
		return nil
	}
	return v.band.Reader
}
