package peer

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Bodies of the calls that wire.Service expresses by plain values.
type (
	progressReply struct{ Chunks uint32 }
	statusRequest struct{ VM wire.VMID }
	nothing       struct{}
)

func (r statusRequest) Validate() error {
	if !r.VM.Valid() {
		return badRoute("VM id %.48q is not a lower-case UUID", string(r.VM))
	}
	return nil
}

type validator interface{ Validate() error }

// serveOne answers one request. A panic costs its caller the connection, and
// nobody else anything.
func (s *Server) serveOne(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		// net/http reads on in the body before it closes: not from this caller.
		_ = rc.SetReadDeadline(time.Unix(1, 0))
		if p != http.ErrAbortHandler {
			s.cfg.Log.Error("peer request crashed", "path", wire.CleanText(r.URL.Path, 64), "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		}
		panic(http.ErrAbortHandler) // net/http closes the connection
	}()
	_ = rc.SetReadDeadline(time.Now().Add(s.cfg.Limits.Control))
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 || r.TLS.NegotiatedProtocol != protoMain {
		panic(http.ErrAbortHandler)
	}
	rec, err := s.caller(r)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	ctx := wire.WithPeer(r.Context(), wire.Peer{Host: rec.Host, Name: rec.Name})
	// A copy: net/http looks at the type of the original's body.
	body := &noticing{ReadCloser: r.Body}
	r = r.WithContext(ctx)
	r.Body = body
	reply, err := s.dispatch(ctx, rec, rc, r)
	if err != nil {
		s.cfg.Log.Debug("peer request refused", "peer", rec.Name, "path", wire.CleanText(r.URL.Path, 64), "error", wire.CleanText(err.Error(), wire.MaxText))
	}
	_ = rc.SetWriteDeadline(time.Now().Add(s.cfg.Limits.Control))
	if r.Context().Err() != nil {
		return
	}
	writeReply(w, reply, err)
	if r.Method == http.MethodPut && err != nil && body.begun {
		drain(rc, r)
	}
}

// noticing remembers whether a body was asked for: until then a caller that
// waits for "continue" has sent nothing.
type noticing struct {
	io.ReadCloser
	begun bool
}

func (n *noticing) Read(p []byte) (int, error) {
	n.begun = true
	return n.ReadCloser.Read(p)
}

// Bounds of what is read on after a refusal in the middle of a body.
const (
	drainTime  = 5 * time.Second
	drainBytes = 256 << 20
)

// drain sends the answer now and reads on until the caller has noticed. Closing
// with unread data would reset the connection, and the reason with it.
func drain(rc *http.ResponseController, r *http.Request) {
	if rc.Flush() != nil {
		return
	}
	_ = rc.SetReadDeadline(time.Now().Add(drainTime))
	_, _ = io.CopyN(io.Discard, r.Body, drainBytes)
}

// caller checks the connection's certificate again for every request: a
// connection outlives neither its entry, nor a change of it, nor its dates.
func (s *Server) caller(r *http.Request) (Record, error) {
	return verifyPeer(*r.TLS, s.cfg.Store, x509.ExtKeyUsageClientAuth, s.cfg.Now())
}

func writeReply(w http.ResponseWriter, reply any, err error) {
	code, data := encodeReply(reply, err)
	w.Header().Set("Content-Type", jsonType)
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(code)
	_, _ = w.Write(data)
}

func encodeReply(reply any, err error) (code int, data []byte) {
	code, v := http.StatusOK, reply
	if err != nil {
		e := toWire(err)
		code, v = httpStatus(e.Kind), e
	}
	data, merr := json.Marshal(v)
	if merr != nil {
		return http.StatusInternalServerError, []byte(`{"Kind":0,"Text":"the answer could not be encoded"}`)
	}
	return code, data
}

// toWire makes any error fit to travel. Internal errors cross without their
// inner text beyond what is printable and short.
func toWire(err error) *wire.Error {
	var pos *delta.PosMismatchError
	e := &wire.Error{}
	switch {
	case errors.As(err, &e):
		c := *e
		e = &c
	case errors.As(err, &pos):
		have := pos.Have
		e = &wire.Error{Kind: wire.KindPosMismatch, Text: err.Error(), Have: &have}
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		e = &wire.Error{Kind: wire.KindUnavailable, Text: err.Error()}
	default:
		e = &wire.Error{Kind: wire.KindInternal, Text: err.Error()}
	}
	e.Text, e.Hint = wire.CleanText(e.Text, wire.MaxText), wire.CleanText(e.Hint, wire.MaxText)
	return e
}

// dispatch checks the route, reads the request, asks for leave and calls.
func (s *Server) dispatch(ctx context.Context, rec Record, rc *http.ResponseController, r *http.Request) (any, error) {
	rt, err := parseRoute(r.Method, r.URL.Path, r.URL.RawQuery)
	if err != nil {
		return nil, err
	}
	if rt.call.bulk() {
		return s.serveBulk(ctx, rec, rt, rc, r)
	}
	if t := r.Header.Get("Content-Type"); t != jsonType {
		return nil, badRoute("content type %.32q, want %s", t, jsonType)
	}
	in := incoming{http.MaxBytesReader(nil, r.Body, maxControlRequest), rc}
	svc := s.cfg.Service
	switch rt.call {
	case callHello:
		return control(ctx, in, func(q wire.HelloRequest) error { return nil }, s.hello)
	case callCheck:
		return control(ctx, in, func(q wire.CheckRequest) error { return s.mayCheck(rec, q) }, svc.Check)
	case callOffer:
		return s.serveOffer(ctx, rec, in)
	case callWithdraw:
		return control(ctx, in, func(q wire.Withdraw) error { return s.mayWithdraw(rec, q) }, discardReply(svc.Withdraw))
	case callHandshake:
		return control(ctx, in, func(q wire.HandshakeRequest) error { return s.mayTouch(rec, q.VM) }, svc.Handshake)
	case callProgress:
		return control(ctx, in, func(q wire.EpochKey) error { return s.maySend(rec, q.VM) }, s.progress)
	case callBeat:
		return control(ctx, in, func(q wire.Beat) error { return s.maySend(rec, q.VM) }, discardReply(svc.Beat))
	case callDigests:
		return control(ctx, in, func(q wire.DigestRequest) error { return s.maySend(rec, q.VM) }, svc.Digests)
	case callStatus:
		return control(ctx, in, func(q statusRequest) error { return s.mayTouch(rec, q.VM) }, s.status)
	case callPoints:
		return control(ctx, in, func(q statusRequest) error { return s.mayTouch(rec, q.VM) }, s.points)
	case callFailover:
		return control(ctx, in, func(q wire.FailoverRequest) error { return s.mayFailover(rec, q) }, svc.Failover)
	}
	return nil, badRoute("no such call")
}

// incoming is the body of a control request.
type incoming struct {
	body io.Reader
	rc   *http.ResponseController
}

// read decodes the body and lifts the deadline for reading it: left in place
// it would cancel the call while it runs.
func (in incoming) read(v any) error {
	if err := decodeStrict(in.body, v); err != nil {
		return err
	}
	return in.rc.SetReadDeadline(time.Time{})
}

// control reads one strict JSON request of type Q, validates it, asks may, and
// only then calls.
func control[Q validator, A any](ctx context.Context, in incoming, may func(Q) error, do func(context.Context, Q) (A, error)) (any, error) {
	var q Q
	if err := in.read(&q); err != nil {
		return nil, badRoute("request is not valid: %s", wire.CleanText(err.Error(), 200))
	}
	if err := q.Validate(); err != nil {
		return nil, err
	}
	if err := may(q); err != nil {
		return nil, err
	}
	return do(ctx, q)
}

func discardReply[Q any](f func(context.Context, Q) error) func(context.Context, Q) (nothing, error) {
	return func(ctx context.Context, q Q) (nothing, error) { return nothing{}, f(ctx, q) }
}

func (s *Server) hello(ctx context.Context, q wire.HelloRequest) (wire.HelloReply, error) {
	if q.Max < wire.ProtocolMin || q.Min > wire.ProtocolMax {
		return wire.HelloReply{}, &wire.Error{
			Kind: wire.KindVersion,
			Text: fmt.Sprintf("this host speaks protocol %d to %d, the caller %d to %d", wire.ProtocolMin, wire.ProtocolMax, q.Min, q.Max),
			Hint: "upgrade the older host",
		}
	}
	a, err := s.cfg.Service.Hello(ctx, q)
	if err != nil {
		return a, err
	}
	// The transport's own word counts for what the transport decides.
	a.Protocol = min(q.Max, wire.ProtocolMax)
	a.Host, a.Receiving = s.cfg.Identity.Host(), s.cfg.Receiving()
	return a, nil
}

func (s *Server) progress(ctx context.Context, k wire.EpochKey) (progressReply, error) {
	n, err := s.cfg.Service.EpochProgress(ctx, k)
	return progressReply{n}, err
}

func (s *Server) status(ctx context.Context, q statusRequest) (wire.PeerVM, error) {
	return s.cfg.Service.Status(ctx, q.VM)
}

func (s *Server) points(ctx context.Context, q statusRequest) (wire.PointsReply, error) {
	return s.cfg.Service.Points(ctx, q.VM)
}

func (s *Server) serveOffer(ctx context.Context, rec Record, in incoming) (any, error) {
	return control(ctx, in, func(wire.Offer) error { return nil }, func(ctx context.Context, q wire.Offer) (wire.OfferReply, error) {
		select {
		case s.offers <- struct{}{}:
			defer func() { <-s.offers }()
		case <-ctx.Done():
			return wire.OfferReply{}, ctx.Err()
		}
		if err := s.mayOffer(rec, q); err != nil {
			return wire.OfferReply{}, err
		}
		return s.cfg.Service.Offer(ctx, q)
	})
}

// serveBulk hands the body to the Service under the peer's bandwidth and with
// a deadline that moves as long as bytes do.
func (s *Server) serveBulk(ctx context.Context, rec Record, rt route, rc *http.ResponseController, r *http.Request) (any, error) {
	vm := rt.key.VM
	if rt.call == callSeed {
		vm = rt.seed.VM
	}
	if err := s.maySend(rec, vm); err != nil {
		return nil, err
	}
	end, err := s.beginBulk(rec.Host)
	if err != nil {
		return nil, err
	}
	defer end()
	// The answer may go out while the caller still sends.
	if err := rc.EnableFullDuplex(); err != nil {
		return nil, err
	}
	moving := &movingReader{r: r.Body, rc: rc, limit: s.cfg.Limits.Stall}
	body := s.band(rec).Reader(ctx, moving)
	if rt.call == callSeed {
		return s.cfg.Service.PutSeed(ctx, rt.seed, body)
	}
	return s.cfg.Service.PutEpoch(ctx, rt.key, rt.from, body)
}

// movingReader gives each Read its own deadline.
type movingReader struct {
	r     io.Reader
	rc    *http.ResponseController
	limit time.Duration
}

func (m *movingReader) Read(p []byte) (int, error) {
	if err := m.rc.SetReadDeadline(time.Now().Add(m.limit)); err != nil {
		return 0, err
	}
	n, err := m.r.Read(p)
	switch {
	case errors.Is(err, io.EOF):
		// The commit that follows takes its own time.
		if derr := m.rc.SetReadDeadline(time.Time{}); derr != nil {
			return n, derr
		}
	case err != nil:
		err = fmt.Errorf("read body: %w", err)
	}
	return n, err
}
