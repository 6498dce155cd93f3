package replicad

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/api"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/peer"
	"kvmreplica/replicad/wire"
)

// limited is a schedule with one rate all the time.
const limited = "[[bandwidth]]\ndays = [\"mon\", \"tue\", \"wed\", \"thu\", \"fri\", \"sat\", \"sun\"]\nfrom = \"00:00\"\nto = \"24:00\"\nrate = \"5MB/s\"\n"

// A running daemon takes over what it can, at once and where it is used; it says
// which keys take a restart, and a bad file changes nothing.
func TestAReloadTakesOverWhatItCanAndNamesWhatTakesARestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "replicad.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	cfg, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	level := new(slog.LevelVar)
	band := &peer.Bandwidth{}
	d := &Daemon{cfg: cfg, log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: level})), bands: map[wire.HostID]*peer.Bandwidth{"b": band}}
	d.ReloadFrom(file, level)
	reload := func() (notes []string, err error) {
		err = d.Act(t.Context(), api.Action{Verb: api.Reload}, func(e api.Event) { notes = append(notes, e.Note) })
		return notes, err
	}

	write("log_level = \"debug\"\nstorage_roots = [\"/srv/new\"]\n" + limited + "[[network]]\nto = \"lan-b\"\n")
	notes, err := reload()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"Taken over: storage_roots, log_level, bandwidth, network."}, notes); diff != "" {
		t.Error(diff)
	}
	if level.Level() != slog.LevelDebug || d.conf().RateAt(time.Now()) != 5_000_000 || band.Get() != 5_000_000 {
		t.Errorf("level %v, rate %d, a connection's rate %d", level.Level(), d.conf().RateAt(time.Now()), band.Get())
	}
	if n, ok := d.network("demo", libvirt.SpecNIC{}); !ok || n.Network.Network != "lan-b" {
		t.Errorf("the network: %+v", n)
	}
	if a := d.authorisation(api.Rights{MaySend: true}); a.StorageRoot != "/srv/new" {
		t.Errorf("the storage root: %q", a.StorageRoot)
	}
	if notes, err := reload(); err != nil || len(notes) != 1 || !strings.Contains(notes[0], "Nothing has changed") {
		t.Errorf("again: %v, %v", notes, err)
	}

	before := d.conf()
	write("listn = \"typo\"\nlog_level = \"error\"\n")
	if _, err := reload(); !kindOf(err, wire.KindInvalid) || !strings.Contains(err.Error(), "line 1: listn") || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("a bad file: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := reload(); err == nil {
		t.Error("a missing file was taken")
	}
	if diff := cmp.Diff(before, d.conf()); diff != "" || level.Level() != slog.LevelDebug {
		t.Errorf("a bad file changed: %s", diff)
	}

	write("log_level = \"warn\"\nlisten = \":1234\"\n[limits]\nmax_vms = 3\n")
	notes, err = reload()
	if !kindOf(err, wire.KindRefused) || !strings.Contains(err.Error(), "listen, limits") || !strings.Contains(err.Error(), "restart") {
		t.Errorf("keys that take a restart: %v", err)
	}
	if c := d.conf(); c.Listen != cfg.Listen || c.Limits != cfg.Limits || level.Level() != slog.LevelWarn || len(notes) != 1 || band.Get() != 0 {
		t.Errorf("taken over: %v, listen %q, level %v", notes, c.Listen, level.Level())
	}
	if _, err := reload(); !kindOf(err, wire.KindRefused) {
		t.Errorf("what waits for a restart is forgotten: %v", err)
	}
}

func kindOf(err error, k wire.Kind) bool {
	w, ok := err.(*wire.Error) //nolint:errorlint // Act gives it as it is
	return ok && w.Kind == k
}
