package dataplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Deadlines of control calls; a caller's earlier deadline wins. Streams have
// none of their own.
const (
	callTimeout  = 10 * time.Second
	syncTimeout  = 2 * time.Minute // calls that sync images
	drainTimeout = 2 * time.Minute
	dialTimeout  = 5 * time.Second

	keepTimeout = 7 * 24 * time.Hour // images are copied; whoever waits ends it

	upgradeTimeout = time.Minute // a program starts; the guest waits for milliseconds of it
)

// maxReply bounds what a control reply may hold: 4096 ranges and digests fit
// many times.
const maxReply = 4 << 20

// Client speaks to one data plane. It is safe for concurrent use; Close frees
// idle connections only, so a Client may be kept across restarts.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client for a control socket. It does not connect.
func NewClient(socket string) *Client {
	d := &net.Dialer{Timeout: dialTimeout}
	return &Client{path: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", socket)
		},
		MaxIdleConns:       4,
		IdleConnTimeout:    30 * time.Second,
		DisableCompression: true,
		ReadBufferSize:     256 << 10,
	}}}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks for everything at once.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.get(ctx, "status", nil, &s)
}

// Counters returns numbers for debugging.
func (c *Client) Counters(ctx context.Context) (n Counters, err error) {
	return n, c.get(ctx, "counters", nil, &n)
}

// CreateTracker makes the tracker and opens it.
func (c *Client) CreateTracker(ctx context.Context, r CreateRequest) error {
	return c.post(ctx, "create", syncTimeout, r, nil)
}

// Export opens or closes exports.
func (c *Client) Export(ctx context.Context, r ExportRequest) error {
	return c.post(ctx, "export", drainTimeout, r, nil)
}

// Refuse keeps every export closed from now on, across restarts, or lifts that
// with an empty reason (which opens nothing by itself). It returns after the
// last request of every client was answered.
func (c *Client) Refuse(ctx context.Context, reason string) error {
	return c.post(ctx, "refuse", drainTimeout, RefuseRequest{reason}, nil)
}

// Freeze makes a cut over all disks. An epoch frozen before and not ended is a
// conflict.
func (c *Client) Freeze(ctx context.Context, r FreezeRequest) (e Epoch, err error) {
	return e, c.post(ctx, "freeze", callTimeout, r, &e)
}

// Attach adds firmware state to the frozen epoch. It must precede the first
// Frames call of the epoch.
func (c *Client) Attach(ctx context.Context, epoch uint64, blobs []delta.Blob) error {
	return c.post(ctx, "epoch/"+strconv.FormatUint(epoch, 10)+"/attach", callTimeout, blobs, nil)
}

// Frames streams a frozen epoch: header, chunks from number from on, manifest.
// Chunks before from must have been produced before. A read error that is a
// *wire.Error is the data plane's; everything else is a broken stream.
func (c *Client) Frames(ctx context.Context, epoch uint64, from uint32) (io.ReadCloser, error) {
	q := url.Values{"from": {strconv.FormatUint(uint64(from), 10)}}
	return c.stream(ctx, "epoch/"+strconv.FormatUint(epoch, 10)+"/frames", q)
}

// Ack ends the frozen epoch as shipped. pos must carry the digest the data
// plane computed itself. Acknowledging the position that is already the last
// acknowledged one is a no-op.
func (c *Client) Ack(ctx context.Context, pos delta.Pos) error {
	return c.post(ctx, "ack", callTimeout, pos, nil)
}

// Abandon ends the frozen epoch unshipped: its marks return, its number is
// burnt. Unknown epochs are a no-op.
func (c *Client) Abandon(ctx context.Context, epoch uint64) error {
	return c.post(ctx, "epoch/"+strconv.FormatUint(epoch, 10)+"/abandon", callTimeout, struct{}{}, nil)
}

// SeedFrames streams seed chunks of the live disk: header, then chunks that
// cover [Offset, end) without a gap, zeros as zero extents.
func (c *Client) SeedFrames(ctx context.Context, r SeedRequest) (io.ReadCloser, error) {
	q := url.Values{
		"disk": {string(r.Disk)}, "offset": {strconv.FormatInt(r.Offset, 10)},
		"max": {strconv.FormatInt(r.Max, 10)}, "holes": {strconv.FormatBool(r.Holes)},
	}
	return c.stream(ctx, "seed", q)
}

// Ranges lists marked ranges.
func (c *Client) Ranges(ctx context.Context, r RangesRequest) (a RangesReply, err error) {
	return a, c.post(ctx, "ranges", callTimeout, r, &a)
}

// Compare opens a window and hashes the live ranges.
func (c *Client) Compare(ctx context.Context, r CompareRequest) (a CompareReply, err error) {
	return a, c.post(ctx, "compare", syncTimeout, r, &a)
}

// EndCompare closes a window.
func (c *Client) EndCompare(ctx context.Context, r CompareEnd) (a CompareResult, err error) {
	return a, c.post(ctx, "compare/end", callTimeout, r, &a)
}

// Clean runs the clean step now: images synced, base durable, regions cleared.
func (c *Client) Clean(ctx context.Context) (a CleanReply, err error) {
	return a, c.post(ctx, "clean", syncTimeout, struct{}{}, &a)
}

// Mark marks ranges, or everything.
func (c *Client) Mark(ctx context.Context, r MarkRequest) error {
	return c.post(ctx, "mark", syncTimeout, r, nil)
}

// Seal closes the exports for good, syncs and seals the images at pos.
func (c *Client) Seal(ctx context.Context, pos delta.Pos) error {
	return c.post(ctx, "seal", drainTimeout, SealRequest{pos}, nil)
}

// Unseal takes a seal back.
func (c *Client) Unseal(ctx context.Context) error {
	return c.post(ctx, "unseal", syncTimeout, struct{}{}, nil)
}

// LockQEMU takes QEMU's lock bytes on a disk's image, or on all with an empty
// name; UnlockQEMU gives them up. The choice is remembered.
func (c *Client) LockQEMU(ctx context.Context, disk wire.DiskName) error {
	return c.post(ctx, "lock-qemu", callTimeout, LockRequest{disk}, nil)
}

// UnlockQEMU releases QEMU's lock bytes, for a hand-over to QEMU.
func (c *Client) UnlockQEMU(ctx context.Context, disk wire.DiskName) error {
	return c.post(ctx, "unlock-qemu", callTimeout, LockRequest{disk}, nil)
}

// CommitOverlay makes it durable that what the guest wrote beside the images
// stays; they are brought to it in the background, see Status.Overlay.
func (c *Client) CommitOverlay(ctx context.Context) error {
	return c.post(ctx, "overlay/commit", syncTimeout, struct{}{}, nil)
}

// History says what CommitOverlay will end; refused when it has.
func (c *Client) History(ctx context.Context) (a HistoryReply, err error) {
	return a, c.post(ctx, "overlay/history", callTimeout, struct{}{}, &a)
}

// KeepPoints copies the recovery points before CommitOverlay ends them, while
// the guest goes on. It has no deadline of its own: images may be copied. When
// ctx ends, or the data plane does, what was copied is removed, or lies in
// r.Dir without being a store.
func (c *Client) KeepPoints(ctx context.Context, r KeepRequest) (a KeepReply, err error) {
	return a, c.post(ctx, "overlay/keep", keepTimeout, r, &a)
}

// Resize gives a disk another size. After an error the image may be longer than
// the disk; a repeated call, or the data plane's next start, takes that up.
func (c *Client) Resize(ctx context.Context, r ResizeRequest) (a ResizeReply, err error) {
	return a, c.post(ctx, "resize", syncTimeout, r, &a)
}

// Sync makes every image durable (the hand-over asks for it twice).
func (c *Client) Sync(ctx context.Context) error {
	return c.post(ctx, "sync", syncTimeout, struct{}{}, nil)
}

// Upgrade lets the installed program succeed the data plane, connections and
// all. An error means that everything is as before. Only a call whose answer
// was lost leaves it open; Status tells then.
func (c *Client) Upgrade(ctx context.Context, r UpgradeRequest) (a UpgradeReply, err error) {
	return a, c.post(ctx, "upgrade", upgradeTimeout, r, &a)
}

// Shutdown drains and ends the data plane and its keeper.
func (c *Client) Shutdown(ctx context.Context) error {
	return c.post(ctx, "shutdown", drainTimeout, struct{}{}, nil)
}

func (c *Client) get(ctx context.Context, path string, q url.Values, reply any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return c.do(ctx, http.MethodGet, path, q, nil, reply)
}

func (c *Client) post(ctx context.Context, path string, limit time.Duration, req, reply any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	b, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("data plane %s: %w", path, err)
	}
	return c.do(ctx, http.MethodPost, path, nil, b, reply)
}

func (c *Client) do(ctx context.Context, method, path string, q url.Values, body []byte, reply any) error {
	resp, err := c.send(ctx, method, path, q, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lim := io.LimitReader(resp.Body, maxReply)
	if resp.StatusCode != http.StatusOK {
		return decodeError(lim, path)
	}
	if reply == nil {
		_, err = io.Copy(io.Discard, lim)
	} else {
		err = json.NewDecoder(lim).Decode(reply)
	}
	if err != nil {
		return unavailable(path, err)
	}
	return nil
}

// send asks again while a process answers that has been succeeded.
func (c *Client) send(ctx context.Context, method, path string, q url.Values, body []byte) (*http.Response, error) {
	for {
		resp, err := c.once(ctx, method, path, q, body)
		if err != nil || resp.Header.Get(movedHeader) == "" {
			return resp, err
		}
		select {
		case <-ctx.Done():
			return resp, nil // which says so
		case <-time.After(pollEvery):
			_ = resp.Body.Close() // it says nothing else
		}
	}
}

func (c *Client) once(ctx context.Context, method, path string, q url.Values, body []byte) (*http.Response, error) {
	u := "http://dataplane/v1/" + path
	if len(q) > 0 {
		u += "?" + q.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("data plane %s: %w", path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
		// Every call may be repeated, so a connection that died idle (the data
		// plane restarted) is retried by the transport instead of failing.
		req.Header.Set("Idempotency-Key", "1")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, unavailable(path, err)
	}
	return resp, nil
}

// unavailable is what a broken conversation becomes: worth another try.
func unavailable(path string, err error) error {
	return fmt.Errorf("%w: %w", &wire.Error{
		Kind: wire.KindUnavailable, Text: "the data plane does not answer (" + path + ")",
	}, err)
}

func decodeError(r io.Reader, path string) error {
	var a answer
	if err := json.NewDecoder(r).Decode(&a); err != nil || a.named() == nil {
		return unavailable(path, errors.New("unreadable error reply"))
	}
	return a.named()
}

// Trailers of a stream: exactly one of them is present after a whole stream.
const (
	trailerEnd   = "Replicad-End"
	trailerError = "Replicad-Error"
)

func (c *Client) stream(ctx context.Context, path string, q url.Values) (io.ReadCloser, error) {
	resp, err := c.send(ctx, http.MethodGet, path, q, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, decodeError(io.LimitReader(resp.Body, maxReply), path)
	}
	return &stream{resp: resp}, nil
}

// stream turns the trailers into read errors.
type stream struct{ resp *http.Response }

func (s *stream) Read(p []byte) (int, error) {
	n, err := s.resp.Body.Read(p)
	if !errors.Is(err, io.EOF) {
		return n, err
	}
	if t := s.resp.Trailer.Get(trailerError); t != "" {
		e := new(wire.Error)
		if json.Unmarshal([]byte(t), e) != nil {
			e = &wire.Error{Kind: wire.KindInternal, Text: "unreadable error at the end of a stream"}
		}
		return n, e
	}
	if s.resp.Trailer.Get(trailerEnd) == "" {
		return n, io.ErrUnexpectedEOF
	}
	return n, io.EOF
}

func (s *stream) Close() error { return s.resp.Body.Close() }
