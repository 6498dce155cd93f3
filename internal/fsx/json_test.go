package fsx_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

type note struct {
	Version int             `json:"version"`
	Names   []string        `json:"names,omitempty"`
	Forced  bool            `json:"forced"`
	Raw     json.RawMessage `json:"raw,omitempty"`
}

func TestNoDamageOfADocumentIsBelieved(t *testing.T) {
	dir := fsxtest.NewMem()
	want := note{Version: 1, Names: []string{"a", "b\n}", `,"sum": "00000000"`}, Forced: true, Raw: json.RawMessage(`{"x":[1,2]}`)}
	if err := fsx.WriteJSON(dir, "n", want); err != nil {
		t.Fatal(err)
	}
	var back note
	if err := fsx.ReadJSON(dir, "n", 1<<10, &back); err != nil || back.Names[1] != want.Names[1] || !back.Forced {
		t.Fatalf("got %+v, %v", back, err)
	}
	whole, err := dir.Content("n")
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for what, damaged := range fsxtest.Damages(whole) {
		var got note
		doc, err := fsx.CheckJSON(damaged)
		if err == nil {
			err = json.Unmarshal(doc, &got)
		}
		if err != nil {
			refused++
			continue
		}
		if d := cmp.Diff(back, got); d != "" {
			t.Errorf("%s is believed: %s\n%s", what, d, damaged)
		}
	}
	t.Logf("%d bytes, %d damages refused", len(whole), refused)
}

func TestADocumentEditedByHandIsReadWithoutItsSum(t *testing.T) {
	b, err := fsx.EncodeJSON(note{Version: 1})
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(string(b), "1", "2", 1)
	if _, err := fsx.CheckJSON([]byte(edited)); !errors.Is(err, fsx.ErrSum) {
		t.Fatalf("an edited document with its old sum: %v", err)
	}
	body, _, _ := strings.Cut(edited, ",\n  \"sum\"")
	doc, err := fsx.CheckJSON([]byte(body + "\n}\n"))
	var got note
	if err != nil || json.Unmarshal(doc, &got) != nil || got.Version != 2 {
		t.Fatalf("%+v, %v", got, err)
	}
	if _, err := fsx.EncodeJSON([]int{1}); err == nil {
		t.Error("a list was encoded")
	}
}
