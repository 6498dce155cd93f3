package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/pprof"
	"strings"
	"sync"
	"time"

	"kvmreplica/replicad/wire"
)

// maxBody bounds every request of the local interface.
const maxBody = 1 << 20

const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 5 * time.Minute
)

// Server serves Backend. The zero value is not usable; see NewServer.
type Server struct {
	back  Backend
	roles func(Caller) Role
	log   *slog.Logger
	http  *http.Server
	runs  sync.WaitGroup // actions under way
}

// NewServer returns a server for back. roles says what a caller may do; it is
// asked for every connection and request, and must be quick.
func NewServer(back Backend, roles func(Caller) Role, log *slog.Logger) *Server {
	s := &Server{back: back, roles: roles, log: log}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/host", reply(func(r *http.Request) (any, error) { return back.Host(r.Context()) }))
	mux.HandleFunc("GET /v1/vms", reply(func(r *http.Request) (any, error) { return back.VMs(r.Context()) }))
	mux.HandleFunc("GET /v1/policies", reply(func(r *http.Request) (any, error) { return back.Policies(r.Context()) }))
	mux.HandleFunc("GET /v1/vms/{name}", reply(func(r *http.Request) (any, error) { return back.VM(r.Context(), r.PathValue("name")) }))
	mux.HandleFunc("GET /v1/vms/{name}/points", reply(func(r *http.Request) (any, error) { return back.Points(r.Context(), r.PathValue("name")) }))
	mux.HandleFunc("GET /v1/vms/{name}/statistics", reply(func(r *http.Request) (any, error) { return back.Statistics(r.Context(), r.PathValue("name")) }))
	mux.HandleFunc("GET /v1/mounts", reply(func(r *http.Request) (any, error) { return back.Mounts(r.Context()) }))
	mux.HandleFunc("GET /v1/vms/{name}/drills", reply(func(r *http.Request) (any, error) { return back.Drills(r.Context(), r.PathValue("name")) }))
	mux.HandleFunc("GET /v1/vms/{name}/drills/report", reply(func(r *http.Request) (any, error) {
		return back.DrillReport(r.Context(), r.PathValue("name"), r.URL.Query().Get("when"))
	}))
	mux.HandleFunc("GET /v1/peers", reply(func(r *http.Request) (any, error) { return back.Peers(r.Context()) }))
	mux.HandleFunc("GET /v1/doctor", reply(func(r *http.Request) (any, error) { return back.Doctor(r.Context()) }))
	mux.HandleFunc("GET /v1/stacks", replyTo(Operator, stacks))
	mux.HandleFunc("DELETE /v1/peers/{name}", replyTo(Admin, func(r *http.Request) (any, error) {
		return struct{}{}, back.RemovePeer(r.Context(), r.PathValue("name"))
	}))
	mux.HandleFunc("POST /v1/peers/invite", with(back.Invite))
	mux.HandleFunc("POST /v1/peers/join", with(back.Join))
	mux.HandleFunc("POST /v1/peers/allow", with(func(ctx context.Context, r AllowRequest) (struct{}, error) {
		return struct{}{}, back.Allow(ctx, r)
	}))
	mux.HandleFunc("POST /v1/actions", s.act)
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, ConnContext: asCaller}
	return s
}

// Serve answers on l until Shutdown. It owns l.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(&gate{Listener: l, roles: s.roles, users: map[int]int{}}); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the control socket: %w", err)
	}
	return nil
}

// Shutdown stops accepting, waits for running requests until ctx ends and for
// actions to reach a journalled stop.
func (s *Server) Shutdown(ctx context.Context) error {
	err := s.http.Shutdown(ctx)
	s.runs.Wait()
	return err
}

// reply answers whoever may look.
func reply(f func(*http.Request) (any, error)) http.HandlerFunc { return replyTo(Monitor, f) }

func replyTo(need Role, f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := allow(w, r, need); err != nil {
			fail(w, err)
			return
		}
		v, err := f(r)
		if err != nil {
			fail(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // the client went away: nothing to tell it
	}
}

// stacks asks the runtime and nothing of the product, which may hang.
func stacks(*http.Request) (any, error) {
	var b bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&b, 2); err != nil {
		return nil, err
	}
	return Text{Text: b.String()}, nil
}

// with answers an administrator's request.
func with[Q, A any](f func(context.Context, Q) (A, error)) http.HandlerFunc {
	return replyTo(Admin, func(r *http.Request) (any, error) {
		var q Q
		if err := decode(r.Body, &q); err != nil {
			return nil, err
		}
		return f(r.Context(), q)
	})
}

func decode(body io.Reader, v any) error {
	d := json.NewDecoder(io.LimitReader(body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return &wire.Error{Kind: wire.KindInvalid, Text: "request: " + err.Error(), Hint: "use a replicactl of the daemon's version"}
	}
	return nil
}

// act streams the events of one action. The action gets a context of its own:
// a closed terminal must not tear a plan apart.
func (s *Server) act(w http.ResponseWriter, r *http.Request) {
	var a Action
	err := allow(w, r, Monitor)
	if err == nil {
		err = decode(r.Body, &a)
	}
	if err == nil {
		err = allow(w, r, Needs(a))
	}
	if err != nil {
		fail(w, err)
		return
	}
	s.runs.Add(1)
	defer s.runs.Done()
	w.Header().Set("Content-Type", "application/x-ndjson")
	var mu sync.Mutex
	enc := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	emit := func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		if enc.Encode(e) == nil {
			_ = flush.Flush()
		}
	}
	ctx := context.WithoutCancel(r.Context())
	if a.Verb == PointExport || a.Verb == VMExport || a.Verb == VMImport {
		ctx = r.Context()
	}
	err = s.back.Act(ctx, a, emit)
	last := Event{Done: true}
	if err != nil {
		last.Error = AsError(err)
	}
	emit(last)
}

func fail(w http.ResponseWriter, err error) {
	e := AsError(err)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(statusOf(e.Kind))
	_ = json.NewEncoder(w).Encode(e)
}

func statusOf(k wire.Kind) int {
	switch k {
	case wire.KindNotFound:
		return http.StatusNotFound
	case wire.KindConflict, wire.KindDiverged, wire.KindPosMismatch:
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

// AsError turns any error into one that can cross: the *wire.Error in its
// chain keeps its kind and hint, the whole chain is the text.
func AsError(err error) *wire.Error {
	if err == nil {
		return nil
	}
	out := &wire.Error{Kind: wire.KindInternal, Text: err.Error()}
	var w *wire.Error
	if errors.As(err, &w) {
		out.Kind, out.Hint, out.Have = w.Kind, w.Hint, w.Have
		if err == error(w) {
			out.Text = w.Text
		} else if w.Hint != "" {
			// the hint is shown apart: do not say it twice
			if t, ok := strings.CutSuffix(out.Text, " ("+w.Hint+")"); ok {
				out.Text = t
			}
		}
	}
	return out
}
