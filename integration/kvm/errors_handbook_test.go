package kvm_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The handbook's table has exactly the errors that are played, with their exit
// status and what they must say.
func TestEveryErrorIsInTheHandbook(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../../docs/operations/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\| `(.*)$").FindAllStringSubmatch(string(doc), -1) {
		rows[m[1]] = m[0]
	}
	names := regexp.MustCompile(`\b(kept|free|variant|nosuch|nobody)(\b|\.raw)`)
	hosts := regexp.MustCompile(`\bkvm-[ab]\b`)
	addresses := regexp.MustCompile(`\b10\.77\.0\.[12]\b`)
	for _, c := range slices.Concat(enableErrors(), operateErrors(), pointErrors(), setErrors()) {
		row, ok := rows[c.id]
		if !ok {
			t.Errorf("docs/operations/errors.md has no row for %q", c.id)
			continue
		}
		delete(rows, c.id)
		want := append([]string{"`" + strings.Join(c.args[:min(2, len(c.args))], " ") + "`", fmt.Sprintf("| %d |", c.code)}, c.words...)
		for _, w := range want {
			w = addresses.ReplaceAllString(hosts.ReplaceAllString(names.ReplaceAllString(w, "NAME$2"), "PEER"), "ADDRESS")
			if !strings.Contains(row, w) {
				t.Errorf("the row of %q does not say %q: %s", c.id, w, row)
			}
		}
	}
	for id := range rows {
		t.Errorf("docs/operations/errors.md has a row %q that nothing plays", id)
	}
}
