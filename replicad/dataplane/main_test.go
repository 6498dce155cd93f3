package dataplane_test

import (
	"os"
	"testing"

	dt "kvmreplica/replicad/dataplane/dataplanetest"
)

func TestMain(m *testing.M) {
	if os.Getenv("STAND_IN") != "" {
		standIn()
		os.Exit(0)
	}
	os.Exit(dt.Main(m))
}
