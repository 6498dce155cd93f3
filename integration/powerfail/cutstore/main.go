// Command cutstore is a replica's host in a throw-away machine: it opens the
// product's replica store in a directory and serves it over HTTP on a unix
// socket, for the power-cut campaign.
//
//	cutstore DIR SOCKET
//
//	PUT /seed             a stream of seed chunks; the reply is sent when they are durable
//	PUT /epoch            a whole epoch; the reply is its position, committed
//	GET /state            see State
//	GET /content?at=N     the disk at point N of State.Points, or committed (-1)
//	POST /check           verifies everything the store wrote
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"kvmreplica/integration/powerfail/cutwire"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/points"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: cutstore DIR SOCKET")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "cutstore:", err)
		os.Exit(1)
	}
}

func run(dir, socket string) error {
	s, err := open(dir)
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- s.Run(context.Background()) }()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	h := &handler{s}
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /seed", h.seed)
	mux.HandleFunc("PUT /epoch", h.epoch)
	mux.HandleFunc("GET /state", h.state)
	mux.HandleFunc("GET /content", h.content)
	mux.HandleFunc("POST /check", h.check)
	go func() { failed <- (&http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}).Serve(ln) }()
	return <-failed
}

// open opens the store in dir or makes one.
func open(dir string) (*points.Store, error) {
	cfg := points.Config{
		VM: cutwire.VM(), Policy: points.Policy{MinDistance: time.Millisecond},
		Limits: points.Limits{SpoolStep: 1 << 20, SeedStep: 1 << 20},
		Log:    slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := (&points.Dir{Path: dir}).Configure(&cfg); err != nil {
		return nil, err
	}
	s, err := points.Create(cfg, cutwire.Disks())
	if errors.Is(err, points.ErrExists) {
		return points.Open(cfg)
	}
	return s, err
}

type handler struct{ s *points.Store }

func reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	_ = json.NewEncoder(w).Encode(v) // the host sees a short reply
}

func (h *handler) seed(w http.ResponseWriter, r *http.Request) {
	d := delta.NewDecoder(r.Body)
	head, err := d.Header()
	for err == nil {
		var frame []byte
		if frame, _, err = d.Next(); err == nil {
			err = h.s.SeedChunk(&head, frame)
		}
	}
	if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	cursors, ferr := h.s.SeedFlush()
	reply(w, cursors, errors.Join(err, ferr))
}

func (h *handler) epoch(w http.ResponseWriter, r *http.Request) {
	d := delta.NewDecoder(r.Body)
	head, err := d.Header()
	if err != nil {
		reply(w, nil, err)
		return
	}
	rcv, err := h.s.Begin(head)
	if err != nil {
		reply(w, nil, err)
		return
	}
	pos, err := rcv.Stream(r.Context(), d)
	reply(w, pos, err)
}

func (h *handler) state(w http.ResponseWriter, _ *http.Request) {
	st := h.s.Status()
	out := cutwire.State{Seeding: st.State == points.Seeding, Seeded: st.Seeded, Committed: st.Committed, VerifyAll: st.VerifyAll}
	for _, e := range st.Damage {
		out.Damage = append(out.Damage, e.Error())
	}
	for _, p := range h.s.Points() {
		out.Points = append(out.Points, p.Pos)
		if p.Damage != nil {
			out.Damage = append(out.Damage, p.Damage.Error())
		}
	}
	reply(w, out, nil)
}

func (h *handler) content(w http.ResponseWriter, r *http.Request) {
	pos := h.s.Committed()
	at, err := strconv.Atoi(r.FormValue("at"))
	if ps := h.s.Points(); err == nil && at >= 0 {
		if at >= len(ps) {
			reply(w, nil, errors.New("no such point"))
			return
		}
		pos = ps[at].Pos
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	v, err := h.s.View(pos)
	if err != nil {
		reply(w, nil, err)
		return
	}
	defer v.Close()
	d, err := v.Disk(cutwire.Disks()[0].Name)
	if err != nil {
		reply(w, nil, err)
		return
	}
	w.Header().Set(cutwire.PosHeader, pos.String())
	_, _ = io.Copy(w, io.NewSectionReader(d, 0, d.Size())) // the host sees a short reply
}

func (h *handler) check(w http.ResponseWriter, r *http.Request) {
	var errs []error
	err := h.s.Check(r.Context(), func(e error) { errs = append(errs, e) })
	reply(w, "ok", errors.Join(append(errs, err)...))
}
