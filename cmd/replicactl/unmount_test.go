package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// Without a MOUNT all of a VM's mounts end, with --all alone those of every VM;
// one VM whose mounts are in use stops no other.
func TestPointUnmountEndsOneOrAll(t *testing.T) {
	mounts := []status.Mount{{ID: "1", VM: "web"}, {ID: "2", VM: "db"}, {ID: "3", VM: "web"}}
	used := done(&wire.Error{Kind: wire.KindConflict, Text: "mount 1 is in use by 1 connection", Hint: "end its clients"})
	for _, c := range []struct {
		name    string
		args    []string
		mounts  []status.Mount
		answers []any
		code    int
		want    []string // VM/MOUNT
		says    string
	}{
		{"one", []string{"web", "1"}, mounts, []any{done(nil)}, exitOK, []string{"web/1"}, ""},
		{"a VM's", []string{"web"}, mounts, []any{done(nil)}, exitOK, []string{"web/"}, ""},
		{"a VM's, in so many words", []string{"web", "--all"}, mounts, []any{done(nil)}, exitOK, []string{"web/"}, ""},
		{"every VM's", []string{"--all"}, mounts, []any{done(nil)}, exitOK, []string{"web/", "db/"}, ""},
		{"one VM's are in use", []string{"--all"}, mounts, []any{used, done(nil)}, exitPartly, []string{"web/", "db/"}, "web: mount 1 is in use by 1 connection"},
		{"nothing is mounted", []string{"--all"}, nil, nil, exitOK, nil, "Nothing is mounted."},
		{"no name", nil, mounts, nil, exitUsage, nil, "--all"},
		{"too much", []string{"web", "1", "--all"}, mounts, nil, exitUsage, nil, "leave 1 out"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &fakeDaemon{answers: map[string][]any{"GET /v1/mounts": {append([]status.Mount{}, c.mounts...)}, "POST /v1/actions": c.answers}}
			code, out, errs := ctl(t, serve(t, f), append([]string{"point", "unmount"}, c.args...)...)
			var got []string
			for _, a := range f.actions {
				if a.Verb != api.PointUnmount {
					t.Errorf("action %+v", a)
				}
				got = append(got, a.VM+"/"+a.Mount)
			}
			if d := cmp.Diff(c.want, got); code != c.code || d != "" || !strings.Contains(out+errs, c.says) {
				t.Errorf("exit %d, want %d; %s\n%s%s", code, c.code, d, out, errs)
			}
		})
	}
}
