package main

import (
	"bufio"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

//go:embed patches/*.txt
var patches embed.FS

// Mutant is one seeded bug.
type Mutant struct {
	Name, What string
	Hunks      []Hunk
	// Packages are tested in this order; Tests narrows them, empty = all.
	Packages []string
	Tests    string
}

// Hunk replaces lines of one file.
type Hunk struct {
	File     string
	Old, New []string
}

// All reads every mutant, in the order of the files and within them.
func All() ([]Mutant, error) {
	names, err := patches.ReadDir("patches")
	if err != nil {
		return nil, err
	}
	var all []Mutant
	for _, n := range names {
		b, err := patches.ReadFile("patches/" + n.Name())
		if err != nil {
			return nil, err
		}
		ms, err := parse(string(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", n.Name(), err)
		}
		all = append(all, ms...)
	}
	seen := map[string]bool{}
	for _, m := range all {
		if seen[m.Name] || len(m.Hunks) == 0 || len(m.Packages) == 0 {
			return nil, fmt.Errorf("mutant %s: named twice, changes nothing, or says no package", m.Name)
		}
		seen[m.Name] = true
	}
	return all, nil
}

func parse(text string) (all []Mutant, err error) {
	s := bufio.NewScanner(strings.NewReader(text))
	file := ""
	for s.Scan() {
		line := s.Text()
		if strings.TrimSpace(line) == "" {
			continue
		}
		mark, rest, ok := strings.Cut(line, " ")
		if mark == "#" {
			name, what, _ := strings.Cut(rest, ": ")
			all = append(all, Mutant{Name: name, What: what})
			file = ""
			continue
		}
		if !ok || len(all) == 0 {
			return nil, fmt.Errorf("%q is no line of a mutant", line)
		}
		m := &all[len(all)-1]
		switch mark {
		case "=":
			file = rest
		case "-":
			m.hunk(file, true).Old = append(m.hunk(file, false).Old, strings.TrimSpace(rest))
		case "+":
			h := m.hunk(file, false)
			h.New = append(h.New, rest)
		case ">":
			for _, w := range strings.Fields(rest) {
				if strings.HasPrefix(w, "./") {
					m.Packages = append(m.Packages, w)
				} else {
					m.Tests = w
				}
			}
		default:
			return nil, fmt.Errorf("%q is no line of a mutant", line)
		}
	}
	return all, s.Err()
}

// hunk is the one being read; a line to find after lines to put begins the next.
func (m *Mutant) hunk(file string, old bool) *Hunk {
	n := len(m.Hunks)
	if n == 0 || m.Hunks[n-1].File != file || old && len(m.Hunks[n-1].New) > 0 {
		m.Hunks = append(m.Hunks, Hunk{File: file})
		n++
	}
	return &m.Hunks[n-1]
}

// Apply returns the changed content of every file the mutant touches; have
// holds what earlier mutants made of them, and may be nil.
func (m *Mutant) Apply(root string, have map[string]string) (map[string]string, error) {
	out := map[string]string{}
	for _, h := range m.Hunks {
		text, ok := out[h.File]
		if !ok {
			text, ok = have[h.File]
		}
		if !ok {
			b, err := os.ReadFile(filepath.Join(root, h.File))
			if err != nil {
				return nil, fmt.Errorf("mutant %s: %w", m.Name, err)
			}
			text = string(b)
		}
		var err error
		if out[h.File], err = h.apply(text); err != nil {
			return nil, fmt.Errorf("mutant %s: %w", m.Name, err)
		}
	}
	return out, nil
}

func (h *Hunk) apply(text string) (string, error) {
	lines := strings.Split(text, "\n")
	var at []int
	for i := 0; i+len(h.Old) <= len(lines); i++ {
		if slices.EqualFunc(lines[i:i+len(h.Old)], h.Old, func(l, o string) bool { return squeeze(l) == squeeze(o) }) {
			at = append(at, i)
		}
	}
	if len(h.Old) == 0 || len(at) != 1 {
		return "", fmt.Errorf("%s has these lines %d times, not once; bring the mutant up to date:\n\t%s",
			h.File, len(at), strings.Join(h.Old, "\n\t"))
	}
	return strings.Join(slices.Concat(lines[:at[0]], h.New, lines[at[0]+len(h.Old):]), "\n"), nil
}

// squeeze makes a line comparable: gofmt aligns, we do not.
func squeeze(line string) string { return strings.Join(strings.Fields(line), " ") }

func chosen(all []Mutant, pattern string) ([]Mutant, error) {
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(m Mutant) bool { return !re.MatchString(m.Name) }), nil
}
