package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math"
	"strings"
	"time"

	"kvmreplica/integration/campaign"
)

// verdict is what became of one mutant, as the campaign's file keeps it.
type verdict struct {
	Mutant  string  `json:"mutant"`
	Change  string  `json:"change"`          // digest of what the mutant changes
	By      string  `json:"by,omitempty"`    // package and test that fail; empty: none does
	Hangs   bool    `json:"hangs,omitempty"` // only the time limit ended that test
	Seconds float64 `json:"seconds"`
}

// good says that a test sees the mutant by itself.
func (v verdict) good() bool { return v.By != "" && !v.Hangs }

// digest tells a mutant from an earlier one of its name.
func (m *Mutant) digest() string {
	h := sha256.New()
	for _, k := range m.Hunks {
		_, _ = fmt.Fprintf(h, "%q%q%q", k.File, k.Old, k.New) // a hash takes everything
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

// ledger keeps the verdicts of all runs.
type ledger struct {
	file *campaign.File[verdict]
}

func openLedger(path string) (*ledger, error) {
	f, err := campaign.Open[verdict](path)
	return &ledger{f}, err
}

// add keeps a verdict; found is empty for a mutant that survives.
func (l *ledger) add(m *Mutant, found string, took time.Duration) error {
	return l.file.Add(verdict{
		Mutant: m.Name, Change: m.digest(), By: found, Hangs: strings.HasSuffix(found, hangs),
		Seconds: math.Round(took.Seconds()*10) / 10,
	})
}

// last returns the latest verdict on a mutant as it is now.
func (l *ledger) last(m *Mutant) (v verdict, ok bool) {
	for _, e := range l.file.Entries {
		if e.Mutant == m.Name && e.Change == m.digest() {
			v, ok = e, true
		}
	}
	return v, ok
}

// untried are the mutants that no test is known to see by itself.
func (l *ledger) untried(all []Mutant) (left []Mutant) {
	for _, m := range all {
		if v, ok := l.last(&m); !ok || !v.good() {
			left = append(left, m)
		}
	}
	return left
}

// totals says where the campaign stands.
func (l *ledger) totals(all []Mutant) string {
	var tried, caught, hang int
	for _, m := range all {
		v, ok := l.last(&m)
		switch {
		case !ok:
			continue
		case v.good():
			caught++
		case v.Hangs:
			hang++
		}
		tried++
	}
	return fmt.Sprintf("campaign: %d of %d mutants tried, %d caught, %d at a time limit only, %d survive", tried, len(all), caught, hang, tried-caught-hang)
}
