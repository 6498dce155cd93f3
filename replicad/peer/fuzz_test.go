package peer

import (
	"bytes"
	"encoding/json"
	"net/url"
	"strings"
	"testing"
	"time"

	"kvmreplica/internal/boundtest"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/wire"
)

// FuzzParseRoute: whatever is accepted is one of ours, valid, and written again
// as exactly the same request.
func FuzzParseRoute(f *testing.F) {
	f.Add("POST", "/v1/hello", "")
	f.Add("PUT", "/v1/epoch", epochQuery(key(), 3))
	f.Add("PUT", "/v1/seed", seedQuery(wire.SeedRequest{VM: vmA, Disk: "vda", Generation: key().Generation, Offset: 9}))
	f.Add("PUT", "/v1/epoch", epochQuery(key(), 3)+"&epoch=1")
	f.Add("PUT", "/v1/seed", "vm=%zz&;")
	f.Fuzz(func(t *testing.T, method, path, query string) {
		defer boundtest.Input(t)()
		rt, err := parseRoute(method, path, query)
		if err != nil {
			if k := kindOf(err); k != wire.KindInvalid && k != wire.KindNotFound {
				t.Fatalf("refused with %v", err)
			}
			if !wire.ValidText(err.Error(), wire.MaxText) {
				t.Fatalf("refusal is not printable: %q", err)
			}
			return
		}
		if path != pathPrefix+string(rt.call) || method != rt.call.method() {
			t.Fatalf("%s %s became %s", method, path, rt.call)
		}
		back := ""
		switch rt.call {
		case callSeed:
			back = seedQuery(rt.seed)
		case callEpoch:
			back = epochQuery(rt.key, rt.from)
		}
		given, err := url.ParseQuery(query)
		if err != nil || given.Encode() != back {
			t.Fatalf("%q was read as %q", query, back)
		}
	})
}

// FuzzRequests: every request type survives any JSON, and what Validate lets
// through is bounded.
func FuzzRequests(f *testing.F) {
	seed := func(v any) {
		b, _ := json.Marshal(v)
		f.Add(b)
	}
	seed(offer())
	seed(key())
	seed(wire.HandshakeRequest{VM: vmA, Disks: offer().Disks})
	seed(wire.DigestRequest{VM: vmA, Disk: "vda", Ranges: []wire.Range{{Off: 1, Len: 2}}})
	seed(wire.HandshakeReply{Role: "replica", Seeding: map[wire.DiskName]int64{"vda": 1}})
	seed(Record{Host: "11111111-0000-4000-8000-000000000001", Name: "x", Allow: all()})
	seed(pairRequest{Name: "x", Nonce: make([]byte, 16), Proof: make([]byte, 32)})
	f.Fuzz(func(t *testing.T, data []byte) {
		defer boundtest.Input(t)()
		for _, v := range []validator{
			&wire.HelloRequest{}, &wire.CheckRequest{}, &wire.Offer{}, &wire.Withdraw{}, &wire.HandshakeRequest{},
			&wire.HandshakeReply{}, &wire.SeedRequest{}, &wire.EpochKey{}, &wire.Beat{}, &wire.DigestRequest{},
			&wire.FailoverRequest{}, &statusRequest{}, &Record{}, &pairRequest{},
		} {
			if decodeStrict(bytes.NewReader(data), v) != nil || v.Validate() != nil {
				continue
			}
			switch q := v.(type) {
			case *wire.Offer:
				total := int64(0)
				for _, d := range q.Disks {
					if total += d.Size; total <= 0 || !d.Name.Valid() {
						t.Fatalf("accepted %+v", q)
					}
				}
			case *wire.DigestRequest:
				for _, r := range q.Ranges {
					if r.Off+r.Len <= r.Off {
						t.Fatalf("accepted %+v", r)
					}
				}
			case *Record:
				if strings.ContainsAny(string(q.Host), "/.\x00") {
					t.Fatalf("accepted %q", q.Host)
				}
			}
		}
	})
}

// FuzzRemoteError: a hostile answer never becomes unprintable text or an
// unknown kind.
func FuzzRemoteError(f *testing.F) {
	f.Add([]byte(`{"Kind":3,"Text":"no","Hint":"x"}`))
	f.Add([]byte(`{"Kind":-1,"Text":"\u001b[2J"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		defer boundtest.Input(t)()
		err := remoteError(bytes.NewReader(data), 500)
		if k := kindOf(err); k < wire.KindInternal || k > wire.KindSuspect {
			t.Fatalf("kind %d", k)
		}
		if !wire.ValidText(err.Error(), 2*wire.MaxText+8) {
			t.Fatalf("%q", err)
		}
	})
}

// FuzzCode: nothing but the sixteen digits of a code makes a key.
func FuzzCode(f *testing.F) {
	f.Add("0000-0000-0000-0000")
	f.Fuzz(func(t *testing.T, s string) {
		defer boundtest.Input(t)()
		if _, err := codeKey(s); err == nil && len(s) < codeLength {
			t.Fatalf("%q made a key", s)
		}
	})
}

// FuzzIdentity: nothing in a certificate file brings us down.
func FuzzIdentity(f *testing.F) {
	dir := fsxtest.NewMem()
	now := time.Unix(1_700_000_000, 0)
	if _, err := OpenIdentity(dir, "host", now); err != nil {
		f.Fatal(err)
	}
	for _, name := range dir.Files() {
		b, err := dir.Content(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, b, b)
	}
	f.Fuzz(func(t *testing.T, cert, key, bundle []byte) {
		defer boundtest.Input(t)()
		i, err := LoadIdentity(cert, key, bundle, "x", now)
		if err == nil && i.Host() == "" {
			t.Fatal("an identity without a host")
		}
		var p Pin
		if p.UnmarshalText(cert) == nil {
			if again, err := p.MarshalText(); err != nil || !bytes.EqualFold(bytes.TrimSpace(cert), again) {
				t.Fatalf("%q is read as %q", cert, again)
			}
		}
	})
}
