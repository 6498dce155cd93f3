package main

import (
	"path/filepath"
	"testing"
	"time"
)

func TestTheCampaignCountsTheLastVerdictOnAMutantAsItIsNow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mutants.jsonl")
	m := func(name, change string) Mutant {
		return Mutant{Name: name, Hunks: []Hunk{{File: "a.go", Old: []string{"x"}, New: []string{change}}}}
	}
	all := []Mutant{m("caught", "1"), m("changed", "1"), m("hung", "1"), m("mended", "1"), m("alive", "1"), m("new", "1")}
	l, err := openLedger(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []struct {
		m     Mutant
		found string
	}{
		{all[0], "./a TestA"},
		{m("changed", "0"), "./a TestA"},
		{all[2], "./a TestA" + hangs},
		{all[3], ""},
		{all[3], "./a TestB"},
		{all[4], ""},
	} {
		if err := l.add(&e.m, e.found, 1234*time.Millisecond); err != nil {
			t.Fatal(err)
		}
	}
	again, err := openLedger(file)
	if err != nil {
		t.Fatal(err)
	}
	names := ""
	for _, u := range again.untried(all) {
		names += u.Name + " "
	}
	if names != "changed hung alive new " {
		t.Errorf("untried: %s", names)
	}
	if got := again.totals(all); got != "campaign: 4 of 6 mutants tried, 2 caught, 1 at a time limit only, 1 survive" {
		t.Error(got)
	}
}
