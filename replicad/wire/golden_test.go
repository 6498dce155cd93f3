package wire

import (
	"bytes"
	"encoding/json"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/replicad/delta"
)

// everything is one value of each type that travels, with every field set.
func everything() map[string]any {
	g := delta.Generation{1, 2, 3}
	pos := delta.Pos{Generation: g, Epoch: 1<<64 - 1, Digest: delta.Digest{4, 5}}
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	disk := Disk{Name: "vda", Size: 1 << 40, Format: "raw", Joining: true}
	check := Check{Name: "space", Result: Failed, Detail: "d", Remedy: "r"}
	key := EpochKey{VM: someVM, Generation: g, Epoch: 7, Nonce: 1<<64 - 1}
	step := Step{Name: "seal", Result: OK, Detail: "d", Took: time.Second}
	return map[string]any{
		"CheckReply":   CheckReply{Checks: []Check{check}},
		"CheckRequest": CheckRequest{VM: someVM, For: "planned", Spec: json.RawMessage(`{"x":1}`), Need: 9, KeepPoints: true},
		"Beat":         Beat{VM: someVM, Pos: pos, Pending: 5, Interval: time.Second},
		"DigestReply":  DigestReply{Digests: [][16]byte{{1}}},
		"DigestRequest": DigestRequest{
			VM: someVM, Pos: pos, Disk: "vda", Key: [32]byte{9}, Ranges: []Range{{Off: 1, Len: 2}},
		},
		"EpochKey":        key,
		"Error":           Error{Kind: KindPosMismatch, Text: "t", Hint: "h", Have: &pos},
		"FailoverReply":   FailoverReply{State: "promoted", Generation: g, Parent: pos, Detail: "d", Steps: []Step{step}},
		"FailoverRequest": FailoverRequest{VM: someVM, Step: "promote", Request: "q", Reason: "r", At: pos, Start: true, Reverse: true, Force: true, KeepPoints: true},
		"HandshakeReply": HandshakeReply{
			Role: "replica", Generation: g, Committed: pos, Ancestors: []delta.Pos{pos}, Sealed: true, Diverged: true, Running: true,
			Seeding: map[DiskName]int64{"vda": 3}, Partial: &key, VerifyAll: "v", VM: someVM, Disks: []DiskName{"vda"},
			Sizes: map[DiskName]int64{"vda": 1 << 40}, Base: pos, Tracked: true, Discard: g,
		},
		"HandshakeRequest": HandshakeRequest{
			VM: someVM, Generation: g, Ancestors: []delta.Pos{pos}, Base: pos, Acked: pos, Highest: 8, Disks: []Disk{disk},
			Running: true, Known: []delta.Pos{pos}, Before: pos, Between: true, Diverged: true,
		},
		"HelloReply":   HelloReply{Protocol: 1, Host: "h", Name: "n", Version: "v", Now: at, Receiving: true},
		"HelloRequest": HelloRequest{Min: 1, Max: 2, Host: "h", Name: "n", Version: "v", Now: at},
		"Offer": Offer{
			VM: someVM, Name: "n", Spec: json.RawMessage(`{"x":1}`), Disks: []Disk{disk}, Interval: time.Minute,
			Generation: g, Points: 4, Retention: "24", AppEvery: time.Hour, Request: "q",
		},
		"OfferReply": OfferReply{State: "created", Dropped: []string{"x"}},
		"PeerVM": PeerVM{
			VM: someVM, Name: "n", Role: "replica", State: "s", Generation: g, Committed: pos, Applied: pos,
			Running: true, Defined: true, Diverged: true, Interrupted: "planned",
			Tests: &Tests{
				Copies:    1,
				Last:      &TestEnd{Host: "h", Name: "n", Purpose: "test", Point: "p", Cut: at, Started: at, Ended: at, Ran: true, Reason: "r"},
				LastDrill: &Drill{Host: "h", VM: "n", Started: at, Point: "p", Cut: at, Proof: "agent", Failure: "f", Report: "/r"},
				Proven:    &Drill{Host: "h", VM: "n", Started: at, OK: true, Point: "p", Cut: at, Proof: "agent", RTO: time.Second, Report: "/r"},
			},
		},
		"PointsReply": PointsReply{
			Host: "h", Retention: "24", Quota: 1, Used: 2, Free: 3, Reserve: 4, PerDay: 5, Full: time.Hour, GivenUp: 6, Orphan: "o",
			Points: []Point{{Ordinal: 1, Cut: at, At: at, Pos: pos, App: true, Latest: true, Pinned: true, Mounted: 1, Bytes: 7, Damage: "d"}},
		},
		"SeedReply": SeedReply{Cursor: 1 << 40},
		"Withdraw":  Withdraw{VM: someVM, Delete: true, Request: "q"},
	}
}

// TestTheNamesOnTheWireDoNotChange: protocol 1 is what this file says. Set
// UPDATE=1 to add fields; a changed or missing name needs a new protocol.
func TestTheNamesOnTheWireDoNotChange(t *testing.T) {
	const file = "testdata/protocol1.json"
	got, err := json.MarshalIndent(everything(), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if os.Getenv("UPDATE") != "" {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, got) {
		t.Error(cmp.Diff(string(want), string(got)))
	}
}
