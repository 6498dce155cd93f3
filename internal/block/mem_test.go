package block_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/block"
)

func TestMemMapsWhatWasWritten(t *testing.T) {
	const page = 64 << 10
	m := block.NewMem(4*page + 100)
	if _, err := m.WriteAt(make([]byte, 2), 2*page-1); err != nil {
		t.Fatal(err)
	}
	var got []block.Extent
	collect := func(e block.Extent) bool { got = append(got, e); return true }
	if err := m.Map(10, m.Size()-10, collect); err != nil {
		t.Fatal(err)
	}
	want := []block.Extent{
		{Range: block.Range{Off: 10, Len: page - 10}, Hole: true, Zero: true},
		{Range: block.Range{Off: page, Len: 2 * page}},
		{Range: block.Range{Off: 3 * page, Len: page + 100}, Hole: true, Zero: true},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("extents (-want +got):\n%s", diff)
	}
	if err := m.ZeroAt(page, page, true); err != nil {
		t.Fatal(err)
	}
	got = nil
	if err := m.Map(0, m.Size(), func(e block.Extent) bool { got = append(got, e); return false }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0].Len != 2*page || !got[0].Hole {
		t.Errorf("after zeroing a page, and stopping at once: %+v", got)
	}
	if err := m.Map(1, m.Size(), collect); !errors.Is(err, block.ErrRange) {
		t.Errorf("Map past the end: %v", err)
	}
}
