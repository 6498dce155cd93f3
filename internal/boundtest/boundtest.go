// Package boundtest bounds what one input may cost a parser: memory always,
// processor time when a fuzzing run asks for it.
//
//	f.Fuzz(func(t *testing.T, b []byte) {
//		defer boundtest.Input(t)()
//		...
//	})
//
// What is counted is everything the process allocates and computes meanwhile,
// so that a target must not leave work of its own running.
package boundtest

import (
	"os"
	"runtime/metrics"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// MaxBytes is what one input may make us allocate, all together.
const MaxBytes = 64 << 20

// TimeVar names the environment variable that bounds the processor time of an
// input as well, e.g. "100ms". It is processor time: other work on the machine
// does not count.
const TimeVar = "KVMREPLICA_FUZZ_CPU"

// Input starts counting; what it returns ends it and fails t when the input
// cost too much.
func Input(t testing.TB) func() {
	bytes, cpu := allocated(), used()
	return func() {
		t.Helper()
		if n := allocated() - bytes; n > MaxBytes {
			t.Errorf("this input made us allocate %d MiB, %d are allowed", n>>20, MaxBytes>>20)
		}
		limit, err := time.ParseDuration(os.Getenv(TimeVar))
		if d := used() - cpu; err == nil && d > limit {
			t.Errorf("this input took %v of processor time, %v are allowed", d, limit)
		}
	}
}

// allocated is what was allocated since the process began.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// used is the processor time of the process.
func used() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
