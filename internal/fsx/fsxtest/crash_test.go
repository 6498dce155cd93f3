package fsxtest_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

func create(t *testing.T, f fsx.FS, name string) fsx.File {
	t.Helper()
	w, err := f.Open(name, os.O_RDWR|os.O_CREATE)
	must(t, err)
	return w
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// outcomes lists everything a cut may leave, as "name=content" lines.
func outcomes(t *testing.T, m *fsxtest.Mem) []string {
	t.Helper()
	seen := map[string]bool{}
	_, all, _, err := fsxtest.Survivors(10000, 0, 1, func(c fsxtest.Chooser) error {
		seen[show(t, m.CrashClone(c))] = true
		return nil
	})
	must(t, err)
	if !all {
		t.Fatal("more survivors than the test wants to list")
	}
	var out []string
	for s := range seen {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

// show prints files with one letter per sector, "." for zeros.
func show(t *testing.T, m *fsxtest.Mem) string {
	t.Helper()
	var parts []string
	for _, name := range m.Files() {
		b, err := m.Content(name)
		must(t, err)
		s := ""
		for i := 0; i < len(b); i += fsxtest.SectorSize {
			if b[i] == 0 {
				s += "."
			} else {
				s += string(b[i])
			}
		}
		parts = append(parts, name+"="+s)
	}
	return strings.Join(parts, " ")
}

func sectors(letters string) []byte {
	var b []byte
	for _, l := range letters {
		b = append(b, []byte(strings.Repeat(string(l), fsxtest.SectorSize))...)
	}
	return b
}

func TestEverySubsetOfUnsyncedSectorsMaySurvive(t *testing.T) {
	m := fsxtest.NewMem()
	f := create(t, m, "f")
	_, err := f.WriteAt(sectors("abc"), 0)
	must(t, err)
	must(t, f.Sync())
	must(t, m.SyncDir("."))
	if got := outcomes(t, m); !slices.Equal(got, []string{"f=abc"}) {
		t.Fatalf("synced content is not certain: %q", got)
	}
	_, err = f.WriteAt(sectors("AB"), 0)
	must(t, err)
	want := []string{"f=ABc", "f=AbC", "f=aBc", "f=abc"}
	want[1] = "f=Abc"
	slices.Sort(want)
	if got := outcomes(t, m); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	_, err = f.WriteAt(sectors("Z"), 0)
	must(t, err)
	want = []string{"f=ABc", "f=Abc", "f=ZBc", "f=Zbc", "f=aBc", "f=abc"}
	if got := outcomes(t, m); !slices.Equal(got, want) {
		t.Errorf("after writing a sector twice: got %q, want %q", got, want)
	}
}

func TestLengthAndContentSurviveApart(t *testing.T) {
	m := fsxtest.NewMem()
	f := create(t, m, "f")
	must(t, f.Sync())
	must(t, m.SyncDir("."))
	_, err := f.WriteAt(sectors("a"), 0)
	must(t, err)
	if got, want := outcomes(t, m), []string{"f=", "f=.", "f=a"}; !slices.Equal(got, want) {
		t.Errorf("grown file: got %q, want %q", got, want)
	}
	must(t, f.Sync())
	must(t, f.Truncate(0))
	if got, want := outcomes(t, m), []string{"f=", "f=.", "f=a"}; !slices.Equal(got, want) {
		t.Errorf("shrunk file: got %q, want %q", got, want)
	}
}

func TestNamesSurviveApartFromContent(t *testing.T) {
	m := fsxtest.NewMem()
	f := create(t, m, "new")
	_, err := f.WriteAt(sectors("n"), 0)
	must(t, err)
	must(t, f.Sync())
	if got, want := outcomes(t, m), []string{"", "new=n"}; !slices.Equal(got, want) {
		t.Errorf("file synced, name not: got %q, want %q", got, want)
	}
	must(t, m.SyncDir("."))
	must(t, m.Rename("new", "name"))
	if got, want := outcomes(t, m), []string{"name=n", "name=n new=n", "new=n"}; !slices.Equal(got, want) {
		t.Errorf("rename of a durable file: got %q, want %q", got, want)
	}
	must(t, m.SyncDir("."))
	must(t, m.Remove("name"))
	if got, want := outcomes(t, m), []string{"", "name=n"}; !slices.Equal(got, want) {
		t.Errorf("remove: got %q, want %q", got, want)
	}
}

func TestRenameOverKeepsOneOfBoth(t *testing.T) {
	m := fsxtest.NewMem()
	for _, n := range []string{"a", "b"} {
		f := create(t, m, n)
		_, err := f.WriteAt(sectors(n), 0)
		must(t, err)
		must(t, f.Sync())
	}
	must(t, m.SyncDir("."))
	must(t, m.Rename("a", "b"))
	if got, want := outcomes(t, m), []string{"a=a b=a", "a=a b=b", "b=a"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDirectorySurvivesMkdirAll(t *testing.T) {
	m := fsxtest.NewMem()
	must(t, m.MkdirAll("a/b"))
	c := m.CrashClone(fsxtest.Oldest)
	if names, err := c.List("a"); err != nil || !slices.Equal(names, []string{"b"}) {
		t.Errorf("after the cut: %q, %v", names, err)
	}
}

func TestFailedSyncIsReportedOnceAndForgotten(t *testing.T) {
	for _, drop := range []bool{false, true} {
		t.Run(fmt.Sprint("drop ", drop), func(t *testing.T) {
			m := fsxtest.NewMem()
			f := create(t, m, "f")
			_, err := f.WriteAt(sectors("a"), 0)
			must(t, err)
			must(t, f.Sync())
			must(t, m.SyncDir("."))
			_, err = f.WriteAt(sectors("b"), 0)
			must(t, err)
			m.Power().DropOnSyncError(drop)
			m.Power().SetHook(func(op fsxtest.Op) error {
				if op.Kind == fsxtest.Sync {
					return syscall.EIO
				}
				return nil
			})
			if err := f.Sync(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("failing sync: %v", err)
			}
			m.Power().SetHook(nil)
			must(t, f.Sync())
			if got, want := outcomes(t, m), []string{"f=a", "f=b"}; !slices.Equal(got, want) {
				t.Errorf("after a good sync: got %q, want %q", got, want)
			}
			want := map[bool]string{false: "f=b", true: "f=a"}[drop]
			if got := show(t, m); got != want {
				t.Errorf("a read shows %q, want %q", got, want)
			}
			_, err = f.WriteAt(sectors("c"), 0)
			must(t, err)
			must(t, f.Sync())
			if got, want := outcomes(t, m), []string{"f=c"}; !slices.Equal(got, want) {
				t.Errorf("written again and synced: got %q, want %q", got, want)
			}
		})
	}
}

func TestKillKeepsWhatIsVisibleAndACutAfterwardsMayLoseIt(t *testing.T) {
	m := fsxtest.NewMem()
	f := create(t, m, "f")
	_, err := f.WriteAt(sectors("a"), 0)
	must(t, err)
	k := m.KillClone(fsxtest.Newest)
	if got := show(t, k); got != "f=a" {
		t.Errorf("after the kill: %q", got)
	}
	if got := show(t, k.CrashClone(fsxtest.Oldest)); got != "" {
		t.Errorf("after kill and cut: %q, want nothing", got)
	}
}

func TestPowerGoesDuringTheChosenOperation(t *testing.T) {
	m := fsxtest.NewMem()
	f := create(t, m, "f")
	must(t, m.SyncDir("."))
	must(t, f.Sync())
	_, n := m.Power().Counts()
	m.Power().CrashAt(n + 1)
	if _, err := f.WriteAt(sectors(strings.Repeat("a", 16)), 0); !errors.Is(err, fsxtest.ErrPowerLost) {
		t.Fatalf("the write under way: %v", err)
	}
	if err := f.Sync(); !errors.Is(err, fsxtest.ErrPowerLost) {
		t.Errorf("the next operation: %v", err)
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, fsxtest.ErrPowerLost) {
		t.Errorf("a read: %v", err)
	}
	seen := map[string]bool{}
	_, _, _, err := fsxtest.Survivors(100, 0, 1, func(c fsxtest.Chooser) error {
		seen[show(t, m.KillClone(c))] = true
		return nil
	})
	must(t, err)
	for _, want := range []string{"f=................", "f=aaaaaaaa........", "f=aaaaaaaaaaaaaaaa"} {
		if !seen[want] {
			t.Errorf("a kill during the write never leaves %q: %v", want, seen)
		}
	}
}

func TestTornWriteMayLeaveGarbage(t *testing.T) {
	m := fsxtest.NewMem()
	m.SetTorn(true)
	f := create(t, m, "f")
	must(t, m.SyncDir("."))
	_, err := f.WriteAt(sectors("a"), 0)
	must(t, err)
	must(t, f.Sync())
	_, n := m.Power().Counts()
	m.Power().CrashAt(n + 1)
	_, _ = f.WriteAt(sectors("b"), 0)
	if got := outcomes(t, m); len(got) != 3 {
		t.Errorf("outcomes %q, want old, new and garbage", got)
	}
}

func TestHookShortensAndFails(t *testing.T) {
	m := fsxtest.NewMem()
	f := create(t, m, "f")
	m.Power().SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Write {
			return fsxtest.Short(100, syscall.ENOSPC)
		}
		return nil
	})
	if n, err := f.WriteAt(sectors("a"), 0); n != 100 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("short write: %d, %v", n, err)
	}
	if n, err := f.Size(); n != 100 || err != nil {
		t.Errorf("size after it: %d, %v", n, err)
	}
}

func TestCapacityIsKept(t *testing.T) {
	m := fsxtest.NewMem()
	m.SetCapacity(8192)
	f := create(t, m, "f")
	must(t, f.Allocate(0, 8192))
	if _, err := f.WriteAt(sectors("abc"), 4096); err != nil {
		t.Errorf("a write into allocated space: %v", err)
	}
	g := create(t, m, "g")
	if _, err := g.WriteAt([]byte("x"), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a write beyond the capacity: %v", err)
	}
	must(t, f.Truncate(4096))
	if _, err := g.WriteAt([]byte("x"), 0); err != nil {
		t.Errorf("a write into freed space: %v", err)
	}
	must(t, m.Remove("g"))
	if got := m.Used(); got != 4096 {
		t.Errorf("used %d, want 4096", got)
	}
}

func TestDamageHelpers(t *testing.T) {
	m := fsxtest.NewMem()
	f := create(t, m, "f")
	_, err := f.WriteAt(sectors("aaaaaaaabbbbbbbbcccc"), 0)
	must(t, err)
	must(t, f.Sync())
	must(t, m.SyncDir("."))
	older := m.CrashClone(fsxtest.Oldest)
	for _, c := range []struct {
		name   string
		damage func(m *fsxtest.Mem) error
		want   string
	}{
		{"zero", func(m *fsxtest.Mem) error { return m.ZeroBlock("f", 1) }, "f=aaaaaaaa........cccc"},
		{"swap", func(m *fsxtest.Mem) error { return m.SwapBlocks("f", 0, 1) }, "f=bbbbbbbbaaaaaaaacccc"},
		{"copy", func(m *fsxtest.Mem) error { return m.CopyBlock("f", 0, 2) }, "f=aaaaaaaabbbbbbbbaaaa"},
		{"truncate", func(m *fsxtest.Mem) error { return m.TruncateAt("f", 512) }, "f=a"},
		{"stale", func(m *fsxtest.Mem) error {
			must(t, m.ZeroBlock("f", 0))
			must(t, m.ZeroBlock("f", 1))
			return m.StaleBlock("f", 0, older)
		}, "f=aaaaaaaa........cccc"},
		{"flip", func(m *fsxtest.Mem) error { return m.FlipBit("f", 0, 1) }, "f=caaaaaaabbbbbbbbcccc"},
	} {
		d := m.CrashClone(fsxtest.Oldest)
		must(t, c.damage(d))
		if got := outcomes(t, d); !slices.Equal(got, []string{c.want}) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if err := m.FlipBit("f", 1<<20, 0); err == nil {
		t.Error("damage outside the file was accepted")
	}
	if err := m.FlipBit("g", 0, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("damage of nothing: %v", err)
	}
	if got := show(t, m); got != "f=aaaaaaaabbbbbbbbcccc" {
		t.Errorf("damage of a clone changed the original: %q", got)
	}
}

func TestSurvivorsAreEnumeratedOrSampled(t *testing.T) {
	seen := map[[3]int]bool{}
	n, all, _, err := fsxtest.Survivors(100, 5, 1, func(c fsxtest.Chooser) error {
		seen[[3]int{c(2), c(3), c(4)}] = true
		return nil
	})
	if n != 24 || len(seen) != 24 || !all || err != nil {
		t.Errorf("%d cases, %d distinct, all %v, %v; want 24", n, len(seen), all, err)
	}
	n, all, bad, err := fsxtest.Survivors(10, 5, 1, func(c fsxtest.Chooser) error {
		if c(2)+c(3)+c(4) == 6 {
			return errors.New("found")
		}
		return nil
	})
	if all || n != 2 || err == nil || !slices.Equal(bad, []int{1, 2, 3}) {
		t.Errorf("sampled: %d cases, all %v, decisions %v, %v", n, all, bad, err)
	}
}
