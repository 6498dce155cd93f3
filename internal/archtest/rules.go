package archtest

// Rule is one thing that must hold all over the module.
type Rule struct {
	// Name is short and stable; the tests refer to it.
	Name string
	// Reason is what a failure tells its reader.
	Reason string
	// Check returns every violation.
	Check func(*Tree) []Violation
}

// Rules returns all of them.
func Rules() []Rule {
	return []Rule{
		{"layers", "a package that knows only what ARCHITECTURE.md lets it know can be tested, moved and replaced alone", layers},
		{"one-place", "a foreign module used in one place can be replaced there", onePlace},
		{"offline-tools", "replicafsck must work with neither daemon nor network; only the libvirtd of its own machine may be there", offlineTools},
		{"thin-client", "the CLI is replaceable and every verb scriptable only if it goes through the daemon's API", thinClient},
		{"nothing-imports-tests", "integration is for whole-system tests; the product must not depend on it", noIntegration},
		{"pure", "the core must replay from a seed: no clock, no randomness, no files, no network", pure},
		{"package-comment", "a reader must learn what a package is for without reading its code", packageComment},
		{"exported-comment", "an exported name is a promise; it must say which", exportedComment},
		{"file-size", "a file has one idea: at most 500 lines", fileSize},
		{"function-size", "a function fits a screen: at most 80 lines", functionSize},
		{"no-sleep-in-tests", "a test that sleeps is slow and flaky; wait for a condition or use synctest", noSleep},
		{"no-init", "what runs before main cannot be tested, ordered or refused", noInit},
		{"no-globals", "a variable of the package is shared by every VM, test and goroutine; put it into a value", noGlobals},
		{"no-print", "a library that prints takes its caller's voice away; return or log", noPrint},
		{"no-global-log", "loggers are passed in, so that every line says which VM it is about", noGlobalLog},
		{"no-embedded-device", "a layer that embeds a device lets a new mutation slip past it, and a block is lost", noEmbeddedDevice},
		{"todo-has-issue", "a TODO without a number is never done", todoHasIssue},
		{"links-resolve", "a broken link is a broken promise", linksResolve},
		{"no-line-references", "line numbers drift; name the identifier", noLineReferences},
		{"package-names", "name a package for what it provides", packageNames},
	}
}

// Check runs all rules and returns the violations by rule name.
func Check(t *Tree) map[string][]Violation {
	out := map[string][]Violation{}
	for _, r := range Rules() {
		if v := r.Check(t); len(v) > 0 {
			out[r.Name] = v
		}
	}
	return out
}
