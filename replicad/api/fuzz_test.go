package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"kvmreplica/internal/boundtest"
	"kvmreplica/replicad/wire"
)

// FuzzRequests: what is no request is refused as invalid, whatever it is.
func FuzzRequests(f *testing.F) {
	for _, v := range []any{InviteRequest{}, JoinRequest{}, AllowRequest{}, Action{}} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		defer boundtest.Input(t)()
		for _, v := range []any{&InviteRequest{}, &JoinRequest{}, &AllowRequest{}, &Action{}} {
			var e *wire.Error
			if err := decode(bytes.NewReader(b), v); err != nil && (!errors.As(err, &e) || e.Kind != wire.KindInvalid) {
				t.Fatalf("%T: %v", v, err)
			}
		}
	})
}
