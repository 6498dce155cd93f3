package libvirt

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const hookPath = "../packaging/hooks/kvmreplica"

// hookDirs are the two places of verdicts.
type hookDirs struct{ run, state string }

func newHookDirs(t *testing.T) hookDirs {
	r, s := t.TempDir(), t.TempDir()
	d := hookDirs{run: filepath.Join(r, "hook"), state: filepath.Join(s, "hook")}
	must(t, os.Mkdir(d.run, 0o755))
	must(t, os.Mkdir(d.state, 0o755))
	return d
}

func (d hookDirs) call(t *testing.T, xml string, args ...string) (refused bool, stderr string) {
	t.Helper()
	cmd := exec.Command("/bin/sh", append([]string{hookPath}, args...)...)
	cmd.Env = append(os.Environ(), "REPLICAD_RUN="+filepath.Dir(d.run), "REPLICAD_STATE="+filepath.Dir(d.state), "PATH=/nonexistent")
	cmd.Stdin = strings.NewReader(xml)
	var e bytes.Buffer
	cmd.Stderr = &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return err != nil, e.String()
}

func TestHookDecidesFromFilesAlone(t *testing.T) {
	const uuid = "deadbeef-0000-4000-8000-0000000000f1"
	xml := "<domain type='kvm'>\n  <name>web</name>\n  <uuid>" + uuid + "</uuid>\n  <description>&lt;uuid&gt;</description>\n" + strings.Repeat("<x/>\n", 10000) + "</domain>\n"
	type files struct{ run, state string }
	for name, c := range map[string]struct {
		files
		op     []string
		xml    string
		refuse bool
		says   string
	}{
		"not ours":           {op: []string{"web", "prepare", "begin", "-"}},
		"refused":            {files: files{state: "refuse it is a replica of host a\nRun: replicactl failover planned web\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "it is a replica of host a. Run: replicactl failover planned web"},
		"restore refused":    {files: files{state: "refuse x\n"}, op: []string{"web", "restore", "begin", "-"}, refuse: true},
		"bare word":          {files: files{state: "refuse"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "replicactl vm status web"},
		"allowed":            {files: files{state: "allow\n"}, op: []string{"web", "prepare", "begin", "-"}},
		"refusal wins":       {files: files{run: "allow\n", state: "refuse x\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true},
		"asked, not yet":     {files: files{state: "ask replicad has not decided since the boot\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "has not decided"},
		"asked and allowed":  {files: files{run: "allow\n", state: "ask x\n"}, op: []string{"web", "prepare", "begin", "-"}},
		"asked and refused":  {files: files{run: "refuse no\n", state: "ask x\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "no."},
		"asked, garbage":     {files: files{run: "?\n", state: "ask x\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "damaged"},
		"this boot refuses":  {files: files{run: "refuse export not up\n", state: "allow\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "export not up"},
		"empty file":         {files: files{state: " "}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "damaged"},
		"garbage":            {files: files{state: "\x00\xffallow\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "damaged"},
		"other operation":    {files: files{state: "refuse x\n"}, op: []string{"web", "started", "begin", "-"}},
		"release":            {files: files{state: "refuse x\n"}, op: []string{"web", "release", "end", "-"}},
		"reconnect":          {files: files{state: "refuse x\n"}, op: []string{"web", "reconnect", "begin", "-"}},
		"no uuid":            {files: files{state: "refuse x\n"}, op: []string{"web", "prepare", "begin", "-"}, xml: "<domain/>"},
		"uuid with a path":   {files: files{state: "refuse x\n"}, op: []string{"web", "prepare", "begin", "-"}, xml: "<uuid>../../etc/passwd</uuid>"},
		"shell in the name":  {files: files{state: "refuse x\n"}, op: []string{"$(touch /tmp/kvmreplica-pwned)", "prepare", "begin", "-"}, refuse: true},
		"shell in the file":  {files: files{state: "refuse $(id) `id` \\n\n"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "$(id) `id`"},
		"no newline at end":  {files: files{state: "refuse the reason"}, op: []string{"web", "prepare", "begin", "-"}, refuse: true, says: "the reason"},
		"one line, no break": {op: []string{"web", "prepare", "begin", "-"}, files: files{state: "refuse x"}, xml: "<domain><uuid>" + uuid + "</uuid></domain>\n", refuse: true},
	} {
		t.Run(name, func(t *testing.T) {
			d := newHookDirs(t)
			for dir, text := range map[string]string{d.run: c.run, d.state: c.state} {
				if text != "" {
					must(t, os.WriteFile(filepath.Join(dir, uuid), []byte(text), 0o644))
				}
			}
			doc := xml
			if c.xml != "" {
				doc = c.xml
			}
			refused, says := d.call(t, doc, c.op...)
			if refused != c.refuse || !strings.Contains(says, c.says) {
				t.Fatalf("refused=%v, says %q", refused, says)
			}
		})
	}
	if _, err := os.Stat("/tmp/kvmreplica-pwned"); err == nil {
		t.Fatal("the hook ran what a guest's name said")
	}
}

func TestHookRefusesWhatItCannotRead(t *testing.T) {
	const uuid = "deadbeef-0000-4000-8000-0000000000f1"
	for name, make := range map[string]func(path string) error{
		"directory":    func(p string) error { return os.Mkdir(p, 0o755) },
		"dangling":     func(p string) error { return os.Symlink("/nonexistent", p) },
		"empty, 0 len": func(p string) error { return os.WriteFile(p, nil, 0o644) },
	} {
		d := newHookDirs(t)
		must(t, make(filepath.Join(d.state, uuid)))
		if refused, says := d.call(t, "<uuid>"+uuid+"</uuid>\n", "web", "prepare", "begin", "-"); !refused || !strings.Contains(says, "damaged") {
			t.Errorf("%s: refused=%v, says %q", name, refused, says)
		}
	}
}

func TestHookIsQuick(t *testing.T) {
	d := newHookDirs(t)
	xml := "<domain>\n<name>x</name>\n<uuid>deadbeef-0000-4000-8000-0000000000f1</uuid>\n" + strings.Repeat("<disk/>\n", 20000)
	best := time.Hour // of processor time: a busy machine stretches the clock's
	for range 5 {
		before := childTime(t)
		d.call(t, xml, "x", "prepare", "begin", "-")
		best = min(best, childTime(t)-before)
	}
	t.Logf("best of 5: %v", best)
	if best > 200*time.Millisecond {
		t.Fatalf("took %v", best)
	}
}

// childTime is the processor time of all ended children.
func childTime(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	must(t, syscall.Getrusage(syscall.RUSAGE_CHILDREN, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestHookHoldsARealLibvirtd proves that libvirtd runs hooks/qemu.d and that
// its refusal reaches the caller with the reason.
func TestHookHoldsARealLibvirtd(t *testing.T) {
	needs(t, "qemu-system-x86_64")
	script, err := os.ReadFile(hookPath)
	must(t, err)
	h := startLibvirtd(t, labConfig{Hook: string(script)})
	host := h.connect("qemu:///system")
	const uuid = "deadbeef-0000-4000-8000-0000000000f2"
	_, err = host.Define(t.Context(), []byte("<domain type='qemu'><name>held</name><uuid>"+uuid+"</uuid><memory unit='MiB'>32</memory><os><type arch='x86_64' machine='pc'>hvm</type></os><devices><memballoon model='none'/></devices></domain>"))
	must(t, err)
	must(t, os.MkdirAll(filepath.Join(h.dir, "replicad", "hook"), 0o755))
	verdict := filepath.Join(h.dir, "replicad", "hook", uuid)
	must(t, os.WriteFile(verdict, []byte("refuse it is a replica\nRun: replicactl failover planned held\n"), 0o644))
	err = host.Start(t.Context(), uuid, StartOptions{Paused: true})
	if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "replicactl failover planned held") {
		t.Fatalf("kind %v: %v", KindOf(err), err)
	}
	t.Logf("libvirtd says: %v", err)
	if st, _, err := host.DomainState(t.Context(), uuid); err != nil || st != StateOff {
		t.Fatalf("%s %v", st, err)
	}
	must(t, os.Remove(verdict))
	must(t, host.Start(t.Context(), uuid, StartOptions{Paused: true}))
	must(t, host.Destroy(t.Context(), uuid, false))
}
