package wire

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"kvmreplica/replicad/delta"
)

const someVM = VMID("11111111-2222-3333-4444-555555555555")

func TestIdsAndNamesHaveOneForm(t *testing.T) {
	for s, want := range map[string]bool{
		string(someVM): true, strings.ToUpper("aaaaaaaa") + string(someVM)[8:]: false, "": false,
		string(someVM) + "0": false, string(someVM)[:35]: false, "../../../../../../../../../../../../": false,
		"11111111x2222-3333-4444-555555555555": false, "{1111111-2222-3333-4444-55555555555}": false,
	} {
		if VMID(s).Valid() != want || HostID(s).Valid() != want {
			t.Errorf("id %q: want %v", s, want)
		}
	}
	for s, want := range map[string]bool{
		"vda": true, "sda1": true, "v": true, "": false, "Vda": false, "1da": false, "vd-a": false, "../a": false,
		"vda\x00": false, "abcdefghijklmnop": true, "abcdefghijklmnopq": false, "vdа": false,
	} {
		if DiskName(s).Valid() != want {
			t.Errorf("disk %q: want %v", s, want)
		}
	}
	for s, want := range map[string]bool{
		"database 1": true, "Größe": true, "": true, "a\nb": false, "a\x1b[0m": false, "a\u202eb": false,
		"a\u200bb": false, "\xff": false, "a\tb": false, strings.Repeat("a", 11): false,
	} {
		if ValidText(s, 10) != want {
			t.Errorf("text %q: want %v", s, want)
		}
	}
}

func TestRequestsJustInsideAndJustOutsideTheirBounds(t *testing.T) {
	g := delta.Generation{1}
	disk := Disk{Name: "vda", Size: 512, Format: "raw"}
	many := func(n int) (d []Disk) {
		for i := range n {
			d = append(d, Disk{Name: DiskName("d" + string(rune('a'+i/26)) + string(rune('a'+i%26))), Size: 512, Format: "raw"})
		}
		return d
	}
	sizes := func(n int, size int64) HandshakeReply {
		r := HandshakeReply{Sizes: map[DiskName]int64{}}
		for _, d := range many(n) {
			r.Sizes[d.Name] = size
		}
		return r
	}
	good := Offer{VM: someVM, Name: "x", Disks: []Disk{disk}, Generation: g}
	alter := func(f func(*Offer)) Offer { o := good; o.Disks = []Disk{disk}; f(&o); return o }
	for name, c := range map[string]struct {
		v  interface{ Validate() error }
		ok bool
	}{
		"offer":               {good, true},
		"most disks":          {alter(func(o *Offer) { o.Disks = many(MaxDisks) }), true},
		"too many disks":      {alter(func(o *Offer) { o.Disks = many(MaxDisks + 1) }), false},
		"largest disk":        {alter(func(o *Offer) { o.Disks[0].Size = MaxDiskSize }), true},
		"too large a disk":    {alter(func(o *Offer) { o.Disks[0].Size = MaxDiskSize + 512 }), false},
		"empty disk":          {alter(func(o *Offer) { o.Disks[0].Size = 0 }), false},
		"negative disk":       {alter(func(o *Offer) { o.Disks[0].Size = -512 }), false},
		"no disks":            {alter(func(o *Offer) { o.Disks = nil }), false},
		"no name":             {alter(func(o *Offer) { o.Name = "" }), false},
		"largest description": {alter(func(o *Offer) { o.Spec = make(json.RawMessage, MaxSpec) }), true},
		"large description":   {alter(func(o *Offer) { o.Spec = make(json.RawMessage, MaxSpec+1) }), false},
		"a week":              {alter(func(o *Offer) { o.Interval = MaxInterval }), true},
		"more than a week":    {alter(func(o *Offer) { o.Interval = MaxInterval + 1 }), false},
		"most points":         {alter(func(o *Offer) { o.Points = MaxPoints }), true},
		"too many points":     {alter(func(o *Offer) { o.Points = MaxPoints + 1 }), false},
		"no generation":       {alter(func(o *Offer) { o.Generation = delta.Generation{} }), false},
		"handshake":           {HandshakeRequest{VM: someVM, Ancestors: make([]delta.Pos, MaxAncestors), Known: make([]delta.Pos, MaxKnown)}, true},
		"endless ancestry":    {HandshakeRequest{VM: someVM, Ancestors: make([]delta.Pos, MaxAncestors+1)}, false},
		"much known":          {HandshakeRequest{VM: someVM, Known: make([]delta.Pos, MaxKnown+1)}, false},
		"seed":                {SeedRequest{VM: someVM, Disk: "vda", Generation: g, Offset: MaxDiskSize}, true},
		"seed behind the end": {SeedRequest{VM: someVM, Disk: "vda", Generation: g, Offset: MaxDiskSize + 1}, false},
		"epoch 0":             {EpochKey{VM: someVM, Generation: g}, false},
		"epoch 1":             {EpochKey{VM: someVM, Generation: g, Epoch: 1}, true},
		"digests":             {DigestRequest{VM: someVM, Disk: "vda", Pos: delta.Pos{Epoch: 1}, Ranges: []Range{{0, MaxRangeLen}}}, true},
		"digests, wide":       {DigestRequest{VM: someVM, Disk: "vda", Pos: delta.Pos{Epoch: 1}, Ranges: []Range{{0, MaxRangeLen + 1}}}, false},
		"digests, many":       {DigestRequest{VM: someVM, Disk: "vda", Pos: delta.Pos{Epoch: 1}, Ranges: make([]Range, MaxDigestRanges+1)}, false},
		"digests, overflow":   {DigestRequest{VM: someVM, Disk: "vda", Pos: delta.Pos{Epoch: 1}, Ranges: []Range{{1<<63 - 1, 1}}}, false},
		"digests of a seed":   {DigestRequest{VM: someVM, Disk: "vda", Ranges: []Range{{0, 1}}}, true},
		"hello backwards":     {HelloRequest{Min: 2, Max: 1}, false},
		"reply, cursor":       {HandshakeReply{Seeding: map[DiskName]int64{"vda": -1}}, false},
		"reply, disk":         {HandshakeReply{Disks: []DiskName{"../x"}}, false},
		"reply, sizes":        {sizes(MaxDisks, MaxDiskSize), true},
		"reply, many sizes":   {sizes(MaxDisks+1, 512), false},
		"reply, large size":   {sizes(1, MaxDiskSize+512), false},
		"reply, below zero":   {sizes(1, -512), false},
		"reply, odd size":     {sizes(1, 511), false},
		"reply, size of x":    {HandshakeReply{Sizes: map[DiskName]int64{"../x": 512}}, false},
		"a joining disk":      {alter(func(o *Offer) { o.Disks[0].Joining = true }), true},
		"beat, a long time":   {Beat{VM: someVM, Interval: 8 * 24 * time.Hour}, false},
		"tests":               {Tests{Copies: 1, LastDrill: &Drill{Failure: "it stood still"}}, true},
		"tests, a negative":   {Tests{Copies: -1}, false},
		"tests, escapes":      {Tests{Last: &TestEnd{Reason: "\x1b[2J"}}, false},
		"tests, cleaned":      {Tests{Last: &TestEnd{Reason: "\x1b[2J"}, Proven: &Drill{Failure: strings.Repeat("a", MaxText+1)}}.Clean(), true},
		"drill, long":         {Tests{Proven: &Drill{Failure: strings.Repeat("a", MaxText+1)}}, false},
		"failover, reason":    {FailoverRequest{VM: someVM, Reason: strings.Repeat("a", MaxText+1)}, false},
	} {
		if err := c.v.Validate(); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
