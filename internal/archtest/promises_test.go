package archtest

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A command of a page: what it is, the pattern of -run, and a bare test's name.
var (
	goTest   = regexp.MustCompile("`((?:[A-Z_]+=\\S+ )*go test [^`]*)`")
	runFlag  = regexp.MustCompile(`-run (?:'([^']*)'|(\S+))`)
	pattern  = regexp.MustCompile(`(?:^| )\./([a-z/]*(?:\.\.\.)?)`)
	bareTest = regexp.MustCompile("`(?:Test|Fuzz)(\\w+)(…?)`")
	makeGoal = regexp.MustCompile("`make ([a-z]+)")
)

// faults are the commands of a page that would run nothing: each alternative of
// -run must match a test of the packages that stand behind it, and every target
// of make must exist.
func faults(page, makefile string, have map[string]bool) (found []string) {
	matches := func(dirs []string, re *regexp.Regexp) bool {
		for h := range have {
			dir, name, _ := strings.Cut(h, " ")
			if re.MatchString(name) && slices.ContainsFunc(dirs, func(d string) bool {
				tree, all := strings.CutSuffix(d, "...")
				return d == dir || all && strings.HasPrefix(dir+"/", tree)
			}) {
				return true
			}
		}
		return false
	}
	for _, c := range goTest.FindAllStringSubmatch(page, -1) {
		run := runFlag.FindStringSubmatch(c[1])
		if run == nil || run[2] == "xxx" { // no test, for the sake of -bench
			continue
		}
		var dirs []string
		for _, d := range pattern.FindAllStringSubmatch(c[1], -1) {
			dirs = append(dirs, strings.TrimSuffix(d[1], "/"))
		}
		for alt := range strings.SplitSeq(strings.ReplaceAll(run[1]+run[2], `\|`, "|"), "|") {
			if !matches(dirs, regexp.MustCompile(alt)) {
				found = append(found, fmt.Sprintf("%s: no test matches %q", c[1], alt))
			}
		}
	}
	for _, w := range bareTest.FindAllStringSubmatch(page, -1) {
		end := "$"
		if w[2] != "" {
			end = ""
		}
		if !matches([]string{"..."}, regexp.MustCompile("^(Test|Fuzz)"+w[1]+end)) {
			found = append(found, "no test "+w[0])
		}
	}
	for _, m := range makeGoal.FindAllStringSubmatch(page, -1) {
		if !strings.Contains("\n"+makefile, "\n"+m[1]+":") {
			found = append(found, "no target "+m[0])
		}
	}
	return found
}

// A promise whose command runs no test is shown by nothing.
func TestTheCommandsThatShowThePromisesRunTests(t *testing.T) {
	read := func(name string) string {
		b, err := os.ReadFile("../../" + name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	have, makefile := tests(t), read("Makefile")
	for _, p := range []string{"promises", "attacks", "failover", "points", "performance"} {
		page := read("docs/operations/" + p + ".md")
		for _, f := range faults(page, makefile, have) {
			t.Errorf("%s.md: %s", p, f)
		}
		if p == "promises" {
			if n := len(regexp.MustCompile(`(?m)^\| \*\*P\d+\*\*`).FindAllString(page, -1)); n != 11 {
				t.Errorf("%d of 11 promises are listed", n)
			}
		}
	}
}

func TestACommandThatRunsNothingIsFound(t *testing.T) {
	have := map[string]bool{"cbt TestAPowerCut": true, "replicad/vm TestPlannedOne": true}
	const makefile = "help: ## x\nsim: ## y\n"
	for text, want := range map[string]int{
		"`go test -run PowerCut ./cbt` and `make sim`":               0,
		"`go test -run 'Planned\\|PowerCut' ./...`":                  0,
		"`X=1 go test -v -run Planned ./cbt ./replicad/vm`":          0,
		"`go test ./cbt -run xxx -bench A`, `TestAPower…`":           0,
		"`go test -run PowerLoss ./cbt`":                             1,
		"`go test -run 'Planned|Golden' ./...`":                      1,
		"`go test -run Planned ./cbt`":                               1,
		"`TestAPower` and `TestSomething…`, as `make nothing` shows": 3,
	} {
		if got := faults(text, makefile, have); len(got) != want {
			t.Errorf("%s: %q, want %d", text, got, want)
		}
	}
}
