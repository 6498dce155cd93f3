package config

import (
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Every field has a key that the file knows; one that is added and forgotten
// here would change without a word.
func TestEveryKeyCanBeNamedWhenItChanges(t *testing.T) {
	t.Parallel()
	typ := reflect.TypeFor[Config]()
	tags := map[string]bool{}
	for i := range reflect.TypeFor[file]().NumField() {
		tags[reflect.TypeFor[file]().Field(i).Tag.Get("toml")] = true
	}
	for i := range typ.NumField() {
		c, ok := keys[typ.Field(i).Name]
		if top, _, _ := strings.Cut(c.Key, "."); !ok || !tags[top] {
			t.Errorf("field %s has the key %q, which the file does not have", typ.Field(i).Name, c.Key)
		}
	}
	if len(keys) != typ.NumField() {
		t.Errorf("%d keys for %d fields", len(keys), typ.NumField())
	}
}

func TestChangesAreNamedAndOnlyLiveOnesAreTaken(t *testing.T) {
	t.Parallel()
	old, next := Default(), Default()
	next.LogLevel, next.Listen, next.Limits.MaxVMs = slog.LevelDebug, ":1", 3
	next.Bandwidth, next.Networks = []Window{{Rate: 5}}, []NetworkMap{}
	want := []Change{{Key: "listen"}, {"log_level", true}, {Key: "limits"}, {"bandwidth", true}}
	if diff := cmp.Diff(want, old.Changes(next)); diff != "" {
		t.Error(diff)
	}
	got := old.WithLive(next)
	if got.Listen != old.Listen || got.Limits != old.Limits || got.LogLevel != slog.LevelDebug || len(got.Bandwidth) != 1 {
		t.Errorf("taken over: %+v", got)
	}
	if left := got.Changes(next); !cmp.Equal(left, []Change{{Key: "listen"}, {Key: "limits"}}) {
		t.Errorf("left: %v", left)
	}
}
