package archtest

import (
	"go/ast"
	"slices"
	"sort"
	"strings"
)

// allowed says which of our own packages the packages below a folder may
// import, besides those below the folder itself. Folders that are not listed
// may import anything that no other rule forbids. Test files are free.
func allowed() map[string][]string {
	return map[string][]string{
		"internal/block":     {},
		"internal/fsx":       {},
		"internal/count":     {},
		"nbd":                {"internal/block"},
		"cbt":                {"internal/block", "internal/fsx"},
		"libvirt":            {},
		"replicad/delta":     {"internal/block"},
		"replicad/wire":      {"replicad/delta"},
		"replicad/lineage":   {"replicad/delta", "replicad/wire"},
		"replicad/points":    {"replicad/delta", "internal"},
		"replicad/firmware":  {"replicad/delta", "internal"},
		"replicad/overlay":   {"replicad/delta", "internal"},
		"replicad/standby":   {"replicad/delta", "replicad/overlay", "replicad/points", "internal"},
		"replicad/isolate":   {},
		"replicad/testcopy":  {"nbd", "libvirt", "replicad/delta", "replicad/wire", "replicad/failover", "replicad/lineage", "replicad/points", "replicad/overlay", "replicad/isolate", "replicad/status", "replicad/health", "internal"},
		"replicad/peer":      {"replicad/delta", "replicad/wire", "internal"},
		"replicad/media":     {"replicad/delta", "internal"},
		"replicad/mount":     {"nbd", "replicad/overlay", "internal"},
		"replicad/dataplane": {"nbd", "cbt", "replicad/delta", "replicad/overlay", "replicad/points", "replicad/standby", "replicad/wire", "internal"},
		// The data plane's client and messages are the session's other end.
		"replicad/session":  {"replicad/delta", "replicad/lineage", "replicad/wire", "replicad/dataplane", "internal"},
		"replicad/failover": {"replicad/delta", "replicad/lineage", "replicad/wire", "internal"},
		"replicad/config":   {},
		"replicad/health":   {},
		"replicad/status":   {"replicad/health", "replicad/wire"},
		"replicad/stats":    {"replicad/status"},
		"replicad/api":      {"replicad/status", "replicad/health", "replicad/wire"},
	}
}

func layers(t *Tree) []Violation {
	var out []Violation
	for folder, may := range allowed() {
		for _, f := range t.files {
			if f.test || !within(f.dir, folder) || doubles(f.dir) {
				continue
			}
			f.imports(func(s *ast.ImportSpec, p string) {
				rel, ours := strings.CutPrefix(p, module+"/")
				if ours && !within(rel, folder) && !within(rel, may...) {
					out = append(out, Violation{t.at(s), folder + " may not import " + rel})
				}
			})
		}
	}
	return sorted(out)
}

// doubles are packages of test doubles and conformance suites; only tests
// import them, so that they are as free as tests.
func doubles(dir string) bool { return strings.HasSuffix(dir, "test") }

// home says where a foreign module may be imported.
type home struct {
	module         string
	folders, files []string
	tests          bool // test files may, anywhere
}

func homes() []home {
	return []home{
		{module: "github.com/digitalocean/go-libvirt", folders: []string{"libvirt"}},
		{module: "libvirt.org/go/libvirtxml", files: []string{"libvirt/domain.go", "libvirt/vmspec.go"}, tests: true},
		{module: "github.com/pojntfx/go-nbd", files: []string{"nbd/proto.go", "nbd/gonbd.go"}, tests: true},
		{module: "filippo.io/age", folders: []string{"replicad/media"}, tests: true},
		{module: "github.com/spf13/cobra", folders: []string{"cmd"}},
		{module: "github.com/prometheus/client_golang", folders: []string{"replicad/metrics"}},
		{module: "github.com/vishvananda", folders: []string{"libvirt", "replicad/isolate", "replicad/peer", "integration"}},
	}
}

func onePlace(t *Tree) []Violation {
	var out []Violation
	for _, h := range homes() {
		for _, f := range t.files {
			if h.tests && f.test || within(f.dir, h.folders...) || slices.Contains(h.files, f.path) {
				continue
			}
			f.imports(func(s *ast.ImportSpec, p string) {
				if within(p, h.module) {
					out = append(out, Violation{t.at(s), p + " belongs in " + strings.Join(append(h.folders, h.files...), ", ") + " alone"})
				}
			})
		}
	}
	return out
}

// reach returns what the packages below folder import, directly or through
// packages of ours, outside tests: import path to the place of the first
// import that leads there. The imports of the package closed do not count.
func (t *Tree) reach(folder, closed string) map[string]string {
	byDir := map[string][]*goFile{}
	for _, f := range t.files {
		if !f.test {
			byDir[f.dir] = append(byDir[f.dir], f)
		}
	}
	found := map[string]string{}
	var visit func(dir, via string)
	visit = func(dir, via string) {
		for _, f := range byDir[dir] {
			f.imports(func(s *ast.ImportSpec, p string) {
				if _, ok := found[p]; ok {
					return
				}
				from := via
				if from == "" {
					from = t.at(s)
				}
				found[p] = from
				if rel, ours := strings.CutPrefix(p, module+"/"); ours && p != closed {
					visit(rel, from)
				}
			})
		}
	}
	for dir := range byDir {
		if within(dir, folder) {
			visit(dir, "")
		}
	}
	return found
}

// offlineTools: replicafsck release must redefine domains, which only the
// libvirtd of the same machine can do, over its unix socket; what the libvirt
// package itself imports for that is not looked into. The daemon and every
// other way to a network stay out of reach.
func offlineTools(t *Tree) []Violation {
	return t.mustNotReachPast("cmd/replicafsck", module+"/libvirt",
		"net/http", "net", module+"/replicad", module+"/replicad/vm", module+"/replicad/api", module+"/replicad/peer", module+"/replicad/dataplane")
}

func (t *Tree) mustNotReach(folder string, forbidden ...string) []Violation {
	return t.mustNotReachPast(folder, "", forbidden...)
}

// mustNotReachPast does not look into the package closed.
func (t *Tree) mustNotReachPast(folder, closed string, forbidden ...string) []Violation {
	var out []Violation
	for p, via := range t.reach(folder, closed) {
		if slices.Contains(forbidden, p) {
			out = append(out, Violation{via, folder + " reaches " + p})
		}
	}
	return sorted(out)
}

// cliMay: the API's client and the plain values that it carries.
func cliMay() []string {
	return []string{"cmd/replicactl", "replicad/api", "replicad/status", "replicad/health", "replicad/wire", "internal/version", "internal/count"}
}

func thinClient(t *Tree) []Violation {
	out := t.mustNotReach("cmd/replicactl", module+"/libvirt", module+"/replicad", module+"/replicad/vm", module+"/replicad/points", module+"/cbt")
	for _, f := range t.files {
		if f.test || !within(f.dir, "cmd/replicactl") {
			continue
		}
		f.imports(func(s *ast.ImportSpec, p string) {
			rel, ours := strings.CutPrefix(p, module+"/")
			if ours && !within(rel, cliMay()...) {
				out = append(out, Violation{t.at(s), "the CLI may import " + strings.Join(cliMay(), ", ") + ", not " + rel})
			}
		})
	}
	return out
}

func noIntegration(t *Tree) []Violation {
	var out []Violation
	for _, f := range t.files {
		if within(f.dir, "integration") {
			continue
		}
		f.imports(func(s *ast.ImportSpec, p string) {
			if within(p, module+"/integration") {
				out = append(out, Violation{t.at(s), "imports " + p})
			}
		})
	}
	return out
}

func sorted(v []Violation) []Violation {
	sort.Slice(v, func(i, j int) bool { return v[i].String() < v[j].String() })
	return v
}
