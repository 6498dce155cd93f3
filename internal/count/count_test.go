package count_test

import (
	"testing"

	"kvmreplica/internal/count"
)

func TestOneThingIsNoThings(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{0: "0 recovery points", 1: "1 recovery point", 2: "2 recovery points", 21: "21 recovery points"} {
		if got := count.Of(n, "recovery point"); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
