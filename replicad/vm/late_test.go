package vm

import (
	"strings"
	"testing"

	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/wire"
)

// A planned failover goes on while the server of a disk may carry something out
// late, but whoever plans it is told, and what to do about it.
func TestAPlannedFailoverWarnsOfLateWrites(t *testing.T) {
	t.Parallel()
	var c checklist
	c.late([]dataplane.DiskStatus{{Name: "vda"}, {Name: "vdb", Late: true}}, "web")
	if len(c) != 1 || c[0].Result != wire.Warning || !strings.Contains(c[0].Detail, "disk vdb") || !strings.Contains(c[0].Remedy, "replicactl vm resync web --background") {
		t.Errorf("%+v", c)
	}
}
