package console

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseReadsAnnouncementsOnly(t *testing.T) {
	got, ok := Parse("[  1.0] noise LAB[5.02] BOOT highest=613 bad=-1 clean=true free text\r\n")
	want := Line{
		Uptime: 5020 * time.Millisecond, Word: "BOOT", Text: "highest=613 bad=-1 clean=true free text",
		Args: map[string]string{"highest": "613", "bad": "-1", "clean": "true"},
		Raw:  "[  1.0] noise LAB[5.02] BOOT highest=613 bad=-1 clean=true free text",
	}
	if d := cmp.Diff(want, got); !ok || d != "" {
		t.Error(ok, "-want +got", d)
	}
	if got.Uint("highest") != 613 || got.Int("bad") != -1 || got.Uint("absent") != 0 {
		t.Errorf("numbers of %+v", got)
	}
	for _, s := range []string{"", "LAB", "LAB[", "LAB[x] BOOT", "LAB[1.0]BOOT", "SYNCED n=1"} {
		if l, ok := Parse(s); ok {
			t.Errorf("%q was taken for %+v", s, l)
		}
	}
}

// add appends to the console file.
func add(t *testing.T, path, s string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(s); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestWaitFindsLinesThatComeInPieces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	synctest.Test(t, func(t *testing.T) {
		c := Open(path)
		go func() {
			for _, s := range []string{"LAB[1] SYN", "CED n=4\nLAB[2] SYNCED n=", "9\n", "LAB[3] LAST n=9\n"} {
				<-time.After(time.Second)
				add(t, path, s)
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if n, err := c.WaitSynced(ctx, 5); n != 9 || err != nil {
			t.Errorf("got %d, %v; want 9", n, err)
		}
		if l, err := c.WaitWord(ctx, "LAST"); l.Uint("n") != 9 || err != nil {
			t.Errorf("got %+v, %v", l, err)
		}
	})
}

func TestWaitStartsWhereTheLastOneEnded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	add(t, path, "LAB[1] BOOT highest=1\nLAB[2] BOOT highest=2\n")
	c := Open(path)
	for want := uint64(1); want <= 2; want++ {
		if l, err := c.WaitBoot(t.Context()); l.Uint("highest") != want || err != nil {
			t.Errorf("got %+v, %v; want boot %d", l, err, want)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.WaitBoot(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "highest=2") {
		t.Errorf("got %v, want the deadline and the last lines", err)
	}
}

func TestConsoleStartedAnewIsReadFromItsBeginning(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	path := filepath.Join(t.TempDir(), "console")
	add(t, path, "LAB[1] BOOT highest=100\n")
	c := Open(path)
	if _, err := c.WaitBoot(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("LAB[1] INIT\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WaitWord(ctx, "INIT"); err != nil {
		t.Error(err)
	}
}

func TestLastIgnoresALineThatIsNotWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	add(t, path, "LAB[1] SYNCED n=12\nLAB[2] SYNCED n=1")
	c, err := OpenAtEnd(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := c.Synced(); n != 12 {
		t.Errorf("got %d, want 12", n)
	}
}
