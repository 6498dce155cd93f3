package peer

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// call names one method of wire.Service on the wire.
type call string

// The calls. Their paths are pathPrefix followed by the name.
const (
	callHello     call = "hello"
	callCheck     call = "check"
	callOffer     call = "offer"
	callWithdraw  call = "withdraw"
	callHandshake call = "handshake"
	callSeed      call = "seed"
	callProgress  call = "progress"
	callEpoch     call = "epoch"
	callBeat      call = "beat"
	callDigests   call = "digests"
	callStatus    call = "status"
	callPoints    call = "points"
	callFailover  call = "failover"
)

const (
	pathPrefix = "/v1/"
	pairPath   = "/pair/1"
	jsonType   = "application/json"
	bulkType   = "application/octet-stream"
)

// bulk reports whether the call streams a body.
func (c call) bulk() bool { return c == callSeed || c == callEpoch }

func (c call) method() string {
	if c.bulk() {
		return http.MethodPut
	}
	return http.MethodPost
}

func knownCalls() []call {
	return []call{
		callHello, callCheck, callOffer, callWithdraw, callHandshake, callSeed,
		callProgress, callEpoch, callBeat, callDigests, callStatus, callPoints, callFailover,
	}
}

// route is a request line, taken apart and checked.
type route struct {
	call call
	seed wire.SeedRequest // callSeed
	key  wire.EpochKey    // callEpoch
	from uint32           // callEpoch
}

// parseRoute reads a request line. Everything that is not exactly one of our
// routes is refused: other methods, unknown or repeated parameters, parameters
// on control calls, numbers in any but their shortest decimal form.
func parseRoute(method, path, rawQuery string) (route, error) {
	name, ok := strings.CutPrefix(path, pathPrefix)
	rt := route{call: call(name)}
	known := false
	for _, c := range knownCalls() {
		known = known || c == rt.call
	}
	if !ok || !known {
		return route{}, &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("no such call %.64q", path)}
	}
	if method != rt.call.method() {
		return route{}, badRoute("%s needs %s", rt.call, rt.call.method())
	}
	if !rt.call.bulk() {
		if rawQuery != "" {
			return route{}, badRoute("%s takes no parameters", rt.call)
		}
		return rt, nil
	}
	q := params{}
	if err := q.parse(rawQuery); err != nil {
		return route{}, err
	}
	var err error
	if rt.call == callSeed {
		rt.seed = wire.SeedRequest{VM: wire.VMID(q.take("vm")), Disk: wire.DiskName(q.take("disk"))}
		rt.seed.Generation = q.generation("generation")
		rt.seed.Offset = int64(q.number("offset", 63))
		err = rt.seed.Validate()
	} else {
		rt.key = wire.EpochKey{VM: wire.VMID(q.take("vm"))}
		rt.key.Generation = q.generation("generation")
		rt.key.Epoch, rt.key.Nonce = q.number("epoch", 64), q.number("nonce", 64)
		rt.from = uint32(q.number("from", 32))
		err = rt.key.Validate()
	}
	if qerr := q.done(); qerr != nil {
		return route{}, qerr
	}
	return rt, err
}

func badRoute(format string, args ...any) error {
	return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf(format, args...)}
}

// params is a query string in which every name occurs once and is used once.
type params struct {
	values map[string]string
	err    error
}

const maxQuery = 1024

func (q *params) parse(raw string) error {
	if len(raw) > maxQuery {
		return badRoute("parameters of %d bytes", len(raw))
	}
	vals, err := url.ParseQuery(raw)
	if err != nil {
		return badRoute("parameters are not a query string")
	}
	q.values = make(map[string]string, len(vals))
	for k, v := range vals {
		if len(v) != 1 {
			return badRoute("parameter %.32q is given %d times", k, len(v))
		}
		q.values[k] = v[0]
	}
	return nil
}

func (q *params) take(name string) string {
	v, ok := q.values[name]
	if !ok && q.err == nil {
		q.err = badRoute("parameter %s is missing", name)
	}
	delete(q.values, name)
	return v
}

func (q *params) number(name string, bits int) uint64 {
	s := q.take(name)
	n, err := strconv.ParseUint(s, 10, bits)
	if (err != nil || strconv.FormatUint(n, 10) != s) && q.err == nil {
		q.err = badRoute("parameter %s is not a number: %.32q", name, s)
	}
	return n
}

func (q *params) generation(name string) (g delta.Generation) {
	s := q.take(name)
	if err := g.UnmarshalText([]byte(s)); (err != nil || g.String() != s) && q.err == nil {
		q.err = badRoute("parameter %s is not a generation: %.48q", name, s)
	}
	return g
}

func (q *params) done() error {
	if q.err != nil {
		return q.err
	}
	for k := range q.values {
		return badRoute("unknown parameter %.32q", k)
	}
	return nil
}

// seedQuery and epochQuery are the inverse of parseRoute.
func seedQuery(r wire.SeedRequest) string {
	return url.Values{
		"vm": {string(r.VM)}, "disk": {string(r.Disk)},
		"generation": {r.Generation.String()}, "offset": {strconv.FormatInt(r.Offset, 10)},
	}.Encode()
}

func epochQuery(k wire.EpochKey, from uint32) string {
	return url.Values{
		"vm": {string(k.VM)}, "generation": {k.Generation.String()},
		"epoch": {strconv.FormatUint(k.Epoch, 10)}, "nonce": {strconv.FormatUint(k.Nonce, 10)},
		"from": {strconv.FormatUint(uint64(from), 10)},
	}.Encode()
}

// httpStatus maps a kind to the status that fits; the kind in the body counts.
func httpStatus(k wire.Kind) int {
	switch k {
	case wire.KindNotFound:
		return http.StatusNotFound
	case wire.KindConflict, wire.KindDiverged, wire.KindPosMismatch:
		return http.StatusConflict
	case wire.KindRefused:
		return http.StatusForbidden
	case wire.KindUnavailable:
		return http.StatusServiceUnavailable
	case wire.KindCorrupt, wire.KindSuspect:
		return http.StatusUnprocessableEntity
	case wire.KindNoSpace:
		return http.StatusInsufficientStorage
	case wire.KindInvalid, wire.KindVersion:
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}
