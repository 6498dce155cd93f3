package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/boundtest"
)

const examplePath = "../../packaging/replicad.toml"

func TestTheExampleFileIsTheSchema(t *testing.T) {
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(examplePath, []byte(Example()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Example(), string(data)); d != "" {
		t.Errorf("packaging/replicad.toml is not what Example writes; run the test with UPDATE=1: %s", d)
	}
	got, err := Parse(data)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Default(), got); d != "" {
		t.Errorf("the example changes defaults: %s", d)
	}
}

// uncommented is the example with every setting in force.
func uncommented() string {
	return regexp.MustCompile(`(?m)^#(\[+[a-z.]+\]+$|[a-z_]+ = )`).ReplaceAllString(Example(), "$1")
}

func TestTheExampleShowsEveryKeyWithItsDefault(t *testing.T) {
	text := uncommented()
	got, err := Parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.TLS = TLS{Cert: "/etc/replicad/host.crt", Key: "/etc/replicad/host.key", CA: "/etc/replicad/ca.crt"}
	want.Access = Access{Operators: []string{"kvm-operators"}, Monitors: []string{"kvm-monitors"}}
	want.Bandwidth = []Window{{Days: dayNames("workdays"), From: 8 * time.Hour, To: 18 * time.Hour, Rate: 20e6}}
	want.Kernels = map[string]Kernel{"example": {Kernel: "/boot/vmlinuz", Initrd: "/boot/initrd.img"}}
	want.Networks = []NetworkMap{{From: "default", To: "default"}}
	want.Drills = []DrillPlan{{VM: "web", Every: 168 * time.Hour, At: 3 * time.Hour, Point: "latest", Proof: "agent", Timeout: 10 * time.Minute}}
	span := func(d time.Duration) *time.Duration { return &d }
	rate := int64(20e6)
	want.Policies = []Policy{{
		Name: "web", Match: []string{"web-*"}, Tags: []string{"gold"}, Exclude: []string{"*-scratch"}, To: "kvm-b", Every: span(30 * time.Second),
		AppEvery: span(time.Hour), Points: "all:1h,1h:1d", Bandwidth: &rate, Shutdown: span(5 * time.Minute), OnSilent: Start,
		InitialAt: span(22 * time.Hour), Alarm: true, AlarmAfter: 15 * time.Minute,
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	var walk func(typ reflect.Type)
	walk = func(typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			if !strings.Contains(text, f.Tag.Get("toml")) {
				t.Errorf("the example does not mention %s", f.Tag.Get("toml"))
			}
			ft := f.Type
			for ft.Kind() == reflect.Pointer || ft.Kind() == reflect.Slice || ft.Kind() == reflect.Map {
				ft = ft.Elem()
			}
			if ft.Kind() == reflect.Struct {
				walk(ft)
			}
		}
	}
	walk(reflect.TypeFor[file]())
}

func TestEveryComplaintComesAtOnceWithItsLine(t *testing.T) {
	_, err := Parse([]byte(strings.Join([]string{
		/* 1 */ `receiving = true`,
		/* 2 */ `recieving = true`,
		/* 3 */ `listen = "nowhere"`,
		/* 4 */ `state_dir = "var/lib"`,
		/* 5 */ `on_silent_peer = "panic"`,
		/* 6 */ `silent_peer_after = "120"`,
		/* 7 */ `storage_roots = ["/a/../b"]`,
		/* 8 */ `log_level = "loud"`,
		/* 9 */ `[limits]`,
		/* 10 */ `connections = 3`,
		/* 11 */ `capture_memory = "256"`,
		/* 12 */ `backlog = "1MB/s"`,
		/* 13 */ `memory = "1GiB"`,
		/* 14 */ `[tls]`,
		/* 15 */ `cert = "host.crt"`,
		/* 16 */ `[[bandwidth]]`,
		/* 17 */ `days = ["monday"]`,
		/* 18 */ `rate = "20MB/s"`,
		/* 19 */ `[[bandwidth]]`,
		/* 20 */ `from = "18:00"`,
		/* 21 */ `to = "08:00"`,
		/* 22 */ `rate = "fast"`,
		/* 23 */ `[test]`,
		/* 24 */ `name = "copy"`,
		/* 25 */ `[[network]]`,
		/* 26 */ `to = "bridge:br0"`,
		/* 27 */ `vm = "web"`,
		/* 28 */ `ip = "10.0.0.1"`,
		/* 29 */ `[[drill]]`,
		/* 30 */ `at = "26:00"`,
		/* 31 */ `every = "1s"`,
		/* 32 */ `[[policy]]`,
		/* 33 */ `name = "a"`,
		/* 34 */ `match = ["[a"]`,
		/* 35 */ `to = "kvm-b"`,
		/* 36 */ `every = "1500ms"`,
		/* 37 */ `bandwidth = "1KiB/s"`,
		/* 38 */ `initial = "soon"`,
		/* 39 */ `tag = ["x"]`,
		/* 40 */ `[[policy]]`,
		/* 41 */ `name = "a"`,
		/* 42 */ `tags = [""]`,
		/* 43 */ `exclude = [""]`,
		/* 44 */ `app_every = "1s"`,
		/* 45 */ `points = "many"`,
		/* 46 */ `shutdown_time = "-1s"`,
		/* 47 */ `on_silent_peer = "panic"`,
		/* 48 */ `alarm_after = "1y"`,
		/* 49 */ `bandwidth = "fast"`,
		/* 50 */ `initial = "at 24:00"`,
		/* 51 */ `[[policy]]`,
		/* 52 */ `to = "kvm-b"`,
	}, "\n")))
	if err == nil {
		t.Fatal("accepted")
	}
	got := err.Error()
	for _, want := range []string{
		"line 2: recieving: unknown key", "line 3: listen: ", "line 4: state_dir: ", "line 5: on_silent_peer: ",
		"line 6: silent_peer_after: ", "line 7: storage_roots: write it as /b", "line 8: log_level: ", "line 10: limits.connections: ",
		"line 11: limits.capture_memory: ", "line 12: limits.backlog: ", "line 13: limits.memory: unknown key",
		"line 14: tls: ", "line 15: tls.cert: ", "line 17: bandwidth.1.days: ", "line 21: bandwidth.2.to: ", "line 22: bandwidth.2.rate: ",
		"line 24: test.name: ", "line 28: network.1.ip: ", "drill.1.vm: is missing", "line 30: drill.1.at: ", "line 31: drill.1.every: ",
		"line 34: policy.1.match: ", "line 36: policy.1.every: ", "line 37: policy.1.bandwidth: ", "line 38: policy.1.initial: ", "line 39: policy.tag: unknown key",
		"line 41: policy.2.name: ", "policy.2.to: is missing", "line 42: policy.2.tags: ", "line 43: policy.2.exclude: ", "line 44: policy.2.app_every: ",
		"line 45: policy.2.points: ", "line 46: policy.2.shutdown_time: ", "line 47: policy.2.on_silent_peer: ", "line 48: policy.2.alarm_after: ",
		"line 49: policy.2.bandwidth: ", "line 50: policy.2.initial: ", "policy.3.name: is missing", "policy.3.match: the policy fits nothing",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("missing %q", want)
		}
	}
	if t.Failed() {
		t.Log(got)
	}
}

func TestSyntaxErrorsNameTheirLine(t *testing.T) {
	for text, want := range map[string]string{
		"receiving = true\nlisten = \"":    "line 2",
		"listen = 5":                       "listen",
		"receiving = \"yes\"":              "receiving",
		"listen = \":1\"\nlisten = \":2\"": "line 2",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestAnEmptyFileIsTheDefault(t *testing.T) {
	got, err := Parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(Default(), got); d != "" {
		t.Error(d)
	}
	if got.Receiving || Default().Validate() != nil || got.LogLevel != slog.LevelInfo {
		t.Error("the default is not what it should be")
	}
	broken := Default()
	broken.RunDir, broken.ShippingSlots = broken.StateDir, 0
	if err := broken.Validate(); err == nil || !strings.Contains(err.Error(), "run_dir") || !strings.Contains(err.Error(), "shipping_slots") {
		t.Errorf("got %v", err)
	}
}

func TestSizesNeedAUnit(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1B": 1, "512MiB": 512 << 20, "10 GiB": 10 << 30, "100MB": 100e6, "1TiB": 1 << 40,
		"": -1, "5": -1, "-1MiB": -1, "1.5GiB": -1, "MiB": -1, "1mib": -1, "9999999999TiB": -1, "99999999999999999999B": -1,
	} {
		got, err := ParseSize(s)
		if (err == nil) != (want >= 0) || err == nil && got != want {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, n := range []int64{0, 1, 1000, 1024, 1536, 64 << 20, 10 << 30, 1 << 40} {
		if got, err := ParseSize(FormatSize(n)); err != nil || got != n {
			t.Errorf("%d became %s and then %d", n, FormatSize(n), got)
		}
	}
}

func TestTheScheduleIsReadByTheClock(t *testing.T) {
	c := Config{Bandwidth: []Window{
		{Days: dayNames("workdays"), From: 8 * time.Hour, To: 18 * time.Hour, Rate: 5},
		{Days: dayNames("fri"), From: 12 * time.Hour, To: 24 * time.Hour, Rate: 9},
	}}
	for when, want := range map[string]int64{
		"2026-11-23T07:59:59Z": 0, "2026-11-23T08:00:00Z": 5, "2026-11-23T17:59:59Z": 5, "2026-11-23T18:00:00Z": 0,
		"2026-11-27T11:00:00Z": 5, "2026-11-27T12:00:00Z": 9, "2026-11-27T23:59:59Z": 9, "2026-11-28T12:00:00Z": 0,
	} {
		at, err := time.Parse(time.RFC3339, when)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.RateAt(at); got != want {
			t.Errorf("%s: %d, want %d", when, got, want)
		}
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "missing.toml")); err == nil || !strings.Contains(err.Error(), "missing.toml") {
		t.Errorf("missing file: %v", err)
	}
	bad := filepath.Join(dir, "bad.toml")
	if err := os.WriteFile(bad, []byte("x = 1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(bad); err == nil || !strings.Contains(err.Error(), "bad.toml: line 1: x: unknown key") {
		t.Errorf("bad file: %v", err)
	}
	if err := os.WriteFile(bad, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(bad); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("huge file: %v", err)
	}
}

// FuzzParse: whatever is accepted is valid.
func FuzzParse(f *testing.F) {
	f.Add([]byte(Example()))
	f.Add([]byte(uncommented()))
	f.Fuzz(func(t *testing.T, data []byte) {
		defer boundtest.Input(t)()
		c, err := Parse(data)
		if err == nil && c.Validate() != nil {
			t.Fatalf("accepted %+v: %v", c, c.Validate())
		}
	})
}

// FuzzParseSize: a size is never negative and never without its unit.
func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"0", "512MiB", "10GiB", "4611686018427387904B", "9TiB", "1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		n, err := ParseSize(s)
		if err == nil && (n < 0 || n > 0 && strings.Trim(s, "0123456789") == "") {
			t.Fatalf("%q became %d", s, n)
		}
	})
}
