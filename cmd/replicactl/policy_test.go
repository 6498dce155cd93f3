package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

func policies() status.Policies {
	every := 5 * time.Second
	return status.Policies{
		Policies: []status.Policy{{Name: "web", Match: []string{"web-*"}, Exclude: []string{"*-x"}, To: "kvm-b", Every: &every, Alarm: true, AlarmAfter: time.Hour}},
		Domains: []status.Domain{
			{Name: "db", ID: "1", State: "running", Bytes: -1, Role: status.None},
			{Name: "web-1", ID: "2", State: "off", Bytes: 1 << 20, Policy: "web", Role: status.None},
			{Name: "web-2", ID: "3", State: "running", Policy: "web", Role: status.Primary, Peer: "kvm-b", Drift: []string{"every 30s -> 5s"}, Fixed: []string{"elsewhere"}},
			{Name: "web-3", ID: "4", State: "running", Policy: "web", Role: status.Primary, Peer: "kvm-b"},
			{Name: "web-4", ID: "5", State: "off", Policy: "web", Role: status.Replica, Peer: "kvm-c"},
		},
	}
}

func TestPolicyListShowsWhatFitsWhatIsProtectedAndWhatDiffers(t *testing.T) {
	f := &fakeDaemon{answers: map[string][]any{"GET /v1/policies": {policies()}}}
	code, out, errs := ctl(t, serve(t, f), "policy", "list")
	if code != exitOK {
		t.Fatal(errs)
	}
	for _, want := range []string{
		"web: match web-*; except *-x; to kvm-b; every 5s; alarm after 1h0m0s",
		"db running ? - no", "web-1 off 1.0 MiB web no", "web-2 running 0 B web to kvm-b every 30s -> 5s; elsewhere", "web-4 off 0 B web from kvm-c",
	} {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("%q is missing:\n%s", want, out)
		}
	}
}

// The plan of all first, one question, then one after the other, whatever
// becomes of each; what could not be planned is not tried.
func TestPolicyApplyDoesEachAndSaysWhatFailed(t *testing.T) {
	bad := done(&wire.Error{Kind: wire.KindRefused, Text: "no", Hint: "h"})
	type try struct {
		id  string
		dry bool
	}
	for _, c := range []struct {
		name    string
		args    []string
		answers []any
		code    int
		want    []try
		says    string
	}{
		{"not sure", nil, []any{done(nil)}, exitUsage, []try{{"2", true}, {"3", true}}, "--yes"},
		{"dry", []string{"--dry-run"}, []any{done(nil)}, exitOK, []try{{"2", true}, {"3", true}}, ""},
		{"all", []string{"--yes"}, []any{done(nil)}, exitOK, []try{{"2", true}, {"3", true}, {"2", false}, {"3", false}}, ""},
		{"in JSON", []string{"--yes", "--json"}, []any{done(nil)}, exitOK, []try{{"2", false}, {"3", false}}, ""},
		{"one cannot be", []string{"--yes"}, []any{bad, done(nil)}, exitPartly, []try{{"2", true}, {"3", true}, {"3", false}}, "1 of 2 VMs failed"},
		{"one fails", []string{"--yes"}, []any{done(nil), done(nil), bad, done(nil)}, exitPartly, []try{{"2", true}, {"3", true}, {"2", false}, {"3", false}}, "web-1: no"},
		{"none can be", []string{"--yes"}, []any{bad}, exitFailed, []try{{"2", true}, {"3", true}}, "all 2 VMs cannot be done"},
		{"dry, one cannot be", []string{"--dry-run"}, []any{bad, done(nil)}, exitPartly, []try{{"2", true}, {"3", true}}, "1 of 2 VMs"},
		{"a named one", []string{"web-2", "WEB-2", "--yes"}, nil, exitFailed, nil, `no domain "WEB-2"`},
		{"named twice", []string{"web-2", "web-2", "web-3", "--yes"}, []any{done(nil)}, exitOK, []try{{"3", true}, {"3", false}}, ""},
		{"without a policy", []string{"db"}, nil, exitRefused, nil, "no policy of this host fits db"},
		{"all as it says", []string{"web-3", "web-4"}, nil, exitOK, nil, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &fakeDaemon{answers: map[string][]any{"GET /v1/policies": {policies()}, "POST /v1/actions": c.answers}}
			code, out, errs := ctl(t, serve(t, f), append([]string{"policy", "apply"}, c.args...)...)
			var got []try
			for _, a := range f.actions {
				if a.Verb != api.PolicyApply {
					t.Errorf("action %+v", a)
				}
				got = append(got, try{a.VM, a.DryRun})
			}
			if d := cmp.Diff(c.want, got, cmp.AllowUnexported(try{})); code != c.code || d != "" || !strings.Contains(errs, c.says) {
				t.Errorf("exit %d, want %d; %s\n%s%s", code, c.code, d, out, errs)
			}
		})
	}
}

// What only differs in what cannot be set is said, with the way to it: a policy
// that names another host is not "as it says".
func TestPolicyApplySaysWhatItCannotSet(t *testing.T) {
	p := policies()
	p.Domains = p.Domains[3:4]
	p.Domains[0].Fixed = []string{"to kvm-b -> kvm-c (replicactl vm disable web-3)"}
	for _, args := range [][]string{nil, {"web-3"}, {"--dry-run"}} {
		f := &fakeDaemon{answers: map[string][]any{"GET /v1/policies": {p}}}
		code, out, errs := ctl(t, serve(t, f), append([]string{"policy", "apply"}, args...)...)
		if code != exitOK || len(f.actions) > 0 || strings.Contains(out, "is as it says") ||
			!strings.Contains(out, "web-3 (policy web) differs and cannot be set: to kvm-b -> kvm-c (replicactl vm disable web-3)") {
			t.Errorf("%v: exit %d, %+v: %s%s", args, code, f.actions, out, errs)
		}
	}
}

func TestEnableWithoutAPeerSendsOnlyWhatWasTyped(t *testing.T) {
	ten := 10 * time.Second
	f := &fakeDaemon{answers: map[string][]any{"POST /v1/actions": {done(nil)}}}
	if code, _, errs := ctl(t, serve(t, f), "--json", "vm", "enable", "v", "--every", "10s", "--yes"); code != exitOK {
		t.Fatal(errs)
	}
	if d := cmp.Diff([]api.Action{{Verb: api.VMEnable, VM: "v", Set: &api.Settings{Interval: &ten}}}, f.actions); d != "" {
		t.Error(d)
	}
}

func TestVMListAllListsWhatIsNotProtected(t *testing.T) {
	f := &fakeDaemon{answers: map[string][]any{"GET /v1/policies": {policies()}, "GET /v1/vms": {[]status.VM{{Name: "web-2"}}}}}
	socket := serve(t, f)
	code, out, errs := ctl(t, socket, "vm", "list", "--all")
	if code != exitOK || !strings.Contains(out, "Not protected: 2") || !strings.Contains(out, "db") || !strings.Contains(out, "web-1") || strings.Contains(out, "web-3") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	code, out, errs = ctl(t, socket, "--json", "vm", "list", "--all")
	var got struct {
		VMs          []status.VM     `json:"vms"`
		NotProtected []status.Domain `json:"not_protected"`
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != exitOK || len(got.VMs) != 1 || len(got.NotProtected) != 2 {
		t.Errorf("exit %d, %v: %s%s", code, err, out, errs)
	}
}
