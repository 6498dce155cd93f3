package powerfail_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"kvmreplica/integration/campaign"
	"kvmreplica/integration/lab"
	"kvmreplica/integration/powerfail/cutdisk"
)

// cutsPerLife is how often one disk loses power.
const cutsPerLife = 5

// entry is one life in the campaign's file, one JSON line each.
type entry struct {
	Seed  uint64        `json:"seed"`
	FS    string        `json:"fs"`
	Role  string        `json:"role"`
	Cuts  int           `json:"cuts"`
	Disk  cutdisk.Stats `json:"disk"`
	Wrong string        `json:"wrong,omitempty"`
}

// kind says what life a seed stands for.
func kind(seed uint64) (fs, role string) {
	return []string{"ext4", "xfs", "btrfs"}[seed%3], []string{"primary", "replica"}[seed/3%2]
}

// TestNothingIsLostWhenThePowerGoes lives two short lives, one of each role;
// with KVMREPLICA_SEED that one, with KVMREPLICA_POWERFAIL as many as make so
// many cuts ("make powerfail"), counted over all runs that share the file
// KVMREPLICA_CAMPAIGN.
func TestNothingIsLostWhenThePowerGoes(t *testing.T) {
	ready(t)
	f, err := files(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	life := func(t *testing.T, seed uint64, cuts int) (entry, error) {
		fs, _ := kind(seed)
		return live(t.Context(), t, seed, cuts, func(ctx context.Context) (*world, error) { return newWorld(ctx, t, f, fs, seed) })
	}
	if want, err := strconv.Atoi(os.Getenv("KVMREPLICA_POWERFAIL")); err == nil {
		run(t, want, life)
		return
	}
	seeds, cuts := []uint64{0, 4}, 1
	if s := os.Getenv("KVMREPLICA_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds, cuts = []uint64{v}, cutsPerLife
	}
	for _, seed := range seeds {
		fs, role := kind(seed)
		t.Run(fmt.Sprintf("seed %d %s %s", seed, fs, role), func(t *testing.T) {
			if e, err := life(t, seed, cuts); err != nil {
				t.Fatalf("%+v: %v", e, err)
			}
		})
	}
}

// ready skips where no guest can be booted.
func ready(t *testing.T) {
	t.Helper()
	if os.Getenv("KVMREPLICA_LAB") == "" {
		t.Skip("boots guests: KVMREPLICA_LAB=1")
	}
	for _, tool := range []string{"qemu-system-x86_64", "busybox", "mke2fs", "mkfs.xfs", "mkfs.btrfs"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
	if m := lab.Missing(); len(m) > 0 {
		t.Skipf("needs %v", m)
	}
}

// live lives one life.
func live(ctx context.Context, t *testing.T, seed uint64, cuts int, make func(context.Context) (*world, error)) (e entry, err error) {
	e = entry{Seed: seed}
	e.FS, e.Role = kind(seed)
	w, err := make(ctx)
	if err != nil {
		return e, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\nreplay with KVMREPLICA_SEED=%d; the console's end:\n%s", err, seed, w.consoleTail())
		}
		err = errors.Join(err, w.close())
	}()
	if e.Role == "replica" {
		err = newReplicaLife(w).run(cuts)
	} else {
		var l *primaryLife
		if l, err = newPrimaryLife(w); err == nil {
			err = errors.Join(l.run(cuts), l.close())
		}
	}
	e.Cuts, e.Disk = w.cuts, w.disk.Stats()
	if errors.As(err, new(wrong)) {
		e.Wrong = err.Error()
	}
	return e, err
}

// run is a campaign of so many further cuts.
func run(t *testing.T, want int, life func(*testing.T, uint64, int) (entry, error)) {
	file, err := campaign.Open[entry](os.Getenv("KVMREPLICA_CAMPAIGN"))
	if err != nil {
		t.Fatal(err)
	}
	c := lives{file}
	for goal := c.cuts() + want; c.cuts() < goal && t.Context().Err() == nil; {
		seed := c.next()
		e, err := life(t, seed, cutsPerLife)
		if err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		if err := c.Add(e); err != nil {
			t.Fatal(err)
		}
		if err != nil && e.Cuts == 0 {
			t.Fatal("nothing works")
		}
	}
	t.Log(c.totals())
}

// lives is the campaign: all lives so far.
type lives struct{ *campaign.File[entry] }

// next is the first seed that was not lived yet.
func (c lives) next() (n uint64) {
	for _, e := range c.Entries {
		n = max(n, e.Seed+1)
	}
	return n
}

func (c lives) cuts() (n int) {
	for _, e := range c.Entries {
		n += e.Cuts
	}
	return n
}

// totals is a table of all lives so far.
func (c lives) totals() string {
	text := "\nfs     role     lives  cuts  sectors kept  lost  violations\n"
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		for _, role := range []string{"primary", "replica"} {
			var lives, cuts, violations int
			var kept, lost int64
			for _, e := range c.Entries {
				if e.FS != fs || e.Role != role {
					continue
				}
				lives++
				cuts += e.Cuts
				kept += e.Disk.Kept
				lost += e.Disk.Lost
				if e.Wrong != "" {
					violations++
				}
			}
			text += fmt.Sprintf("%-6s %-8s %5d %5d %13d %5d %11d\n", fs, role, lives, cuts, kept, lost, violations)
		}
	}
	return text
}
