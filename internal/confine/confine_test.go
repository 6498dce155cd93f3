package confine

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// tryVar makes this binary a process that tries what it can do.
const tryVar = "CONFINE_TRY"

func TestMain(m *testing.M) {
	if dir := os.Getenv(tryVar); dir != "" {
		attempts(dir)
		return
	}
	os.Exit(m.Run())
}

// attempts prints a line for each thing that is tried. It ends with a child of
// its own that tries the same.
func attempts(dir string) {
	say := func(what string, err error) {
		verdict := "works"
		if errors.Is(err, fs.ErrPermission) { // EPERM and EACCES
			verdict = "refused"
		} else if err != nil {
			verdict = err.Error()
		}
		fmt.Println(what, verdict)
	}
	change := func(name string) error {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE, 0o600)
		if err == nil {
			err = f.Close()
		}
		return err
	}
	socket := func(domain int) error {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	}
	_, err := os.ReadFile(filepath.Join(dir, "other/file"))
	say("read elsewhere", err)
	say("write a file that was named", change("one"))
	say("write below a directory that was named", change("mine/new"))
	say("write elsewhere", change("other/file"))
	say("make elsewhere", change("other/new"))
	say("remove elsewhere", os.Remove(filepath.Join(dir, "other/file")))
	say("shorten elsewhere", os.Truncate(filepath.Join(dir, "other/file"), 0))
	say("unix socket", socket(unix.AF_UNIX))
	say("network socket", socket(unix.AF_INET))
	say("raw netlink", socket(unix.AF_NETLINK))
	say("namespace", unix.Unshare(unix.CLONE_NEWUSER))
	say("mount", unix.Mount("none", filepath.Join(dir, "mine"), "tmpfs", 0, ""))
	say("trace", unix.PtraceAttach(os.Getppid()))
	say("other user", unix.Setresuid(-1, 65534, -1))
	if os.Getenv("CONFINE_LAST") == "" {
		self, err := os.Executable()
		if err != nil {
			panic(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "CONFINE_LAST=1")
		out, err := cmd.CombinedOutput()
		for l := range strings.Lines(string(out)) {
			fmt.Print("child: ", l)
		}
		if err != nil {
			fmt.Println("child:", err)
		}
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		panic(err)
	}
	for l := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(l, ":"); ok && (k == "NoNewPrivs" || k == "Seccomp" || k == "CapEff" || k == "CapPrm") {
			fmt.Println(k, strings.TrimSpace(v))
		}
	}
}

// try runs the attempts in a process with limits.
func try(t *testing.T, l func(dir string) Limits) []string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: what is taken away must be there before")
	}
	dir := t.TempDir()
	for _, d := range []string{"mine", "other"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"one", "other/file"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), tryVar+"="+dir)
	cmd.Stdout, cmd.Stderr = &out, &out
	missing, err := Start(cmd, l(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if len(missing) > 0 {
		t.Skipf("this kernel refuses limits: %q", missing)
	}
	return strings.Split(strings.TrimSpace(out.String()), "\n")
}

func TestAConfinedProcessAndItsChildrenCanOnlyDoWhatTheyWereLeft(t *testing.T) {
	got := try(t, func(dir string) Limits {
		return Limits{Writable: []string{filepath.Join(dir, "one"), filepath.Join(dir, "mine"), filepath.Join(dir, "absent")}}
	})
	want := []string{
		"read elsewhere works",
		"write a file that was named works",
		"write below a directory that was named works",
		"write elsewhere refused",
		"make elsewhere refused",
		"remove elsewhere refused",
		"shorten elsewhere refused",
		"unix socket works",
		"network socket refused",
		"raw netlink refused",
		"namespace refused",
		"mount refused",
		"trace refused",
		"other user refused",
	}
	for _, w := range want[:len(want):len(want)] {
		want = append(want, "child: "+w)
	}
	var facts []string
	var caps []uint64
	for _, g := range got {
		key, value, _ := strings.Cut(strings.TrimPrefix(g, "child: "), " ")
		switch key {
		case "CapEff", "CapPrm":
			n, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			caps = append(caps, n)
		case "NoNewPrivs", "Seccomp":
			facts = append(facts, key+" "+value)
		default:
			facts = append(facts, g)
		}
	}
	// Each process ends with its two facts, the child first.
	child := append([]string{}, want[len(want)/2:]...)
	all := append(append([]string{}, want[:len(want)/2]...), append(child, "NoNewPrivs 1", "Seccomp 2", "NoNewPrivs 1", "Seccomp 2")...)
	if diff := cmp.Diff(all, facts); diff != "" {
		t.Error("-want +got", diff)
	}
	if len(caps) != 4 {
		t.Errorf("%d words of capabilities", len(caps))
	}
	for _, c := range caps {
		if c&^uint64(kept) != 0 || c&(1<<unix.CAP_DAC_OVERRIDE) == 0 {
			t.Errorf("capabilities %x, at most %x may be left", c, uint64(kept))
		}
	}
}

func TestWhatIsNotBoundStaysAllowed(t *testing.T) {
	got := strings.Join(try(t, func(string) Limits { return Limits{Network: true} }), "\n")
	for _, want := range []string{"write elsewhere works", "network socket works", "namespace refused"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

// The thread that was bound is gone: whoever starts confined processes is as
// free as before.
func TestTheStartingProcessKeepsWhatItHas(t *testing.T) {
	for range 20 {
		try(t, func(dir string) Limits { return Limits{Writable: []string{dir}} })
	}
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tasks {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // that thread has ended
		}
		if strings.Contains(string(b), "Seccomp_filters:\t1") {
			t.Errorf("%s is bound:\n%s", f, b)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if err := os.WriteFile(filepath.Join(t.TempDir(), "file"), nil, 0o600); err != nil {
		t.Error(err)
	}
}
