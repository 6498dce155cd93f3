package archtest

import (
	"go/ast"
	"path"
	"slices"
)

// isPure: these files hold the logic that the simulator replays.
func isPure(f *goFile) bool {
	names := []string{"machine.go", "retain.go", "bitmap.go"}
	return !f.test && (slices.Contains(names, path.Base(f.path)) || within(f.dir, "replicad/lineage"))
}

func pure(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if !isPure(f) {
			continue
		}
		f.imports(func(s *ast.ImportSpec, p string) {
			if within(p, "net", "os", "crypto/rand", "syscall", "golang.org/x/sys") {
				out = append(out, Violation{t.at(s), "imports " + p})
			}
		})
		f.selectors(func(n ast.Node, p, name string) {
			if impure(p, name) {
				out = append(out, Violation{t.at(n), "uses " + p + "." + name})
			}
		})
	}
	return out
}

// impure: the clock, timers, and the generators everybody shares.
func impure(importPath, name string) bool {
	switch importPath {
	case "time":
		return slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}, name)
	case "math/rand", "math/rand/v2":
		own := []string{"New", "NewSource", "NewPCG", "NewChaCha8", "NewZipf", "Rand", "Source", "PCG", "ChaCha8", "Zipf"}
		return !slices.Contains(own, name)
	}
	return false
}
