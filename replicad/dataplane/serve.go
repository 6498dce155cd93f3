package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/standby"
	"kvmreplica/replicad/wire"
)

// Limits of requests on the control socket.
const (
	maxBody   = 4 << 20
	maxAttach = 4 * (delta.MaxNVRAM + delta.MaxTPM) / 3 // base64
)

// routes is the control API, one line per call. docs/formats/control.md lists
// the same.
func (p *Plane) routes() http.Handler {
	m := http.NewServeMux()
	get := func(path string, f func(ctx context.Context) (any, error)) {
		m.HandleFunc("GET /v1/"+path, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r.Context())
			reply(w, v, err)
		})
	}
	get("status", func(context.Context) (any, error) { return p.Status(), nil })
	get("counters", func(context.Context) (any, error) { return p.counters(), nil })
	m.HandleFunc("GET /v1/epoch/{epoch}/frames", p.serveFrames)
	m.HandleFunc("GET /v1/seed", p.serveSeed)

	handle(m, "create", func(ctx context.Context, r CreateRequest) (any, error) { return nil, p.createTracker(ctx, r) })
	handle(m, "export", func(ctx context.Context, r ExportRequest) (any, error) { return nil, p.export(ctx, r) })
	handle(m, "refuse", func(ctx context.Context, r RefuseRequest) (any, error) { return nil, p.refuse(ctx, r.Reason) })
	handle(m, "freeze", func(ctx context.Context, r FreezeRequest) (any, error) { return p.freeze(ctx, r) })
	handle(m, "ack", func(_ context.Context, r delta.Pos) (any, error) { return nil, p.ack(r) })
	handle(m, "ranges", func(_ context.Context, r RangesRequest) (any, error) { return p.ranges(r) })
	handle(m, "compare", func(ctx context.Context, r CompareRequest) (any, error) { return p.compare(ctx, r) })
	handle(m, "compare/end", func(_ context.Context, r CompareEnd) (any, error) { return p.endCompare(r) })
	handle(m, "clean", func(ctx context.Context, _ struct{}) (any, error) { return p.clean(ctx) })
	handle(m, "mark", func(_ context.Context, r MarkRequest) (any, error) { return nil, p.mark(r) })
	handle(m, "seal", func(ctx context.Context, r SealRequest) (any, error) { return nil, p.seal(ctx, r.Pos) })
	handle(m, "unseal", func(context.Context, struct{}) (any, error) { return nil, p.unseal() })
	handle(m, "lock-qemu", func(_ context.Context, r LockRequest) (any, error) { return nil, p.lockQEMU(r.Disk, true) })
	handle(m, "unlock-qemu", func(_ context.Context, r LockRequest) (any, error) { return nil, p.lockQEMU(r.Disk, false) })
	handle(m, "overlay/commit", func(context.Context, struct{}) (any, error) { return nil, p.commitOverlay() })
	handle(m, "overlay/history", func(context.Context, struct{}) (any, error) { return p.history() })
	handle(m, "overlay/keep", func(ctx context.Context, r KeepRequest) (any, error) { return p.keepPoints(ctx, r) })
	handle(m, "resize", func(_ context.Context, r ResizeRequest) (any, error) { return p.resize(r) })
	handle(m, "sync", func(context.Context, struct{}) (any, error) { return nil, p.sync() })
	handle(m, "upgrade", func(_ context.Context, r UpgradeRequest) (any, error) { return p.upgrade(r) })
	handle(m, "shutdown", func(context.Context, struct{}) (any, error) { p.stop(); return nil, nil })
	m.HandleFunc("POST /v1/epoch/{epoch}/attach", func(w http.ResponseWriter, r *http.Request) {
		var blobs []delta.Blob
		e, err := epochOf(r)
		if err == nil {
			err = decode(w, r, maxAttach, &blobs)
		}
		if err == nil {
			err = p.attach(e, blobs)
		}
		reply(w, nil, err)
	})
	m.HandleFunc("POST /v1/epoch/{epoch}/abandon", func(w http.ResponseWriter, r *http.Request) {
		e, err := epochOf(r)
		if err == nil {
			err = p.abandon(e)
		}
		reply(w, nil, err)
	})
	return m
}

func handle[R any](m *http.ServeMux, path string, f func(context.Context, R) (any, error)) {
	m.HandleFunc("POST /v1/"+path, func(w http.ResponseWriter, r *http.Request) {
		var req R
		if err := decode(w, r, maxBody, &req); err != nil {
			reply(w, nil, err)
			return
		}
		v, err := f(r.Context(), req)
		reply(w, v, err)
	})
}

func decode(w http.ResponseWriter, r *http.Request, limit int64, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, limit))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return invalid("unreadable request: %v", err)
	}
	return nil
}

func epochOf(r *http.Request) (uint64, error) {
	e, err := strconv.ParseUint(r.PathValue("epoch"), 10, 64)
	if err != nil {
		return 0, invalid("epoch %q is not a number", r.PathValue("epoch"))
	}
	return e, nil
}

func reply(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		e := newAnswer(err)
		w.WriteHeader(httpStatus(e.Kind))
		_ = json.NewEncoder(w).Encode(e) // a client that is gone needs no answer
		return
	}
	if v == nil {
		v = struct{}{}
	}
	_ = json.NewEncoder(w).Encode(v)
}

// httpStatus is for people with curl; clients read the kind in the body.
func httpStatus(k wire.Kind) int {
	switch k {
	case wire.KindNotFound:
		return http.StatusNotFound
	case wire.KindConflict, wire.KindPosMismatch, wire.KindDiverged:
		return http.StatusConflict
	case wire.KindRefused:
		return http.StatusForbidden
	case wire.KindInvalid, wire.KindVersion:
		return http.StatusBadRequest
	case wire.KindUnavailable:
		return http.StatusServiceUnavailable
	case wire.KindNoSpace:
		return http.StatusInsufficientStorage
	}
	return http.StatusInternalServerError
}

// mapError gives the tracker's errors their kinds.
func mapError(err error) error {
	for _, m := range []struct {
		is   error
		kind wire.Kind
	}{
		{cbt.ErrOverrun, wire.KindConflict},
		{cbt.ErrNotFrozen, wire.KindConflict},
		{cbt.ErrEpochEnded, wire.KindNotFound},
		{cbt.ErrEpochOpen, wire.KindConflict},
		{cbt.ErrNotDrained, wire.KindUnavailable},
		{cbt.ErrStale, wire.KindUnavailable},
		{cbt.ErrSealed, wire.KindRefused},
		{cbt.ErrDirty, wire.KindRefused},
		{cbt.ErrPosition, wire.KindPosMismatch},
		{cbt.ErrCorrupt, wire.KindCorrupt},
		{cbt.ErrFeature, wire.KindVersion},
		{cbt.ErrMismatch, wire.KindConflict},
		{standby.ErrEnded, wire.KindRefused},
		{points.ErrNoSpace, wire.KindNoSpace},
		{block.ErrLocked, wire.KindConflict},
		{block.ErrRange, wire.KindInvalid},
		{context.DeadlineExceeded, wire.KindUnavailable},
		{context.Canceled, wire.KindUnavailable}, // the process goes, or its caller went
	} {
		if errors.Is(err, m.is) {
			var e *wire.Error
			if errors.As(err, &e) {
				return err
			}
			return &wire.Error{Kind: m.kind, Text: err.Error()}
		}
	}
	return err
}

// serveStream runs write with the response as its destination and reports its
// end in a trailer, because the status line has long gone.
func serveStream(w http.ResponseWriter, r *http.Request, write func(ctx context.Context, w *streamWriter) error) {
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Trailer", trailerEnd+", "+trailerError)
	err := write(r.Context(), &streamWriter{w})
	if err == nil {
		h.Set(trailerEnd, "ok")
		return
	}
	if b, jerr := json.Marshal(asWire(mapError(err))); jerr == nil {
		h.Set(trailerError, string(b))
	}
}

// streamWriter is a response whose blocked Write can be ended: its reader may
// have stopped reading for good.
type streamWriter struct{ w http.ResponseWriter }

func (s *streamWriter) Write(p []byte) (int, error) { return s.w.Write(p) }

// interrupt makes the Write that runs, and all later ones, fail.
func (s *streamWriter) interrupt() {
	_ = http.NewResponseController(s.w).SetWriteDeadline(time.Unix(1, 0)) // best effort: the connection may be gone
}

func (p *Plane) serveFrames(w http.ResponseWriter, r *http.Request) {
	e, err := epochOf(r)
	var from uint64
	if err == nil {
		if from, err = strconv.ParseUint(r.URL.Query().Get("from"), 10, 32); err != nil {
			err = invalid("from %q is not a chunk number", r.URL.Query().Get("from"))
		}
	}
	var f *frozen
	if err == nil {
		f, err = p.frozenEpoch(e, uint32(from))
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	serveStream(w, r, func(ctx context.Context, w *streamWriter) error { return f.stream(ctx, w, uint32(from)) })
}

func (p *Plane) serveSeed(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	req := SeedRequest{Disk: wire.DiskName(q.Get("disk")), Holes: q.Get("holes") == "true"}
	var err error
	for _, n := range []struct {
		name string
		dst  *int64
	}{{"offset", &req.Offset}, {"max", &req.Max}} {
		if *n.dst, err = strconv.ParseInt(q.Get(n.name), 10, 64); err != nil || *n.dst < 0 {
			reply(w, nil, invalid("%s %q is not a size", n.name, q.Get(n.name)))
			return
		}
	}
	s, err := p.seed(req)
	if err != nil {
		reply(w, nil, err)
		return
	}
	serveStream(w, r, s.stream)
}
