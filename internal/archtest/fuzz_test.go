package archtest

import (
	"go/ast"
	"os"
	"strings"
	"testing"
)

// unbounded are the fuzz targets that do not bound what an input may cost.
func unbounded(tr *Tree) (found []string) {
	for _, f := range tr.files {
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || !f.test || fn.Recv != nil || fn.Body == nil || !strings.HasPrefix(fn.Name.Name, "Fuzz") {
				continue
			}
			bounded := false
			ast.Inspect(fn.Body, func(n ast.Node) bool {
				if s, ok := n.(*ast.SelectorExpr); ok {
					x, _ := s.X.(*ast.Ident)
					bounded = bounded || x != nil && x.Name == "boundtest" && s.Sel.Name == "Input"
				}
				return true
			})
			if !bounded {
				found = append(found, f.dir+" "+fn.Name.Name)
			}
		}
	}
	return found
}

// "No allocation over 64 MiB, no input over 100 ms" holds for the targets that
// look.
func TestEveryFuzzTargetBoundsWhatAnInputMayCost(t *testing.T) {
	tr, err := Load(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range unbounded(tr) {
		t.Errorf("%s lacks: defer boundtest.Input(t)()", f)
	}
	got := unbounded(tree(t, map[string]string{
		"a/a_test.go": "import \"testing\"\nfunc FuzzA(f *testing.F) { f.Fuzz(func(t *testing.T, b []byte) {}) }",
		"b/b_test.go": "import (\"testing\"; \"kvmreplica/internal/boundtest\")\nfunc FuzzB(f *testing.F) { f.Fuzz(func(t *testing.T, b []byte) { defer boundtest.Input(t)() }) }",
	}))
	if len(got) != 1 || got[0] != "a FuzzA" {
		t.Errorf("found %q, want the one without a bound", got)
	}
}
