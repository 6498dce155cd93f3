package dataplane_test

import (
	"os"
	"testing"

	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

func TestMain(m *testing.M) { os.Exit(dt.Main(m)) }
