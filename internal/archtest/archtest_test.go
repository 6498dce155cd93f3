package archtest

import (
	"go/ast"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"
)

func TestModuleKeepsTheRules(t *testing.T) {
	tree, err := Load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	if len(tree.files) < 20 {
		t.Fatalf("only %d source files found", len(tree.files))
	}
	for _, r := range Rules() {
		t.Run(r.Name, func(t *testing.T) {
			for _, v := range r.Check(tree) {
				t.Errorf("%v\n\twhy: %s", v, r.Reason)
			}
		})
	}
}

// broken is, for every rule, a tree that breaks it and one close to it that
// does not. Names are files, contents are sources; a package clause with its
// comment is put in front of what does not begin with one.
func broken() map[string][2]map[string]string {
	long := strings.Repeat("// x\n", 501)
	return map[string][2]map[string]string{
		"layers": {
			{"nbd/a.go": imports("kvmreplica/cbt")},
			{"nbd/a.go": imports("kvmreplica/internal/block"), "nbd/a_test.go": "package nbd\nimport _ \"kvmreplica/cbt\""},
		},
		"one-place": {
			{"replicad/vm/a.go": imports("github.com/digitalocean/go-libvirt")},
			{"libvirt/a.go": imports("github.com/digitalocean/go-libvirt")},
		},
		"offline-tools": {
			{"cmd/replicafsck/a.go": imports("kvmreplica/internal/x"), "internal/x/a.go": imports("net/http")},
			{"cmd/replicafsck/a.go": imports("kvmreplica/libvirt"), "internal/x/a_test.go": "package x\nimport _ \"net/http\"", "libvirt/a.go": imports("net")},
		},
		"thin-client": {
			{"cmd/replicactl/a.go": imports("kvmreplica/replicad/config")},
			{"cmd/replicactl/a.go": imports("kvmreplica/replicad/api")},
		},
		"nothing-imports-tests": {
			{"cbt/a_test.go": imports("kvmreplica/integration/lab")},
			{"integration/kvm/a_test.go": imports("kvmreplica/integration/lab")},
		},
		"pure": {
			{"replicad/session/machine.go": "import \"time\"\nvar x = time.Now()"},
			{"replicad/session/machine.go": "import \"time\"\nvar x time.Time", "replicad/session/primary.go": "import \"time\"\nvar x = time.Now()"},
		},
		"package-comment": {
			{"a/a.go": "// Does things.\npackage a", "b/b.go": "// Package b is.\npackage b"},
			{"a/a.go": "// Package a does things.\npackage a", "a/b.go": "package a"},
		},
		"exported-comment": {
			{"a/a.go": "type T struct{}\nfunc (T) Do() {}"},
			{"a/a.go": "// T is a thing.\ntype T struct{}\nfunc (T) String() string { return \"\" }\nfunc (t) Do() {}\ntype t int\n// The states.\nconst (\nA = 1\n)"},
		},
		"file-size":     {{"a/a.go": long}, {"a/a_test.go": long}},
		"function-size": {{"a/a.go": function(81)}, {"a/a.go": function(80)}},
		"no-sleep-in-tests": {
			{"a/a_test.go": "import t \"time\"\nfunc f() { t.Sleep(1) }"},
			{"a/a.go": "import \"time\"\nfunc f() { time.Sleep(1) }"},
		},
		"no-init": {{"a/a.go": "func init() {}"}, {"a/a.go": "type t int\nfunc (t) init() {}"}},
		"no-globals": {
			{"a/a.go": "var x map[string]int"},
			{"a/a.go": "import \"errors\"\nvar errX = errors.New(\"x\")\nvar _ = 1\nvar table = [2]int{1, 2}\nfunc f() { var x map[string]int; _ = x }"},
		},
		"no-print": {{"a/a.go": "import \"fmt\"\nfunc f() { fmt.Println() }"}, {"cmd/x/a.go": "import \"fmt\"\nfunc f() { fmt.Println() }"}},
		"no-global-log": {
			{"a/a.go": "import \"log/slog\"\nfunc f() { slog.Info(\"x\") }"},
			{"a/a.go": "import \"log/slog\"\nfunc f(l *slog.Logger) { l.Info(\"x\", slog.String(\"a\", \"b\")) }"},
		},
		"no-embedded-device": {
			{"a/a.go": "import \"kvmreplica/internal/block\"\ntype t struct { block.Device }"},
			{"a/a.go": "import \"kvmreplica/internal/block\"\ntype t struct { dev block.Device }"},
		},
		"todo-has-issue":     {{"a/a.go": "// TODO: later"}, {"a/a.go": "// TODO(#12): later"}},
		"links-resolve":      {{"docs/a.md": "see [it](b.md)"}, {"docs/a.md": "see [it](../docs/a.md#x) `[no](link)` [out](https://e.org/x)"}},
		"no-line-references": {{"docs/a.md": "see machine.go:12"}, {"docs/a.md": "see `machine.go`, at 12:30"}},
		"package-names":      {{"a/a.go": "// Package util helps.\npackage util"}, {"a/a.go": "// Package utility is.\npackage utility"}},
	}
}

func imports(path string) string { return "import _ \"" + path + "\"" }

func function(lines int) string { return "func f() {" + strings.Repeat("\n", lines-1) + "}" }

// tree loads an invented module.
func tree(t *testing.T, files map[string]string) *Tree {
	t.Helper()
	m := fstest.MapFS{}
	for name, text := range files {
		dir := strings.Split(name, "/")
		pkg := dir[len(dir)-2]
		if strings.HasPrefix(name, "cmd/") {
			pkg = "main"
		}
		if strings.HasSuffix(name, ".go") && !strings.Contains(text, "package ") {
			text = "// " + opening(pkg) + " is invented.\npackage " + pkg + "\n" + text
		}
		m[name] = &fstest.MapFile{Data: []byte(text)}
	}
	tr, err := Load(m)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestEveryRuleFailsWhereItIsBrokenAndOnlyThere(t *testing.T) {
	cases := broken()
	for _, r := range Rules() {
		c, ok := cases[r.Name]
		if !ok {
			t.Errorf("rule %s has no tree that breaks it", r.Name)
			continue
		}
		if v := r.Check(tree(t, c[0])); len(v) == 0 {
			t.Errorf("rule %s does not see what breaks it", r.Name)
		}
		if v := r.Check(tree(t, c[1])); len(v) != 0 {
			t.Errorf("rule %s sees a fault where none is: %v", r.Name, v)
		}
	}
}

func TestCheckNamesTheBrokenRules(t *testing.T) {
	got := Check(tree(t, map[string]string{"a/a.go": "func init() {}"}))
	if len(got) != 1 || len(got["no-init"]) != 1 {
		t.Errorf("got %v, want the one violation of no-init", got)
	}
}

func TestNestedModulesAndCachesAreLeftOut(t *testing.T) {
	tr := tree(t, map[string]string{
		"a/a.go": "", "internal/tools/go.mod": "module x", "internal/tools/t.go": "func init() {}",
		".cache/lab/x.go": "func init() {}", "a/testdata/x.go": "not even Go package",
	})
	if len(tr.files) != 1 {
		t.Errorf("%d files loaded, want 1", len(tr.files))
	}
}

// A handbook page that names a test which does not exist shows nothing.
func TestTheAttacksNamedInTheHandbookAreTests(t *testing.T) {
	page, err := os.ReadFile("../../docs/operations/attacks.md")
	if err != nil {
		t.Fatal(err)
	}
	have := tests(t)
	rows := regexp.MustCompile(`(?m)^\| A(\d+) \|.*$`).FindAllStringSubmatch(string(page), -1)
	if len(rows) != 20 {
		t.Errorf("%d of 20 attacks are listed", len(rows))
	}
	for i, row := range rows {
		if row[1] != strconv.Itoa(i+1) {
			t.Errorf("row %d is A%s", i+1, row[1])
		}
		dir, named := "", 0
		for _, w := range regexp.MustCompile("`([a-z]+(?:/[a-z]+)*)`|((?:Test|Fuzz)\\w+)").FindAllStringSubmatch(row[0], -1) {
			switch {
			case w[1] != "":
				dir = w[1]
			case !have[dir+" "+w[2]]:
				t.Errorf("A%s: %s has no %s", row[1], dir, w[2])
			default:
				named++
			}
		}
		if named == 0 {
			t.Errorf("A%s names no test", row[1])
		}
	}
}

// tests are all tests and fuzz targets of the module, as "folder name".
func tests(t *testing.T) map[string]bool {
	t.Helper()
	tree, err := Load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, f := range tree.files {
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && f.test {
				have[f.dir+" "+fn.Name.Name] = true
			}
		}
	}
	return have
}
