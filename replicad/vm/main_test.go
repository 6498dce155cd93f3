package vm

import (
	"os"
	"testing"

	"kvmreplica/replicad/dataplane/dataplanetest"
)

// The tests' own binary is the keeper and the data plane as well.
func TestMain(m *testing.M) { os.Exit(dataplanetest.Main(m)) }
