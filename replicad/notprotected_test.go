package replicad

import (
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/wire"
)

func TestADomainThatShouldBeProtectedIsAnAlarmAfterItsTimeAndUntilItIs(t *testing.T) {
	t.Parallel()
	c, err := config.Parse([]byte(`
[[policy]]
name = "web"
match = ["web-*"]
to = "b"
alarm = true
alarm_after = "10m"
[[policy]]
name = "rest"
match = ["*"]
to = "b"
`))
	if err != nil {
		t.Fatal(err)
	}
	var u unprotected
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	nobody := func(string) bool { return false }
	names := func(after time.Duration, protected func(string) bool) (s string) {
		for _, n := range u.alarms(at.Add(after), protected) {
			if n.Condition.Code != "not-protected" || n.Condition.Severity != health.Warning || n.Policy != "web" {
				t.Errorf("%+v", n)
			}
			s += n.Name
		}
		return s
	}
	web1, db := libvirt.Domain{Name: "web-1", UUID: "1"}, libvirt.Domain{Name: "db", UUID: "2"}
	u.looked(at, []libvirt.Domain{web1, db}, c)
	if s := names(9*time.Minute, nobody); s != "" {
		t.Errorf("too early: %s", s)
	}
	u.looked(at.Add(5*time.Minute), []libvirt.Domain{web1, db, {Name: "web-2", UUID: "3"}}, c)
	if s := names(10*time.Minute, nobody); s != "web-1" {
		t.Errorf("after ten minutes: %q", s)
	}
	// It goes the moment it is protected, before anybody looks again.
	if s := names(10*time.Minute, func(id string) bool { return id == "1" }); s != "" {
		t.Errorf("protected: %q", s)
	}
	// libvirt was away for hours: nobody looked, what is known stays, and nothing is new
	// but what was on its way. A domain that comes then has all its time.
	u.looked(at.Add(5*time.Hour), []libvirt.Domain{web1, {Name: "web-3", UUID: "4"}}, c)
	if s := names(5*time.Hour+time.Minute, nobody); s != "web-1" {
		t.Errorf("after an outage: %q", s)
	}
	// One that was gone, or was protected, begins anew.
	u.looked(at.Add(6*time.Hour), nil, c)
	u.looked(at.Add(7*time.Hour), []libvirt.Domain{web1}, c)
	if s := names(7*time.Hour+9*time.Minute, nobody); s != "" {
		t.Errorf("again: %q", s)
	}
	// The policy is taken out of the configuration.
	u.looked(at.Add(8*time.Hour), []libvirt.Domain{web1}, config.Default())
	if s := names(9*time.Hour, nobody); s != "" {
		t.Errorf("without a policy: %q", s)
	}
}

// An alarm that a restart puts off for another alarm_after is none on a host
// whose daemon is restarted often.
func TestARestartDoesNotPutTheAlarmOff(t *testing.T) {
	t.Parallel()
	c, err := config.Parse([]byte("[[policy]]\nname = \"web\"\nmatch = [\"*\"]\nto = \"b\"\nalarm = true\nalarm_after = \"10m\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	state, err := fsx.OS(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	a, b := libvirt.Domain{Name: "a", UUID: "1"}, libvirt.Domain{Name: "b", UUID: "2"}
	begin := func() *unprotected {
		t.Helper()
		var u unprotected
		if err := u.open(state); err != nil {
			t.Fatal(err)
		}
		return &u
	}
	look := func(u *unprotected, after time.Duration, all ...libvirt.Domain) (s string) {
		t.Helper()
		u.looked(at.Add(after), all, c)
		if err := u.keep(); err != nil {
			t.Fatal(err)
		}
		for _, n := range u.alarms(at.Add(after), func(string) bool { return false }) {
			s += n.Name
		}
		return s
	}
	look(begin(), 0, a, b)
	if s := look(begin(), 9*time.Minute, a); s != "" {
		t.Errorf("too early: %q", s)
	}
	// b was protected, or away, meanwhile: its time begins anew, a's does not.
	if s := look(begin(), 10*time.Minute, a, b); s != "a" {
		t.Errorf("after a restart: %q", s)
	}
	if s := look(begin(), -time.Hour, a, b); s != "" { // a clock that was set back
		t.Errorf("before its time: %q", s)
	}
	if err := fsx.WriteAtomic(state, notProtectedFile, []byte("{")); err != nil {
		t.Fatal(err)
	}
	var u unprotected
	if err := u.open(state); err == nil {
		t.Error("a damaged file is read")
	}
	if s := look(&u, time.Hour, a); s != "" {
		t.Errorf("out of a damaged file: %q", s)
	}
	if s := look(begin(), time.Hour+10*time.Minute, a); s != "a" {
		t.Errorf("it is not replaced: %q", s)
	}
}

func TestWhatAReplicaKeepsIsComparedWithThePolicy(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		want, kept string
		err        error
		says       string
	}{
		{"24", "24", nil, ""},
		{"1h:1d", "24", nil, ""}, // the same in other words
		{"all:1h,1h:1d", "24", nil, "points 24 -> all:1h,1h:1d (on kvm-b: replicactl point keep web all:1h,1h:1d)"},
		{"24", "", nil, `points are not compared: kvm-b keeps ""`},
		{"24", "all of them", nil, `points are not compared: kvm-b keeps "all of them"`},
		{"24", "", &wire.Error{Kind: wire.KindUnavailable, Text: "kvm-b is away", Hint: "there"}, "points are not compared: kvm-b is away"},
	} {
		if s := pointsDrift("web", "kvm-b", c.want, c.kept, c.err); s != c.says {
			t.Errorf("%q, kept %q: %q", c.want, c.kept, s)
		}
	}
	if s := otherHost("web", "kvm-b", "kvm-c"); !strings.HasPrefix(s, "to kvm-b -> kvm-c (replicactl vm disable web;") {
		t.Error(s)
	}
}

func TestTheNextTimeOfDayIsTodayOrTomorrow(t *testing.T) {
	t.Parallel()
	zone, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	at := func(s string) time.Time {
		x, err := time.ParseInLocation(time.DateTime, s, zone)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for now, want := range map[string]string{
		"2026-01-31 21:59:59": "2026-01-31 22:00:00", "2026-01-31 22:00:00": "2026-02-01 22:00:00",
		"2026-03-28 23:00:00": "2026-03-29 22:00:00", "2026-10-25 00:30:00": "2026-10-25 22:00:00", // clocks change
	} {
		if got := nextAt(at(now), 22*time.Hour); !got.Equal(at(want)) {
			t.Errorf("%s: %s, want %s", now, got, want)
		}
	}
}
