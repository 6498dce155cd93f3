package replicad

import (
	"io"
	"log/slog"
	"testing"

	"kvmreplica/internal/fsx"
)

// A data plane that starts before libvirtd answers must know whose socket it
// makes; what is known is what libvirt said last, unless it is configured.
func TestWhomQEMURunsAsIsKeptForTheNextBoot(t *testing.T) {
	state, err := fsx.OS(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	open := func(name string) *qemuUser {
		t.Helper()
		q, err := openQEMUUser(state, name, log)
		if err != nil {
			t.Fatal(err)
		}
		return q
	}
	want := func(q *qemuUser, uid, gid int) {
		t.Helper()
		if u, g := q.owner(); u == nil || *u != uid || *g != gid {
			t.Fatalf("owner is %v:%v, want %d:%d", u, g, uid, gid)
		}
	}
	q := open("")
	if u, _ := q.owner(); u != nil {
		t.Fatalf("an owner out of nowhere: %d", *u)
	}
	q.learn(64055, 106, true)
	q.learn(0, 0, false) // libvirt did not say
	want(q, 64055, 106)
	want(open(""), 64055, 106)
	q.learn(64056, 107, true)
	want(open(""), 64056, 107)
	fixed := open("root")
	fixed.learn(5, 5, true)
	want(fixed, 0, 0)
	want(open(""), 64056, 107)

	b, err := fsx.ReadFile(state, qemuUserFile, 1<<10)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := fsx.WriteAtomic(state, qemuUserFile, b); err != nil {
		t.Fatal(err)
	}
	q = open("")
	if u, _ := q.owner(); u != nil {
		t.Fatalf("a damaged file is believed: %d", *u)
	}
	q.learn(64056, 107, true)
	want(open(""), 64056, 107)
	if _, err := openQEMUUser(state, "no-such-user-here", log); err == nil {
		t.Fatal("a user that does not exist is taken")
	}
}
