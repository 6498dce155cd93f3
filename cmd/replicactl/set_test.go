package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/api"
)

// What is not typed is not sent: a zero is a setting, too.
func TestOnlySettingsThatWereTypedAreSent(t *testing.T) {
	zero, ten, hold := time.Duration(0), 10*time.Minute, "hold"
	for _, c := range []struct {
		args []string
		want api.Settings
	}{
		{[]string{"--every", "0"}, api.Settings{Interval: &zero}},
		{[]string{"--app-every", "0", "--shutdown-time", "10m"}, api.Settings{AppEvery: &zero, Shutdown: &ten}},
		{[]string{"--on-silent-peer", "hold"}, api.Settings{OnSilent: &hold}},
	} {
		f := &fakeDaemon{answers: map[string][]any{"POST /v1/actions": {done(nil)}}}
		code, _, errs := ctl(t, serve(t, f), append([]string{"vm", "set", "v"}, c.args...)...)
		want := []api.Action{{Verb: api.VMSet, VM: "v", Set: &c.want}}
		if d := cmp.Diff(want, f.actions); code != exitOK || d != "" {
			t.Errorf("%v: exit %d %s: %s", c.args, code, errs, d)
		}
	}
}
