package blocktest_test

import (
	"testing"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
)

func TestMemConforms(t *testing.T) {
	blocktest.Run(t, func(_ *testing.T, size int64) block.Device { return block.NewMem(size) })
}

func TestCrashableConforms(t *testing.T) {
	blocktest.Run(t, func(_ *testing.T, size int64) block.Device { return blocktest.NewCrashable("vda", size) })
}

func TestFaultyWithoutAHookConforms(t *testing.T) {
	blocktest.Run(t, func(_ *testing.T, size int64) block.Device { return blocktest.NewFaulty(block.NewMem(size), "vda") })
}
