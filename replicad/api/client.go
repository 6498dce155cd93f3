package api

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

	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// DefaultSocket is where the daemon listens.
const DefaultSocket = "/run/replicad/control.sock"

// maxReply bounds what a client reads of one answer or event.
const maxReply = 16 << 20

// Client talks to a daemon. Safe for concurrent use.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the daemon at socket; it does not connect yet.
func NewClient(socket string) *Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	return &Client{socket: socket, http: &http.Client{Transport: tr}}
}

// Host returns the daemon's own state.
func (c *Client) Host(ctx context.Context) (v status.Host, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/host", nil, &v)
}

// VMs lists all VMs with a relationship on this host.
func (c *Client) VMs(ctx context.Context) (v []status.VM, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/vms", nil, &v)
}

// VM returns one VM by name or UUID.
func (c *Client) VM(ctx context.Context, name string) (v status.VM, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/vms/"+url.PathEscape(name), nil, &v)
}

// Policies returns the host's policies and all its domains.
func (c *Client) Policies(ctx context.Context) (v status.Policies, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/policies", nil, &v)
}

// Points lists a VM's recovery points, wherever they are kept.
func (c *Client) Points(ctx context.Context, name string) (v wire.PointsReply, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/vms/"+url.PathEscape(name)+"/points", nil, &v)
}

// Statistics returns a VM's measurements.
func (c *Client) Statistics(ctx context.Context, name string) (v Statistics, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/vms/"+url.PathEscape(name)+"/statistics", nil, &v)
}

// Mounts lists the recovery points that are mounted on this host.
func (c *Client) Mounts(ctx context.Context) (v []status.Mount, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/mounts", nil, &v)
}

// Drills lists the kept reports of a VM's drills, oldest first.
func (c *Client) Drills(ctx context.Context, name string) (v []status.Drill, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/vms/"+url.PathEscape(name)+"/drills", nil, &v)
}

// DrillReport returns one of them as text; empty when = the newest.
func (c *Client) DrillReport(ctx context.Context, name, when string) (v Text, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/vms/"+url.PathEscape(name)+"/drills/report?when="+url.QueryEscape(when), nil, &v)
}

// Peers lists paired hosts.
func (c *Client) Peers(ctx context.Context) (v []status.Peer, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/peers", nil, &v)
}

// Doctor runs the host's checks.
func (c *Client) Doctor(ctx context.Context) (v []wire.Check, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/doctor", nil, &v)
}

// Stacks returns what every goroutine of the daemon does.
func (c *Client) Stacks(ctx context.Context) (v Text, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/stacks", nil, &v)
}

// Invite prepares one pairing.
func (c *Client) Invite(ctx context.Context, r InviteRequest) (v InviteReply, err error) {
	return v, c.call(ctx, http.MethodPost, "/v1/peers/invite", r, &v)
}

// Join pairs with the host that made the invitation.
func (c *Client) Join(ctx context.Context, r JoinRequest) (v status.Peer, err error) {
	return v, c.call(ctx, http.MethodPost, "/v1/peers/join", r, &v)
}

// Allow changes a peer's rights on this host.
func (c *Client) Allow(ctx context.Context, r AllowRequest) error {
	return c.call(ctx, http.MethodPost, "/v1/peers/allow", r, nil)
}

// RemovePeer forgets a peer and ends its connections.
func (c *Client) RemovePeer(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/v1/peers/"+url.PathEscape(name), nil, nil)
}

// Act runs an action and calls event for each line until it ends. The action's
// own failure comes back as *wire.Error.
func (c *Client) Act(ctx context.Context, a Action, event func(Event)) error {
	resp, err := c.send(ctx, http.MethodPost, "/v1/actions", a)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	d := json.NewDecoder(resp.Body)
	for {
		var e Event
		if err := d.Decode(&e); err != nil {
			return &wire.Error{Kind: wire.KindUnavailable, Text: "the daemon went away during the action: " + err.Error(), Hint: "see what it reached: replicactl vm status " + a.VM}
		}
		if e.Done {
			if e.Error != nil {
				return e.Error
			}
			return nil
		}
		event(e)
	}
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.send(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(out); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return nil
}

// ErrNoDaemon says that nobody answers on the socket.
var ErrNoDaemon = errors.New("the daemon does not answer")

func (c *Client) send(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://replicad"+path, body)
	if err != nil {
		return nil, fmt.Errorf("build the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		var ne *net.OpError
		if errors.As(err, &ne) {
			return nil, fmt.Errorf("%w on %s: %w", ErrNoDaemon, c.socket, ne.Err)
		}
		return nil, fmt.Errorf("%w on %s: %w", ErrNoDaemon, c.socket, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var e wire.Error
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(&e); err != nil || e.Text == "" {
		return nil, fmt.Errorf("the daemon answered %s", resp.Status)
	}
	return nil, &e
}
