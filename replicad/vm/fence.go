package vm

import (
	"context"
	"fmt"
	"os/exec"
	"time"

	"kvmreplica/replicad/wire"
)

const (
	fenceTimeout = time.Minute
	fenceGrace   = 2 * time.Second
)

// fence runs the configured command. It must succeed, unless a person says that
// the old primary is off all the same.
func (v *VM) fence(ctx context.Context, unfenced bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, fenceTimeout)
	defer cancel()
	r := v.record()
	cmd := exec.CommandContext(ctx, v.deps.Fence, r.Name, string(r.VM), string(r.Peer), v.mgr.peerName(r.Peer))
	cmd.WaitDelay = fenceGrace // a child of it may hold its output open
	out, err := cmd.CombinedOutput()
	said := oneLine(fmt.Sprintf("%.200s", out))
	if ctx.Err() != nil {
		err = fmt.Errorf("it did not end within %s", fenceTimeout)
	}
	switch {
	case err != nil && unfenced:
		v.log.Error("the fencing command failed, the failover goes on as asked", "command", v.deps.Fence, "err", err, "output", said)
		return fmt.Sprintf("FAILED (%v: %s), went on as asked", err, said), nil
	case err != nil:
		return "", &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("fencing command %s: %v: %s", v.deps.Fence, err, said), Hint: "mend it, or, when the old primary is certainly off: repeat with --unfenced"}
	case said == "":
		return "fenced", nil
	}
	return "fenced: " + said, nil
}
