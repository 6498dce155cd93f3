package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/health"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// fakeDaemon answers on a socket: what is asked for is in the map, by method
// and path, and gets the next of its answers; the last one is repeated. An
// answer is an error, a list of events, or a value.
type fakeDaemon struct {
	answers map[string][]any
	asked   []string
	actions []api.Action
}

func (f *fakeDaemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := r.Method + " " + r.URL.Path
	f.asked = append(f.asked, key)
	if r.URL.Path == "/v1/actions" {
		var a api.Action
		_ = json.NewDecoder(r.Body).Decode(&a)
		f.actions = append(f.actions, a)
	}
	all := f.answers[key]
	if len(all) == 0 {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if len(all) > 1 {
		f.answers[key] = all[1:]
	}
	switch v := all[0].(type) {
	case *wire.Error:
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(v)
	case []api.Event:
		for _, e := range v {
			_ = json.NewEncoder(w).Encode(e)
		}
	default:
		_ = json.NewEncoder(w).Encode(v)
	}
}

// serve starts a fake daemon and returns its socket.
func serve(t *testing.T, f *fakeDaemon) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: f}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		if err := errors.Join(s.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return path
}

// ctl runs one command line.
func ctl(t *testing.T, socket string, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), append([]string{"--socket", socket}, args...), &o, &e, strings.NewReader(""))
	return code, o.String(), e.String()
}

func done(err *wire.Error) []api.Event { return []api.Event{{Done: true, Error: err}} }

func TestTheExitCodeSaysWhatKindOfFailureItWas(t *testing.T) {
	const act = "POST /v1/actions"
	sick := []status.VM{{Name: "v", Health: health.Critical, Reason: "broken"}}
	bare := status.Host{NotProtected: []status.NotProtected{{Name: "w", Condition: health.NotProtected("w", "web", time.Now())}}}
	for _, c := range []struct {
		name   string
		args   []string
		answer map[string][]any
		code   int
		says   []string
	}{
		{"done", []string{"vm", "pause", "v"}, map[string][]any{act: {done(nil)}}, exitOK, nil},
		{"failed", []string{"vm", "sync", "v"}, map[string][]any{act: {done(&wire.Error{Kind: wire.KindUnavailable, Text: "no", Hint: "do this"})}}, exitFailed, []string{"replicactl: no\n", "next: do this"}},
		{"not found", []string{"vm", "status", "v"}, map[string][]any{"GET /v1/vms/v": {&wire.Error{Kind: wire.KindNotFound, Text: "none", Hint: "look"}}}, exitFailed, []string{"none", "next: look"}},
		{"no verb", []string{"vm", "nonsense"}, nil, exitUsage, []string{"nonsense", "next: replicactl vm --help"}},
		{"no command", []string{"nonsense"}, nil, exitUsage, []string{"nonsense", "--help"}},
		{"no flag", []string{"vm", "list", "--nonsense"}, nil, exitUsage, []string{"--nonsense", "next: replicactl vm list --help"}},
		{"no name", []string{"vm", "status"}, nil, exitUsage, []string{"arg(s)", "next: replicactl vm status --help"}},
		{"two names", []string{"vm", "pause", "a", "b"}, nil, exitUsage, []string{"arg(s)"}},
		{"no peer and no policy", []string{"vm", "enable", "v"}, map[string][]any{act: {done(&wire.Error{Kind: wire.KindInvalid, Text: "no policy of this host fits v, and --to PEER is missing", Hint: "peer list"})}}, exitUsage, []string{"--to PEER is missing", "peer list"}},
		{"interval too long", []string{"vm", "enable", "v", "--to", "p", "--every", "25h"}, nil, exitUsage, []string{"1s to 24h"}},
		{"interval of a fraction", []string{"vm", "enable", "v", "--to", "p", "--every", "1500ms"}, nil, exitUsage, []string{"1s to 24h"}},
		{"interval below zero", []string{"vm", "enable", "v", "--to", "p", "--every", "-1s"}, nil, exitUsage, []string{"1s to 24h"}},
		{"no duration", []string{"vm", "enable", "v", "--to", "p", "--every", "soon"}, nil, exitUsage, []string{"soon"}},
		{"policy", []string{"vm", "enable", "v", "--to", "p", "--on-silent-peer", "x"}, nil, exitUsage, []string{"start or hold"}},
		{"nothing to set", []string{"vm", "set", "v"}, nil, exitUsage, []string{"say what to set", "next: replicactl vm set --help"}},
		{"set to an interval too long", []string{"vm", "set", "v", "--every", "25h"}, nil, exitUsage, []string{"1s to 24h"}},
		{"set to no time to shut down", []string{"vm", "set", "v", "--shutdown-time", "5ms"}, nil, exitUsage, []string{"1s to 24h"}},
		{"set to an unknown policy", []string{"vm", "set", "v", "--on-silent-peer", "x"}, nil, exitUsage, []string{"start or hold"}},
		{"set to an empty policy", []string{"vm", "set", "v", "--on-silent-peer", ""}, nil, exitUsage, []string{"start or hold"}},
		{"not sure", []string{"vm", "disable", "v"}, map[string][]any{act: {done(nil)}}, exitUsage, []string{"--yes"}},
		{"invalid for the daemon", []string{"peer", "join", "h", "c"}, map[string][]any{"POST /v1/peers/join": {&wire.Error{Kind: wire.KindInvalid, Text: "no code"}}}, exitUsage, []string{"no code", "next: replicactl peer join --help"}},
		{"unhealthy", []string{"health"}, map[string][]any{"GET /v1/vms": {sick}, "GET /v1/host": {status.Host{}}}, exitUnhealthy, []string{"not well: 1 of 1 VM"}},
		{"a domain is not protected", []string{"health"}, map[string][]any{"GET /v1/vms": {[]status.VM{}}, "GET /v1/host": {bare}}, exitUnhealthy, []string{"not well: 1 of 1 VM"}},
		{"health of a VM says nothing of others", []string{"health", "v"}, map[string][]any{"GET /v1/vms/v": {status.VM{Name: "v", Health: health.Normal}}, "GET /v1/host": {bare}}, exitOK, nil},
		{"attention", []string{"doctor"}, map[string][]any{"GET /v1/doctor": {[]wire.Check{{Name: "x", Result: wire.Failed, Remedy: "mend"}}}}, exitUnhealthy, []string{"1 of 1 checks"}},
		{"refused", []string{"vm", "start", "v"}, map[string][]any{act: {done(&wire.Error{Kind: wire.KindRefused, Text: "no", Hint: "h"})}}, exitRefused, []string{"next: h"}},
		{"conflict", []string{"peer", "remove", "p"}, map[string][]any{"DELETE /v1/peers/p": {&wire.Error{Kind: wire.KindConflict, Text: "shared", Hint: "h"}}}, exitRefused, []string{"shared"}},
		{"diverged", []string{"vm", "start", "v"}, map[string][]any{act: {done(&wire.Error{Kind: wire.KindDiverged, Text: "fork", Hint: "h"})}}, exitRefused, []string{"fork"}},
		{"a failed check of peer test", []string{"peer", "test", "p"}, map[string][]any{act: {[]api.Event{{Check: &wire.Check{Name: "x", Result: wire.Failed}}, {Done: true}}}}, exitFailed, []string{"1 check failed"}},
		{"the daemon goes away", []string{"vm", "sync", "v"}, map[string][]any{act: {[]api.Event{{Note: "x"}}}}, exitFailed, []string{"went away", "vm status v"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, _, errs := ctl(t, serve(t, &fakeDaemon{answers: c.answer}), c.args...)
			if code != c.code {
				t.Errorf("exit %d, want %d: %s", code, c.code, errs)
			}
			for _, s := range c.says {
				if !strings.Contains(errs, s) {
					t.Errorf("%q is missing in %q", s, errs)
				}
			}
		})
	}
}

func TestASilentDaemonAndAnInterruptHaveCodesOfTheirOwn(t *testing.T) {
	code, _, errs := ctl(t, filepath.Join(t.TempDir(), "none"), "vm", "list")
	if code != exitNoDaemon || !strings.Contains(errs, "the daemon does not answer") || !strings.Contains(errs, "systemctl status replicad") {
		t.Errorf("exit %d: %s", code, errs)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var o, e bytes.Buffer
	code = run(ctx, []string{"--socket", serve(t, &fakeDaemon{}), "vm", "list"}, &o, &e, nil)
	if code != exitInterrupted || !strings.Contains(e.String(), "interrupted") {
		t.Errorf("exit %d: %s", code, e.String())
	}
}

func TestErrorsInJSONCarryKindCauseAndNextCommand(t *testing.T) {
	f := &fakeDaemon{answers: map[string][]any{"GET /v1/vms/v": {&wire.Error{Kind: wire.KindNotFound, Text: "none\x1b[2J", Hint: "look"}}}}
	code, out, errs := ctl(t, serve(t, f), "--json", "vm", "status", "v")
	var got struct {
		Error failure
		Exit  int
	}
	if err := json.Unmarshal([]byte(errs), &got); err != nil {
		t.Fatalf("%v in %q", err, errs)
	}
	if out != "" || code != exitFailed || got.Exit != code || got.Error != (failure{"not-found", "none\x1b[2J", "look"}) {
		t.Errorf("exit %d, %+v, printed %q", code, got, out)
	}
	if strings.ContainsRune(errs, 0x1b) {
		t.Error("an escape went out raw")
	}
	for k := wire.KindInternal; k <= wire.KindSuspect; k++ {
		if n := kindName(k); n == "" || k != wire.KindInternal && n == kindName(wire.KindInternal) {
			t.Errorf("kind %d is called %q", k, n)
		}
	}
}

func TestNothingThatComesFromElsewhereSteersTheTerminal(t *testing.T) {
	const evil = "a\x1b]0;x\x07\x9b2J\u009b1m\u202e\u2028\r\nreplicactl: all is well"
	vm := status.VM{Name: evil, Primary: evil, Replica: evil, Reason: evil, State: status.Error, Health: health.Critical, Conditions: []health.Condition{{Code: "c", Text: evil, Remedy: evil}}}
	vm.Stats.LastError = evil
	f := &fakeDaemon{answers: map[string][]any{
		"GET /v1/vms":       {[]status.VM{vm}},
		"GET /v1/host":      {status.Host{}},
		"GET /v1/policies":  {status.Policies{Policies: []status.Policy{{Name: evil, Match: []string{evil}}}, Domains: []status.Domain{{Name: evil, State: evil, Policy: evil, Peer: evil, Drift: []string{evil}}}}},
		"GET /v1/vms/v":     {vm},
		"GET /v1/peers":     {[]status.Peer{{Name: evil, Address: evil, Host: evil}}},
		"GET /v1/doctor":    {[]wire.Check{{Name: evil, Result: wire.Failed, Detail: evil, Remedy: evil}}},
		"POST /v1/actions":  {append([]api.Event{{Note: evil}, {Check: &wire.Check{Name: evil, Detail: evil, Remedy: evil}}, {Step: &wire.Step{Name: evil, Result: wire.OK, Detail: evil}}, {VM: &vm}}, done(&wire.Error{Text: evil, Hint: evil})...)},
		"DELETE /v1/peers/": {&wire.Error{Text: evil}},
	}}
	socket := serve(t, f)
	for _, args := range [][]string{{"vm", "list"}, {"vm", "list", "--all"}, {"policy", "list"}, {"vm", "status", "v"}, {"peer", "list"}, {"doctor"}, {"health"}, {"vm", "pause", "v"}, {"vm", "watch", "v", "--until", "error"}} {
		_, out, errs := ctl(t, socket, args...)
		if !strings.Contains(out+errs, "all is well") {
			t.Errorf("%v: the text is missing: %q", args, out+errs)
		}
		for _, bad := range []string{"\x1b", "\x07", "\r", "\u009b", "\u202e", "\u2028", "\nreplicactl: all"} {
			if strings.Contains(out+errs, bad) || !utf8.ValidString(out+errs) {
				t.Errorf("%v lets %q through: %q", args, bad, out+errs)
			}
		}
	}
}

func TestProgressInALogIsOneLinePerNews(t *testing.T) {
	at := func(s status.State, done int64) status.VM {
		return status.VM{Name: "v", State: s, Health: health.Warning, RPO: -1, Job: &status.Job{Phase: "seed", Done: done, Total: 100, ETA: -1}}
	}
	f := &fakeDaemon{answers: map[string][]any{"GET /v1/vms/v": {at(status.Seeding, 1), at(status.Seeding, 2), at(status.Seeding, 55), at(status.Replicating, 100)}}}
	code, out, _ := ctl(t, serve(t, f), "vm", "watch", "v", "--until", "replicating")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != exitOK || len(lines) != 3 || strings.ContainsAny(out, "\r\x1b") {
		t.Fatalf("exit %d, %d lines:\n%q", code, len(lines), out)
	}
	for i, want := range []string{"1% of", "55% of", "replicating"} {
		if want = strings.ReplaceAll(want, "% of", "% "); !strings.Contains(lines[i], want) {
			t.Errorf("line %d has no %q: %s", i, want, lines[i])
		}
	}
	f.answers["GET /v1/vms/v"] = []any{at(status.Seeding, 1), at(status.Replicating, 100)}
	_, out, _ = ctl(t, serve(t, f), "--json", "vm", "watch", "v", "--until", "replicating")
	for _, l := range strings.Split(strings.TrimSpace(out), "\n") {
		var v status.VM
		if err := json.Unmarshal([]byte(l), &v); err != nil || v.Name != "v" {
			t.Errorf("%v in %q", err, l)
		}
	}
}

// The plan is shown and asked for before anything is done; --yes does it, and
// --dry-run never does.
func TestNothingIsDoneBeforeThePlanWasAgreedTo(t *testing.T) {
	for _, c := range []struct {
		args []string
		want []bool // DryRun of each action
	}{
		{[]string{"vm", "disable", "v"}, []bool{true}},
		{[]string{"vm", "disable", "v", "--dry-run"}, []bool{true}},
		{[]string{"vm", "disable", "v", "--yes"}, []bool{true, false}},
		{[]string{"--json", "vm", "disable", "v", "--yes"}, []bool{false}},
		{[]string{"--json", "vm", "disable", "v", "--dry-run"}, []bool{true}},
		{[]string{"failover", "planned", "v"}, []bool{true}},
		{[]string{"failover", "unplanned", "v", "--yes"}, []bool{true, false}},
		{[]string{"failover", "reverse", "v", "--dry-run"}, []bool{true}},
	} {
		f := &fakeDaemon{answers: map[string][]any{"POST /v1/actions": {done(nil)}}}
		ctl(t, serve(t, f), c.args...)
		if len(f.actions) != len(c.want) {
			t.Errorf("%v: %d actions: %+v", c.args, len(f.actions), f.actions)
			continue
		}
		for i, a := range f.actions {
			if a.DryRun != c.want[i] || a.VM != "v" {
				t.Errorf("%v: action %d: %+v", c.args, i, a)
			}
		}
	}
}

// Every command's help is kept as a file: what is typed is an interface. Set
// UPDATE_GOLDEN=1 to write them anew.
func TestHelpTextsAreAsTheyWere(t *testing.T) {
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			return
		}
		args := append(strings.Fields(c.CommandPath())[1:], "--help")
		code, out, errs := ctl(t, "/nonexistent", args...)
		if code != exitOK || errs != "" {
			t.Errorf("%v: exit %d: %s", args, code, errs)
		}
		golden(t, strings.ReplaceAll(c.CommandPath(), " ", "-")+".txt", out)
		for _, k := range c.Commands() {
			walk(k)
		}
	}
	walk(newRoot(&app{}))
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", "help", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(got), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != got {
		t.Errorf("%s has changed; if that is meant: UPDATE_GOLDEN=1 go test ./cmd/replicactl\n--- was\n%s\n--- is\n%s", name, want, got)
	}
}
