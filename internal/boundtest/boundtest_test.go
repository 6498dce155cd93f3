package boundtest

import (
	"fmt"
	"strings"
	"testing"
)

// judge keeps what a test would have said.
type judge struct {
	testing.TB
	said string
}

func (j *judge) Helper() {}

func (j *judge) Errorf(format string, args ...any) { j.said += fmt.Sprintf(format, args...) }

func TestAnInputThatCostsTooMuchIsNamed(t *testing.T) {
	j := &judge{}
	end := Input(j)
	b := make([]byte, MaxBytes+1<<20)
	end()
	if !strings.Contains(j.said, "allocate") {
		t.Fatalf("%d bytes were allocated and nobody said so", len(b))
	}
	t.Setenv(TimeVar, "5ms")
	j = &judge{}
	end = Input(j)
	for from := used(); used()-from < 6e6; {
	}
	end()
	if !strings.Contains(j.said, "processor time") {
		t.Fatal("6 ms were used and nobody said so")
	}
}
