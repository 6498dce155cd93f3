package archtest

import (
	"fmt"
	"go/ast"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strings"
)

func packageComment(t *Tree) []Violation {
	documented, first := map[string]bool{}, map[string]*goFile{}
	for _, f := range t.files {
		if f.test {
			continue
		}
		if first[f.dir] == nil {
			first[f.dir] = f
		}
		if f.ast.Doc != nil && saysWhat(f.ast.Name.Name, f.ast.Doc.Text()) {
			documented[f.dir] = true
		}
	}
	var out []Violation
	for dir, f := range first {
		if !documented[dir] {
			out = append(out, Violation{f.path, fmt.Sprintf("no file of the package says %q", opening(f.ast.Name.Name)+" ...")})
		}
	}
	return sorted(out)
}

func opening(pkg string) string {
	if pkg == "main" {
		return "Command"
	}
	return "Package " + pkg
}

func saysWhat(pkg, text string) bool { return strings.HasPrefix(text, opening(pkg)+" ") }

// wellKnown methods mean what their interface says.
func wellKnown(name string) bool {
	return slices.Contains([]string{
		"Error", "String", "Unwrap", "Is", "As", "Len", "Less", "Swap",
		"MarshalJSON", "UnmarshalJSON", "MarshalText", "UnmarshalText", "LogValue",
	}, name)
}

func exportedComment(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if f.test || f.generated || f.ast.Name.Name == "main" {
			continue
		}
		for _, d := range f.ast.Decls {
			for _, n := range undocumented(d) {
				out = append(out, Violation{t.at(n), "exported and undocumented: " + n.Name})
			}
		}
	}
	return out
}

// undocumented returns the exported names of a declaration without a comment.
// A comment on a group of constants or variables counts for all of them.
func undocumented(d ast.Decl) []*ast.Ident {
	var out []*ast.Ident
	switch d := d.(type) {
	case *ast.FuncDecl:
		exported := d.Name.IsExported() && (d.Recv == nil || receiverExported(d.Recv))
		if exported && d.Doc == nil && (d.Recv == nil || !wellKnown(d.Name.Name)) {
			out = append(out, d.Name)
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if s.Name.IsExported() && s.Doc == nil && (d.Doc == nil || d.Lparen.IsValid()) {
					out = append(out, s.Name)
				}
			case *ast.ValueSpec:
				if s.Doc != nil || s.Comment != nil || d.Doc != nil {
					continue
				}
				for _, n := range s.Names {
					if n.IsExported() {
						out = append(out, n)
					}
				}
			}
		}
	}
	return out
}

func receiverExported(r *ast.FieldList) bool {
	exported := false
	ast.Inspect(r.List[0].Type, func(n ast.Node) bool {
		if id, ok := n.(*ast.Ident); ok {
			exported = id.IsExported()
			return false
		}
		return true
	})
	return exported
}

func todoHasIssue(t *Tree) []Violation {
	open, numbered := regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b`), regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\(#\d+\)`)
	var out []Violation
	for _, f := range t.files {
		if within(f.dir, "internal/archtest") {
			continue // speaks about them
		}
		for _, g := range f.ast.Comments {
			for _, c := range g.List {
				if open.MatchString(c.Text) && !numbered.MatchString(c.Text) {
					out = append(out, Violation{t.at(c), strings.TrimSpace(c.Text)})
				}
			}
		}
	}
	return out
}

// prose is a document without its code, where a bracket is no link. Lines keep
// their numbers.
func prose(text string) string {
	text = regexp.MustCompile("(?s)```.*?```").ReplaceAllStringFunc(text, func(s string) string {
		return strings.Repeat("\n", strings.Count(s, "\n"))
	})
	return regexp.MustCompile("`[^`\n]*`").ReplaceAllString(text, "")
}

func linksResolve(t *Tree) []Violation {
	link := regexp.MustCompile(`\]\(([^)\s]+)(?:\s+"[^"]*")?\)`)
	var out []Violation
	for _, d := range t.docs {
		for i, line := range strings.Split(prose(d.text), "\n") {
			for _, m := range link.FindAllStringSubmatch(line, -1) {
				target, _, _ := strings.Cut(m[1], "#")
				if target == "" || strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
					continue
				}
				if !t.names[path.Join(path.Dir(d.path), target)] {
					out = append(out, Violation{fmt.Sprintf("%s:%d", d.path, i+1), "leads nowhere: " + m[1]})
				}
			}
		}
	}
	return out
}

func noLineReferences(t *Tree) []Violation {
	ref := regexp.MustCompile(`\b[\w/-]+\.(go|md|sh|c|h):\d+`)
	var out []Violation
	for _, d := range t.docs {
		for i, line := range strings.Split(d.text, "\n") {
			if m := ref.FindString(line); m != "" {
				out = append(out, Violation{fmt.Sprintf("%s:%d", d.path, i+1), m})
			}
		}
	}
	for _, f := range t.files {
		for _, g := range f.ast.Comments {
			if m := ref.FindString(g.Text()); m != "" && !within(f.dir, "internal/archtest") {
				out = append(out, Violation{t.at(g), m})
			}
		}
	}
	return out
}

func packageNames(t *Tree) []Violation {
	bad := []string{"util", "utils", "common", "types", "helper", "helpers", "misc", "lib", "shared", "base"}
	seen := map[string]token.Pos{}
	var out []Violation
	for _, f := range t.files {
		name := strings.TrimSuffix(f.ast.Name.Name, "_test")
		if _, ok := seen[f.dir]; !ok && slices.Contains(bad, name) {
			seen[f.dir] = f.ast.Pos()
			out = append(out, Violation{f.dir, "package " + name})
		}
	}
	return out
}
