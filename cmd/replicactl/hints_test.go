package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A hint that names a command which does not exist is worse than none: every
// "replicactl NOUN VERB" in the product's sources is a command.
func TestEveryCommandThatAHintNamesExists(t *testing.T) {
	t.Parallel()
	said := regexp.MustCompile(`replicactl ((?:vm|peer|failover|host|point|group|config|checkpoint) [a-z][a-z-]*|[a-z][a-z-]*)`)
	n := 0
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range said.FindAllStringSubmatch(string(b), -1) {
			words := strings.Fields(m[1])
			if len(words) == 1 && (words[0] == "vm" || words[0] == "peer" || words[0] == "failover" || !strings.Contains(string(b), "\"replicactl "+words[0])) {
				continue // prose
			}
			n++
			c, rest, err := newRoot(&app{}).Find(words)
			if err != nil || len(rest) > 0 {
				t.Errorf("%s names %q, which is no command (%s)", path, m[0], c.CommandPath())
			}
		}
		return nil
	})
	if err != nil || n < 50 {
		t.Fatalf("%d hints were found: %v", n, err)
	}
}
