package archtest

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// module is the import path of the module under test.
const module = "kvmreplica"

// Tree is everything the rules look at.
type Tree struct {
	fset  *token.FileSet
	files []*goFile
	docs  []doc
	names map[string]bool // every file and folder
}

// goFile is one parsed source file.
type goFile struct {
	path, dir string // slash-separated, relative to the root
	ast       *ast.File
	lines     int
	test      bool
	generated bool
}

// doc is one Markdown file.
type doc struct {
	path string
	text string
}

// Violation is one place that breaks a rule.
type Violation struct {
	Where, What string
}

func (v Violation) String() string { return v.Where + ": " + v.What }

// skipDirs are not part of the module's own sources.
func skipDirs() []string {
	return []string{".git", ".cache", ".lab", "bin", "testdata", "vendor", "node_modules"}
}

// Load reads a module. Nested modules (folders with a go.mod of their own) are
// left out.
func Load(root fs.FS) (*Tree, error) {
	t := &Tree{fset: token.NewFileSet(), names: map[string]bool{}}
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		t.names[p] = true
		if d.IsDir() {
			if _, err := fs.Stat(root, path.Join(p, "go.mod")); p != "." && err == nil || slices.Contains(skipDirs(), d.Name()) {
				return fs.SkipDir
			}
			return nil
		}
		return t.add(root, p)
	})
	return t, err
}

func (t *Tree) add(root fs.FS, p string) error {
	ext := path.Ext(p)
	if ext != ".go" && ext != ".md" {
		return nil
	}
	src, err := fs.ReadFile(root, p)
	if err != nil {
		return err
	}
	if ext == ".md" {
		t.docs = append(t.docs, doc{p, string(src)})
		return nil
	}
	f, err := parser.ParseFile(t.fset, p, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return fmt.Errorf("read %s: %w", p, err)
	}
	t.files = append(t.files, &goFile{
		path: p, dir: path.Dir(p), ast: f, lines: bytes.Count(src, []byte("\n")),
		test: strings.HasSuffix(p, "_test.go"), generated: ast.IsGenerated(f),
	})
	return nil
}

// at is "file:line" of a node, for people, not for documents.
func (t *Tree) at(n ast.Node) string {
	p := t.fset.Position(n.Pos())
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}

// imports calls fn for every import of the file.
func (f *goFile) imports(fn func(spec *ast.ImportSpec, importPath string)) {
	for _, s := range f.ast.Imports {
		if p, err := strconv.Unquote(s.Path.Value); err == nil {
			fn(s, p)
		}
	}
}

// within reports whether a folder is one of the given ones or below it.
func within(dir string, folders ...string) bool {
	return slices.ContainsFunc(folders, func(f string) bool {
		return dir == f || strings.HasPrefix(dir, f+"/")
	})
}

// selectors visits every "pkg.Name" whose pkg is an import of that name. It sees
// through renamed imports.
func (f *goFile) selectors(fn func(n ast.Node, importPath, name string)) {
	local := map[string]string{}
	f.imports(func(s *ast.ImportSpec, p string) {
		name := path.Base(p)
		if len(name) > 1 && name[0] == 'v' && name[1] >= '0' && name[1] <= '9' {
			name = path.Base(path.Dir(p))
		}
		if s.Name != nil {
			name = s.Name.Name
		}
		local[name] = p
	})
	ast.Inspect(f.ast, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if id, ok := sel.X.(*ast.Ident); ok {
				if p, ok := local[id.Name]; ok {
					fn(sel, p, sel.Sel.Name)
				}
			}
		}
		return true
	})
}
