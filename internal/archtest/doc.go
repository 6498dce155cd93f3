// Package archtest keeps the rules of ARCHITECTURE.md and CONTRIBUTING.md: who
// may import whom, what stays pure, how long things may be, what is documented.
//
// A rule is a value with a reason; its test runs it over the module and over a
// small invented tree that breaks it, so that no rule can rot into one that
// never fails. A rule that is wrong for a case gets an exception beside it,
// with the reason, in the same commit as the case.
//
// The caller loads a tree with Load and runs Rules over it.
package archtest
