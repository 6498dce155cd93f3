package health

import "sort"

// TestFacts are what test copies and drills add to a VM's health.
type TestFacts struct {
	Name string
	// Trouble of test copies, each with the copy's name.
	Trouble []string
	// DrillFailed is why the last drill failed, Report its file.
	DrillFailed, Report string
}

// WithTests adds their conditions to a VM's, worst first, and returns the worst
// severity of all.
func WithTests(cs []Condition, f TestFacts) ([]Condition, Severity) {
	for _, t := range f.Trouble {
		cs = append(cs, Condition{
			Code: "test-trouble", Severity: Warning, Text: "the test copy " + t,
			Remedy: "replicactl failover test-stop " + f.Name + "; replication does not depend on it",
		})
	}
	if f.DrillFailed != "" {
		cs = append(cs, Condition{
			Code: "drill-failed", Severity: Warning, Text: "the last failover drill failed: " + f.DrillFailed,
			Remedy: "read " + f.Report + ", then: replicactl drill " + f.Name,
		})
	}
	sort.SliceStable(cs, func(i, j int) bool { return cs[i].Severity.rank() > cs[j].Severity.rank() })
	worst := Normal
	if len(cs) > 0 {
		worst = cs[0].Severity
	}
	return cs, worst
}
