package archtest

import (
	"fmt"
	"go/ast"
	"slices"
	"strings"
)

// The largest sizes, in lines.
const (
	maxFile     = 500
	maxFunction = 80
)

func fileSize(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if !f.test && !f.generated && f.lines > maxFile {
			out = append(out, Violation{f.path, fmt.Sprintf("%d lines", f.lines)})
		}
	}
	return out
}

func functionSize(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if f.test || f.generated {
			continue
		}
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			n := t.fset.Position(fn.End()).Line - t.fset.Position(fn.Pos()).Line + 1
			if n > maxFunction {
				out = append(out, Violation{t.at(fn), fmt.Sprintf("%s has %d lines", fn.Name.Name, n)})
			}
		}
	}
	return out
}

func noSleep(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if !f.test {
			continue
		}
		f.selectors(func(n ast.Node, p, name string) {
			if p == "time" && name == "Sleep" {
				out = append(out, Violation{t.at(n), "time.Sleep"})
			}
		})
	}
	return out
}

func noInit(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				out = append(out, Violation{t.at(fn), "func init"})
			}
		}
	}
	return out
}

// speaks: commands may print, and so may tests.
func speaks(f *goFile) bool {
	return f.test || f.ast.Name.Name == "main" || within(f.dir, "cmd", "integration/lab/cmd")
}

func noPrint(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if speaks(f) {
			continue
		}
		f.selectors(func(n ast.Node, p, name string) {
			if p == "fmt" && strings.HasPrefix(name, "Print") {
				out = append(out, Violation{t.at(n), "fmt." + name})
			}
		})
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if c, ok := n.(*ast.CallExpr); ok {
				if id, ok := c.Fun.(*ast.Ident); ok && (id.Name == "print" || id.Name == "println") {
					out = append(out, Violation{t.at(c), id.Name})
				}
			}
			return true
		})
	}
	return out
}

func noGlobalLog(t *Tree) []Violation {
	global := []string{
		"Debug", "Info", "Warn", "Error", "Log", "LogAttrs", "Default", "SetDefault", "With",
		"DebugContext", "InfoContext", "WarnContext", "ErrorContext",
	}
	var out []Violation
	for _, f := range t.files {
		if f.test {
			continue
		}
		f.selectors(func(n ast.Node, p, name string) {
			if p == "log" || p == "log/slog" && slices.Contains(global, name) {
				out = append(out, Violation{t.at(n), p + "." + name})
			}
		})
	}
	return out
}

func noEmbeddedDevice(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if f.test {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			s, ok := n.(*ast.StructType)
			if !ok {
				return true
			}
			for _, field := range s.Fields.List {
				if len(field.Names) == 0 && isDevice(field.Type) {
					out = append(out, Violation{t.at(field), "embeds block.Device"})
				}
			}
			return true
		})
	}
	return out
}

func isDevice(e ast.Expr) bool {
	if s, ok := e.(*ast.StarExpr); ok {
		e = s.X
	}
	sel, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	id, ok := sel.X.(*ast.Ident)
	return ok && id.Name == "block" && (sel.Sel.Name == "Device" || sel.Sel.Name == "File")
}
