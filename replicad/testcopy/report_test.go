package testcopy

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/wire"
)

func sample() Report {
	begun := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	return Report{
		Version: reportVersion, VM: "5eed0000-0000-4000-8000-000000000001", Name: "web|<b>", Copy: "web-test", Request: "0123456789abcdef", Scheduled: true,
		Started: begun, Finished: begun.Add(40 * time.Second), Point: "4b1f20c1/17/00112233", Ordinal: 17, Cut: begun.Add(-7 * time.Second), Isolated: true,
		Proof: "console:login:", Timeout: 10 * time.Minute, OK: true, RTO: 31500 * time.Millisecond,
		Checks:  []ReportStep{{Name: "Name", Result: "ok", Detail: "web-test"}},
		Steps:   []ReportStep{{Name: "Prove the isolation", Result: "ok", Detail: "1 cards", Took: 12 * time.Millisecond}, {Name: "Let the guest run", Result: "ok", Took: time.Second}},
		Console: "Debian GNU/Linux 12 web ttyS0\r\n\x1b[31m```\nweb login: ",
	}
}

// The forms of a report are kept as files. Set UPDATE_GOLDEN=1 after a change
// that is meant.
func TestAReportHasItsTwoForms(t *testing.T) {
	r := sample()
	b, err := json.MarshalIndent(&r, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"report.md": r.Markdown(), "report.json": string(b) + "\n"} {
		path := filepath.Join("testdata", name)
		if os.Getenv("UPDATE_GOLDEN") != "" {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), text); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestReportsAreBoundedAndFoundAgain(t *testing.T) {
	dir := t.TempDir()
	open := func() *Manager {
		t.Helper()
		root, err := fsx.OS(dir)
		if err != nil {
			t.Fatal(err)
		}
		m, err := Open(root, Deps{StateDir: dir, Now: time.Now, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	m := open()
	r := sample()
	for i := range keptReports + 5 {
		r.Started, r.OK = sample().Started.Add(time.Duration(i)*time.Hour), i < 3
		if err := m.keepReport(&r); err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(filepath.Join(dir, drillsDir, string(r.VM)))
	if err != nil || len(files) != 2*keptReports {
		t.Errorf("%d files are kept, %v", len(files), err)
	}
	if err := os.WriteFile(filepath.Join(dir, drillsDir, string(r.VM), "zzz.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := open()
	if d := cmp.Diff(m.Drills(r.VM), again.Drills(r.VM)); d != "" {
		t.Error(d)
	}
	last, proven := again.ShowDrills(r.VM)
	if last == nil || last.OK || proven != nil || last.Report != r.File {
		t.Errorf("last %+v, proven %+v", last, proven)
	}
}

func TestProofsAreReadOrRefused(t *testing.T) {
	for text, want := range map[string]Proof{
		"": {Kind: "agent"}, "agent": {Kind: "agent"}, "console:login: ": {"console", "login: "}, "tcp:443": {"tcp", "443"}, "command:/bin/true a:b": {"command", "/bin/true a:b"},
	} {
		if got, err := ParseProof(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"agent:x", "console:", "tcp:0", "tcp:ssh", "tcp:70000", "command: ", "faith", strings.Repeat("x", 2000)} {
		var w *wire.Error
		if p, err := ParseProof(text); !errors.As(err, &w) || w.Kind != wire.KindInvalid || w.Hint == "" {
			t.Errorf("%.20q: %+v, %v", text, p, err)
		}
	}
}

func TestAScheduledDrillIsDueOnceAPeriodWithinItsHour(t *testing.T) {
	at := func(day, hour, minute int) time.Time { return time.Date(2026, 11, day, hour, minute, 0, 0, time.UTC) }
	weekly := Schedule{Every: 7 * 24 * time.Hour, At: 3 * time.Hour}
	always := Schedule{Every: time.Hour, At: -1}
	for _, c := range []struct {
		s         Schedule
		now, last time.Time
		due       bool
	}{
		{weekly, at(8, 3, 0), time.Time{}, true},
		{weekly, at(8, 2, 59), time.Time{}, false},
		{weekly, at(8, 4, 0), time.Time{}, false},
		{weekly, at(15, 3, 5), at(8, 3, 20), true},
		{weekly, at(14, 3, 5), at(8, 3, 0), false},
		{always, at(8, 5, 0), at(8, 4, 0), true},
		{always, at(8, 4, 59), at(8, 4, 0), false},
		{always, at(8, 5, 0), time.Time{}, true},
	} {
		if got := c.s.due(c.now, c.last); got != c.due {
			t.Errorf("every %v at %v, last %v, now %v: due is %t", c.s.Every, c.s.At, c.last, c.now, got)
		}
	}
}

func TestAConsoleIsReadAsItGrowsAndNeverKeptWhole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	say := func(s string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
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
	c := &tail{path: path}
	if _, err := c.find("login"); err == nil {
		t.Error("found in a file that is not there")
	}
	say(strings.Repeat("noise\n", 100000) + "web log")
	if _, err := c.find("login"); err == nil {
		t.Error("half a word was found")
	}
	say("in: ")
	if got, err := c.find("login"); err != nil || got != `the console shows "web login: "` {
		t.Errorf("%s, %v", got, err)
	}
	if len(c.kept) > 2*keptConsole {
		t.Errorf("%d bytes are kept", len(c.kept))
	}
}
