// Command mutants plants seeded bugs in the product, one at a time, and proves
// that the tests see each of them: a bug no test sees is a test that is missing.
//
// A mutant is a few lines of text in patches/*.txt: lines to find in a source
// file and lines to put in their place. Lines are found by their text, white
// space at both ends aside, and must occur exactly once; when the code has
// moved on the mutant does not apply, which is an error and not a skip. Nothing
// of a mutant is in the product: the changed file reaches the compiler through
// `go build -overlay`.
//
//	go run ./integration/mutants            every mutant, one line each
//	go run ./integration/mutants -run ack   those whose name matches
//	go run ./integration/mutants -check     do all of them apply and compile?
//	go run ./integration/mutants -by sim    what the simulation alone finds
//	go run ./integration/mutants -run missed-range -with 'SEED=2 make histories'
//
// The last one looks with a command in place of tests: whatever it builds has
// the mutant, programs of a lab included, and it must fail. That it passes
// without the mutant is for whoever types it to know.
//
// With -campaign FILE the verdicts of all runs add up; -untried then leaves out
// what is known to be caught by a test other than by its time limit.
//
// The format of patches/*.txt, line by line:
//
//	# name: what is wrong, and the rule it breaks
//	= path/of/file.go
//	- a line to find; several stand below each other in the source
//	+ what stands there instead
//	> ./package ./another RegexpOfTests (all tests when it is left out)
package main
