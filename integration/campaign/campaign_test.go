package campaign_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"kvmreplica/integration/campaign"
)

func TestACampaignGoesOnWhereItsFileEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.jsonl")
	for i := range 3 {
		c, err := campaign.Open[int](path)
		if err != nil || !slices.Equal(c.Entries, []int{0, 1, 2}[:i]) {
			t.Fatalf("run %d begins with %v, %v", i, c.Entries, err)
		}
		if err := c.Add(i); err != nil || len(c.Entries) != i+1 {
			t.Fatalf("run %d: %v, %v", i, c.Entries, err)
		}
	}
	if err := os.WriteFile(path, []byte("1\n{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := campaign.Open[int](path); err == nil {
		t.Fatal("a file that is cut off was read")
	}
}
