package archtest

import (
	"go/ast"
	"go/token"
	"strings"
)

// noGlobals allows variables of a package that are constants in all but name:
// errors, expressions, tables. What holds state is made by make, new, an
// address, or begins empty.
func noGlobals(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if f.test || f.generated {
			continue
		}
		for _, d := range f.ast.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				v, ok := s.(*ast.ValueSpec)
				if ok && v.Names[0].Name != "_" && holdsState(v) && !embedded(g, v) {
					out = append(out, Violation{t.at(v), "variable " + v.Names[0].Name})
				}
			}
		}
	}
	return out
}

func holdsState(v *ast.ValueSpec) bool {
	if len(v.Values) == 0 {
		return true
	}
	for _, e := range v.Values {
		switch e := e.(type) {
		case *ast.UnaryExpr:
			if e.Op == token.AND {
				return true
			}
		case *ast.CallExpr:
			if id, ok := e.Fun.(*ast.Ident); ok && (id.Name == "make" || id.Name == "new") {
				return true
			}
		case *ast.CompositeLit:
			if sel, ok := e.Type.(*ast.SelectorExpr); ok {
				if id, ok := sel.X.(*ast.Ident); ok && (id.Name == "sync" || id.Name == "atomic") {
					return true
				}
			}
		}
	}
	return false
}

// embedded: the compiler fills it from a file.
func embedded(g *ast.GenDecl, v *ast.ValueSpec) bool {
	for _, c := range []*ast.CommentGroup{g.Doc, v.Doc} {
		if c == nil {
			continue
		}
		for _, l := range c.List {
			if strings.HasPrefix(l.Text, "//go:embed") {
				return true
			}
		}
	}
	return false
}
