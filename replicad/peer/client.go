package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// ClientConfig is what a Client needs. Identity, Store and Host must be set.
type ClientConfig struct {
	Identity *Identity
	Store    *Store
	// Host is the paired host to call; its record is read from Store for every
	// connection, so that a new address or a removal counts at once.
	Host wire.HostID
	// Dial makes TCP connections; nil = the system's.
	Dial DialFunc
	// Bandwidth limits what this client sends in seeds and epochs; nil = no limit.
	Bandwidth *Bandwidth
	// Now is the clock for certificates; nil = time.Now.
	Now func() time.Time
	// Stall ends a transfer that does not move (default 60 s).
	Stall time.Duration
}

// Client calls a paired host. Errors are *wire.Error; KindUnavailable means
// that the other side was not reached or did not answer, KindRefused that it
// is not (or no longer) the host that was paired. After a cut PutEpoch, ask
// EpochProgress where to go on. PutSeed and PutEpoch never read their body after
// they return; so they wait for a Read under way, which must end with ctx.
// Safe for concurrent use.
type Client struct {
	cfg     ClientConfig
	conns   *dialed
	control *http.Transport
	bulk    *http.Transport
	stop    func()
}

var _ wire.Service = (*Client)(nil)

// NewClient connects to nothing yet.
func NewClient(cfg ClientConfig) (*Client, error) {
	if cfg.Identity == nil || cfg.Store == nil || !cfg.Host.Valid() {
		return nil, errors.New("peer client: identity, store and host are needed")
	}
	if cfg.Dial == nil {
		cfg.Dial = dialTCP
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Bandwidth == nil {
		cfg.Bandwidth = &Bandwidth{}
	}
	if cfg.Stall <= 0 {
		cfg.Stall = stallTimeout
	}
	c := &Client{cfg: cfg, conns: &dialed{set: map[*dialedConn]bool{}}}
	c.control = c.transport(failoverTimeout)
	c.bulk = c.transport(commitTimeout)
	c.bulk.ExpectContinueTimeout = continueTimeout
	c.stop = cfg.Store.Watch(func(h wire.HostID) {
		if h == cfg.Host {
			c.changed()
		}
	})
	return c, nil
}

// changed ends the connections when the host is no longer paired, or is to be
// found elsewhere: one to where it was may hang for as long as TCP tries.
func (c *Client) changed() {
	if rec, ok := c.cfg.Store.Get(c.cfg.Host); ok {
		c.conns.closeBut(rec.Address)
	} else {
		c.conns.closeBut("")
	}
}

// transport speaks HTTP/1.1 only, through no proxy, without compression.
func (c *Client) transport(answer time.Duration) *http.Transport {
	return &http.Transport{
		DialTLSContext:         c.dial,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    4,
		MaxConnsPerHost:        16,
		IdleConnTimeout:        idleTimeout / 2,
		ResponseHeaderTimeout:  answer,
		MaxResponseHeaderBytes: maxHeader,
		WriteBufferSize:        64 << 10,
		ReadBufferSize:         16 << 10,
	}
}

// dial ignores the address of the request: the record's counts.
func (c *Client) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	rec, err := c.cfg.Store.trusted(c.cfg.Host)
	if err != nil {
		return nil, err
	}
	if rec.Address == "" {
		return nil, &wire.Error{
			Kind: wire.KindUnavailable, Text: "no address is known for " + rec.Name,
			Hint: "replicactl peer address PEER HOST, or let that host do the calling",
		}
	}
	raw := func(ctx context.Context, network, address string) (net.Conn, error) {
		n, err := c.cfg.Dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return c.conns.add(&stallConn{Conn: n, limit: c.cfg.Stall}, rec.Address)
	}
	conn, cs, err := dialTLS(ctx, c.cfg.Identity, rec.Address, protoMain, raw, c.verify)
	if err != nil {
		return nil, err
	}
	if _, err := c.cfg.Store.trusted(c.cfg.Host); err != nil {
		_ = conn.Close()
		return nil, err
	}
	// It ends, whatever it is doing, with the other side's certificate.
	end := time.AfterFunc(cs.PeerCertificates[0].NotAfter.Sub(c.cfg.Now()), func() { _ = conn.Close() })
	return &readNote{Conn: conn, end: end}, nil
}

// verify accepts the one host this client is for.
func (c *Client) verify(cs tls.ConnectionState) error {
	host, err := identify(cs)
	if err != nil {
		return err
	}
	if host != c.cfg.Host {
		return &AuthError{Kind: ErrWrongHost, Host: host, Hint: "correct the address: replicactl peer list; replicactl peer address PEER HOST"}
	}
	_, err = verifyPeer(cs, c.cfg.Store, x509.ExtKeyUsageServerAuth, c.cfg.Now())
	return err
}

// Close ends every connection; calls under way fail.
func (c *Client) Close() error {
	c.stop()
	c.control.CloseIdleConnections()
	c.bulk.CloseIdleConnections()
	c.conns.end()
	return nil
}

// Hello implements wire.Service.
func (c *Client) Hello(ctx context.Context, r wire.HelloRequest) (a wire.HelloReply, err error) {
	return a, c.call(ctx, callHello, controlTimeout, r, &a)
}

// Check implements wire.Service.
func (c *Client) Check(ctx context.Context, r wire.CheckRequest) (a wire.CheckReply, err error) {
	return a, c.call(ctx, callCheck, offerTimeout, r, &a)
}

// Offer implements wire.Service.
func (c *Client) Offer(ctx context.Context, r wire.Offer) (a wire.OfferReply, err error) {
	return a, c.call(ctx, callOffer, offerTimeout, r, &a)
}

// Withdraw implements wire.Service.
func (c *Client) Withdraw(ctx context.Context, r wire.Withdraw) error {
	return c.call(ctx, callWithdraw, offerTimeout, r, &nothing{})
}

// Handshake implements wire.Service.
func (c *Client) Handshake(ctx context.Context, r wire.HandshakeRequest) (a wire.HandshakeReply, err error) {
	if err := c.call(ctx, callHandshake, controlTimeout, r, &a); err != nil {
		return wire.HandshakeReply{}, err
	}
	if err := a.Validate(); err != nil {
		return wire.HandshakeReply{}, fmt.Errorf("answer of the other host: %w", err)
	}
	return a, nil
}

// PutSeed implements wire.Service.
func (c *Client) PutSeed(ctx context.Context, r wire.SeedRequest, body io.Reader) (a wire.SeedReply, err error) {
	if err := r.Validate(); err != nil {
		return a, err
	}
	return a, c.put(ctx, callSeed, seedQuery(r), body, &a)
}

// EpochProgress implements wire.Service.
func (c *Client) EpochProgress(ctx context.Context, k wire.EpochKey) (uint32, error) {
	var a progressReply
	err := c.call(ctx, callProgress, controlTimeout, k, &a)
	return a.Chunks, err
}

// PutEpoch implements wire.Service. A position refused by the other side is a
// *wire.Error of KindPosMismatch with Have set.
func (c *Client) PutEpoch(ctx context.Context, k wire.EpochKey, from uint32, body io.Reader) (a delta.Pos, err error) {
	if err := k.Validate(); err != nil {
		return a, err
	}
	return a, c.put(ctx, callEpoch, epochQuery(k, from), body, &a)
}

// Beat implements wire.Service.
func (c *Client) Beat(ctx context.Context, r wire.Beat) error {
	return c.call(ctx, callBeat, controlTimeout, r, &nothing{})
}

// Digests implements wire.Service.
func (c *Client) Digests(ctx context.Context, r wire.DigestRequest) (a wire.DigestReply, err error) {
	if err := c.call(ctx, callDigests, digestTimeout, r, &a); err != nil {
		return wire.DigestReply{}, err
	}
	if len(a.Digests) != len(r.Ranges) {
		return wire.DigestReply{}, &wire.Error{Kind: wire.KindCorrupt, Text: fmt.Sprintf("the other host answered %d digests for %d ranges", len(a.Digests), len(r.Ranges))}
	}
	return a, nil
}

// Status implements wire.Service.
func (c *Client) Status(ctx context.Context, vm wire.VMID) (a wire.PeerVM, err error) {
	return a, c.call(ctx, callStatus, controlTimeout, statusRequest{vm}, &a)
}

// Points implements wire.Service.
func (c *Client) Points(ctx context.Context, vm wire.VMID) (a wire.PointsReply, err error) {
	if err := c.call(ctx, callPoints, controlTimeout, statusRequest{vm}, &a); err != nil {
		return wire.PointsReply{}, err
	}
	if err := a.Validate(); err != nil {
		return wire.PointsReply{}, &wire.Error{Kind: wire.KindCorrupt, Text: "the other host's answer: " + err.Error()}
	}
	return a, nil
}

// Failover implements wire.Service.
func (c *Client) Failover(ctx context.Context, r wire.FailoverRequest) (a wire.FailoverReply, err error) {
	if err := c.call(ctx, callFailover, failoverTimeout, r, &a); err != nil {
		return wire.FailoverReply{}, err
	}
	if err := a.Validate(); err != nil {
		return wire.FailoverReply{}, &wire.Error{Kind: wire.KindCorrupt, Text: "the other host's answer: " + err.Error()}
	}
	return a, nil
}

func (c *Client) call(ctx context.Context, name call, limit time.Duration, q validator, a any) error {
	if err := q.Validate(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return postJSON(ctx, c.control, pathPrefix+string(name), q, a)
}

// put streams a body. The other side says "continue" first, so that a refusal
// costs no transfer.
func (c *Client) put(ctx context.Context, name call, query string, body io.Reader, a any) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	src := &onceReader{r: c.cfg.Bandwidth.Reader(ctx, body)}
	// The caller's reader must not be used any more once we return.
	defer src.end()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://peer"+pathPrefix+string(name)+"?"+query, src)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	req.ContentLength = -1
	req.Header.Set("Content-Type", bulkType)
	req.Header.Set("Expect", "100-continue")
	err = finish(ctx, c.bulk, req, a)
	if rerr := src.failed(); rerr != nil {
		return fmt.Errorf("read the data to send: %w", rerr)
	}
	return err
}

func postJSON(ctx context.Context, t *http.Transport, path string, q, a any) error {
	data, err := json.Marshal(q)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	if len(data) > maxControlRequest {
		return &wire.Error{Kind: wire.KindInvalid, Text: fmt.Sprintf("request of %d bytes, at most %d", len(data), maxControlRequest)}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://peer"+path, bytes.NewReader(data))
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	// All calls are safe to repeat: an idle connection that died is replaced silently.
	req.Header["Idempotency-Key"] = nil
	req.Header.Set("Content-Type", jsonType)
	return finish(ctx, t, req, a)
}

// finish sends req and decodes the answer into a, or into an error.
func finish(ctx context.Context, t *http.Transport, req *http.Request, a any) error {
	rctx, cancel := context.WithCancel(req.Context())
	defer cancel()
	tctx, ended := noted(rctx)
	resp, err := t.RoundTrip(req.WithContext(tctx))
	if err != nil {
		if rerr := ended(); isAlert(rerr) {
			err = rerr
		}
		return transportError(ctx, err)
	}
	defer func() { _ = resp.Body.Close() }()
	// An answer that has begun must end soon, whatever the call's own deadline.
	defer time.AfterFunc(answerTimeout, cancel).Stop()
	body := &io.LimitedReader{R: resp.Body, N: maxControlReply}
	if resp.Header.Get("Content-Type") != jsonType {
		return &wire.Error{Kind: wire.KindCorrupt, Text: fmt.Sprintf("the other host answered %d without JSON", resp.StatusCode)}
	}
	if resp.StatusCode != http.StatusOK {
		return remoteError(body, resp.StatusCode)
	}
	if err := decodeStrict(body, a); err != nil {
		if ctx.Err() != nil || errors.Is(err, io.ErrUnexpectedEOF) && body.N > 0 {
			return transportError(ctx, err)
		}
		return &wire.Error{Kind: wire.KindCorrupt, Text: "answer of the other host: " + wire.CleanText(err.Error(), 200)}
	}
	return nil
}

// remoteError reads the other side's error; its text may be hostile.
func remoteError(body io.Reader, code int) error {
	var e wire.Error
	if err := decodeStrict(body, &e); err != nil || e.Kind < wire.KindInternal || e.Kind > wire.KindSuspect {
		return &wire.Error{Kind: wire.KindCorrupt, Text: fmt.Sprintf("the other host answered %d without a reason", code)}
	}
	e.Text, e.Hint = wire.CleanText(e.Text, wire.MaxText), wire.CleanText(e.Hint, wire.MaxText)
	return &e
}

// transportError makes a *wire.Error of whatever kept a call from its answer.
func transportError(ctx context.Context, err error) error {
	var auth *AuthError
	var ce *callError
	var we *wire.Error
	switch {
	case errors.As(err, &ce):
		return ce
	case errors.As(err, &we):
		return we
	case errors.As(err, &auth):
		return &callError{wire.Error{Kind: wire.KindRefused, Text: auth.Error()}, auth}
	case isAlert(err):
		return refusedByPeer(err.Error())
	case ctx.Err() != nil:
		return unavailable(ctx.Err(), "", "no answer: %s", ctx.Err())
	}
	return unavailable(err, "", "connection to the other host: %s", wire.CleanText(err.Error(), wire.MaxText))
}

func unreachable(address string, err error) error {
	return unavailable(err, "is replicad running there, is the port open? replicactl peer test", "cannot reach %s: %s", address, err)
}

// explainTLS says what a failed handshake means. A refusal by the other side
// arrives as an alert without its reason.
func explainTLS(address string, err error) error {
	var auth *AuthError
	if errors.As(err, &auth) {
		return auth
	}
	text := err.Error()
	switch {
	case isAlert(err) && strings.Contains(text, "application protocol"):
		return noInvitation() // the only protocol that is not always spoken
	case isAlert(err):
		return refusedByPeer(text)
	}
	return unavailable(err, "", "TLS with %s: %s", address, wire.CleanText(text, 200))
}

// isAlert: the other side ended the connection with a TLS alert.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

func refusedByPeer(text string) error {
	return &wire.Error{
		Kind: wire.KindRefused, Text: "the other host does not accept this host's certificate (" + wire.CleanText(text, 200) + ")",
		Hint: "its journal says why; is this host still in its list? replicactl peer list there",
	}
}
