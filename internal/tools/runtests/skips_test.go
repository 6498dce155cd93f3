package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestOnlyTheTestsThatAreNamedDoNotCountAsSkipped(t *testing.T) {
	file := filepath.Join(t.TempDir(), "skips")
	if err := os.WriteFile(file, []byte("2\nwhy\nmachine: a/b TestX: no containers\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n, may, err := skipLimit(file)
	if err != nil || n != 2 {
		t.Fatal(n, err)
	}
	if got := countSkips([]string{"a/b TestX: why", "a/b TestXY: why", "a/c TestX: why"}, may); got != 2 {
		t.Errorf("%d count, want 2", got)
	}
}
