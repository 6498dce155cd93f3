package dataplane

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// trackerDir is the tracker's folder in the state directory.
const trackerDir = "tracker"

// Parts are what a Plane stands on beside its configuration. The zero value is
// the real host; a simulation puts storage that crashes and a clock that jumps
// in its place.
type Parts struct {
	// State replaces Config.StateDir.
	State fsx.FS
	// Image replaces opening a disk's storage. The identity function may be nil.
	Image func(DiskConfig) (block.Device, func() (block.Identity, error), error)
	// Tracker changes the tracker's configuration before it is used.
	Tracker func(*cbt.Config)
	// Now replaces the clock.
	Now func() time.Time
}

func (p Parts) state(cfg Config) (fsx.FS, error) {
	if p.State != nil {
		return p.State, nil
	}
	return fsx.OS(cfg.StateDir)
}

func (p Parts) image(ctx context.Context, d DiskConfig, dirty int64) (*image, error) {
	if p.Image == nil {
		return openImage(ctx, d, dirty)
	}
	dev, ident, err := p.Image(d)
	if err != nil {
		return nil, err
	}
	return &image{cfg: d, dev: dev, ident: ident}, nil
}

func (p Parts) now() time.Time {
	if p.Now != nil {
		return p.Now()
	}
	return time.Now()
}

// Guest is an exported disk as the NBD server sees it; nil while its export
// is closed. For simulations, which have no QEMU.
func (p *Plane) Guest(disk string) block.Device {
	p.exportMu.Lock()
	defer p.exportMu.Unlock()
	for _, i := range p.images {
		if g := p.group.Load(); string(i.cfg.Name) == disk && p.exported[i.cfg.Name] && g != nil {
			return g.Disk(disk)
		}
	}
	return nil
}

// Client is a client of this data plane without a socket: calls run in the
// caller's goroutine, and what they stream is complete when they return.
func (p *Plane) Client() *Client {
	return &Client{http: &http.Client{Transport: direct{p.routes()}}}
}

// Close drains the data plane, as the end of Serve does.
func (p *Plane) Close() error { return p.drain() }

// direct hands requests to a handler.
type direct struct{ h http.Handler }

// RoundTrip implements http.RoundTripper.
func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	w := &recorder{header: http.Header{}, status: http.StatusOK}
	d.h.ServeHTTP(w, r)
	if r.Body != nil {
		_ = r.Body.Close() // the handler has read what it wanted
	}
	resp := &http.Response{
		StatusCode: w.status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: w.header, Trailer: http.Header{}, Request: r, ContentLength: -1, Body: io.NopCloser(&w.body),
	}
	for _, k := range strings.Split(w.header.Get("Trailer"), ", ") {
		if v := w.header.Get(k); k != "" && v != "" {
			resp.Trailer.Set(k, v)
		}
	}
	return resp, nil
}

// recorder is a response kept in memory.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

// Header implements http.ResponseWriter.
func (w *recorder) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter.
func (w *recorder) WriteHeader(status int) { w.status = status }

// Write implements http.ResponseWriter.
func (w *recorder) Write(p []byte) (int, error) { return w.body.Write(p) }

// SetWriteDeadline is what http.ResponseController looks for; nothing blocks here.
func (w *recorder) SetWriteDeadline(time.Time) error { return errors.ErrUnsupported }
