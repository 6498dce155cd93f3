package peer

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"time"

	"kvmreplica/replicad/wire"
)

// DialFunc makes the TCP connection below TLS; tests and tunnels replace it.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// JoinOptions say how this host presents itself and what the inviter will be
// allowed here. The zero value grants nothing.
type JoinOptions struct {
	// Listen is where this host is reached, "host:port" or ":port" (then the
	// inviter takes the address the connection comes from). Empty = not at all.
	Listen string
	Grant  Authorisation
	Dial   DialFunc         // nil = TCP
	Now    func() time.Time // nil = time.Now
}

// Join uses an invitation of the host at address: both hosts prove to each
// other that they know the code, then pin each other. It returns the new
// record, which is durable.
func Join(ctx context.Context, id *Identity, store *Store, address, code string, o JoinOptions) (Record, error) {
	if o.Dial == nil {
		o.Dial = dialTCP
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	key, err := codeKey(code)
	if err != nil {
		return Record{}, &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "make a code on the other host: replicactl peer invite"}
	}
	if err := checkAddress(address); err != nil {
		return Record{}, &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "replicactl peer join HOST[:PORT] CODE"}
	}
	if err := o.Grant.Validate(); err != nil {
		return Record{}, fmt.Errorf("join: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, controlTimeout)
	defer cancel()
	conn, cs, err := dialTLS(ctx, id, address, protoPair, o.Dial, func(cs tls.ConnectionState) error {
		_, err := identify(cs)
		return err
	})
	if err != nil {
		return Record{}, err
	}
	defer func() { _ = conn.Close() }()
	if cs.NegotiatedProtocol != protoPair {
		return Record{}, noInvitation()
	}
	rec, err := exchange(ctx, id, conn, cs, key, o)
	if err != nil {
		return Record{}, err
	}
	rec.Address = address
	return rec, store.Put(rec)
}

func noInvitation() error {
	return &wire.Error{Kind: wire.KindRefused, Text: "that host has no open invitation", Hint: "make one there: replicactl peer invite"}
}

// exchange is the joiner's side on an open connection.
func exchange(ctx context.Context, id *Identity, conn net.Conn, cs tls.ConnectionState, key []byte, o JoinOptions) (Record, error) {
	host, err := identify(cs)
	if err != nil {
		return Record{}, err
	}
	if host == id.Host() {
		return Record{}, refused("", "that is this host itself (or its state was copied)")
	}
	q := pairRequest{Name: id.Name(), Address: o.Listen, Anchor: id.Anchor(), Nonce: make([]byte, nonceSize)}
	if _, err := rand.Read(q.Nonce); err != nil {
		return Record{}, fmt.Errorf("make nonce: %w", err)
	}
	joiner := side{id.Host(), q.Name, id.Leaf(), q.Anchor}
	pre, err := transcript(cs, joiner, side{host: host, leaf: cs.PeerCertificates[0]}, q.Address, q.Nonce)
	if err != nil {
		return Record{}, err
	}
	q.Proof = prove(key, "join", pre)
	var a pairReply
	if err := roundTrip(ctx, conn, pairPath, q, &a); err != nil {
		return Record{}, err
	}
	anchor, err := checkAnchor(cs, a.Anchor, x509.ExtKeyUsageServerAuth, o.Now())
	if err != nil {
		return Record{}, err
	}
	if !wire.ValidText(a.Name, wire.MaxName) || a.Name == "" {
		return Record{}, refused("", "that host's name is not printable text")
	}
	full, err := transcript(cs, joiner, side{host, a.Name, cs.PeerCertificates[0], a.Anchor}, q.Address, q.Nonce)
	if err != nil {
		return Record{}, err
	}
	if !hmac.Equal(prove(key, "invite", full), a.Proof) {
		return Record{}, refused("check the network; make a new code there: replicactl peer invite",
			"the other host does not know the code: somebody stands between the hosts")
	}
	return Record{Host: host, Name: a.Name, Pin: pinOf(anchor), Anchor: a.Anchor, Allow: o.Grant}, nil
}

func dialTCP(ctx context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 4,
	}}
	return d.DialContext(ctx, network, address)
}

// dialTLS connects and finishes the handshake within handshakeTimeout.
func dialTLS(ctx context.Context, id *Identity, address, proto string, dial DialFunc, verify func(tls.ConnectionState) error) (*tls.Conn, tls.ConnectionState, error) {
	raw, err := dial(ctx, "tcp", address)
	if err != nil {
		return nil, tls.ConnectionState{}, unreachable(address, err)
	}
	c := tls.Client(&stallConn{Conn: raw, limit: stallTimeout}, baseTLS(id, proto, verify))
	hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	if err := c.HandshakeContext(hctx); err != nil {
		_ = raw.Close()
		return nil, tls.ConnectionState{}, explainTLS(address, err)
	}
	return c, c.ConnectionState(), nil
}

// roundTrip sends one JSON request over an open connection that is used once.
func roundTrip(ctx context.Context, conn net.Conn, path string, q, a any) error {
	used := false
	t := &http.Transport{
		DisableKeepAlives: true,
		DialTLSContext: func(context.Context, string, string) (net.Conn, error) {
			if used {
				return nil, fmt.Errorf("connection was used already")
			}
			used = true
			return conn, nil
		},
		ResponseHeaderTimeout:  controlTimeout,
		MaxResponseHeaderBytes: maxHeader,
	}
	defer t.CloseIdleConnections()
	return postJSON(ctx, t, path, q, a)
}
