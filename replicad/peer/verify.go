package peer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"kvmreplica/replicad/wire"
)

// Bounds of what a peer may present.
const (
	maxChain    = 4
	maxCertSize = 8 << 10
)

// ALPN names. The second one reaches nothing but the pairing exchange.
const (
	protoMain = "http/1.1"
	protoPair = "kvmreplica-pair/1"
)

// Errors of authentication. Test with errors.Is.
var (
	ErrUnknownPeer = errors.New("the host is not paired with this one")
	ErrRemovedPeer = errors.New("the host was removed here")
	ErrNoIdentity  = errors.New("the certificate carries no host identity")
	ErrWrongCA     = errors.New("the certificate is not signed by the authority that was pinned at pairing")
	ErrExpired     = errors.New("the certificate has expired")
	ErrNotYetValid = errors.New("the certificate is not valid yet")
	ErrWrongUse    = errors.New("the certificate may not be used for this")
	ErrWrongHost   = errors.New("another host answered")
	ErrTooBig      = errors.New("the certificate chain is too long")
)

// AuthError says why a certificate was not accepted.
type AuthError struct {
	Kind   error // one of the errors above
	Host   wire.HostID
	Detail string
	Hint   string
}

func (e *AuthError) Error() string {
	s := e.Kind.Error()
	if e.Host != "" {
		s += " (host " + string(e.Host) + ")"
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Hint != "" {
		s += " (" + e.Hint + ")"
	}
	return s
}

func (e *AuthError) Unwrap() error { return e.Kind }

// identify checks the form of a presented chain and reads its identity. It
// proves nothing yet.
func identify(cs tls.ConnectionState) (wire.HostID, error) {
	if cs.Version != tls.VersionTLS13 {
		return "", &AuthError{Kind: ErrWrongUse, Detail: "only TLS 1.3 is spoken"}
	}
	chain := cs.PeerCertificates
	if len(chain) == 0 {
		return "", &AuthError{Kind: ErrNoIdentity, Detail: "no certificate was presented"}
	}
	if len(chain) > maxChain {
		return "", &AuthError{Kind: ErrTooBig, Detail: fmt.Sprintf("%d certificates, at most %d", len(chain), maxChain)}
	}
	for _, c := range chain {
		if len(c.Raw) > maxCertSize {
			return "", &AuthError{Kind: ErrTooBig, Detail: fmt.Sprintf("a certificate of %d bytes, at most %d", len(c.Raw), maxCertSize)}
		}
	}
	host, err := hostOf(chain[0])
	if err != nil {
		return "", &AuthError{Kind: ErrNoIdentity, Detail: err.Error()}
	}
	return host, nil
}

// verifyChain proves that chain[0] was signed by the pinned authority, is
// valid now and may be used as use. anchor may be nil; then the authority's
// certificate must be among the presented ones.
func verifyChain(chain []*x509.Certificate, pin Pin, anchor *x509.Certificate, use x509.ExtKeyUsage, now time.Time) error {
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	found := false
	for _, c := range append(slices.Clone(chain[1:]), anchor) {
		switch {
		case c == nil:
		case c.IsCA && pinOf(c) == pin:
			roots.AddCert(c)
			found = true
		default:
			inter.AddCert(c)
		}
	}
	if !found {
		return &AuthError{Kind: ErrWrongCA, Hint: "pair the hosts again: replicactl peer invite"}
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use},
	})
	return explain(err, chain[0], use, now)
}

// explain turns the library's verdict into one of our errors.
func explain(err error, leaf *x509.Certificate, use x509.ExtKeyUsage, now time.Time) error {
	if err == nil {
		return nil
	}
	host, _ := hostOf(leaf)
	var bad x509.CertificateInvalidError
	switch {
	case errors.As(err, &bad) && bad.Reason == x509.Expired && now.Before(bad.Cert.NotBefore):
		return &AuthError{
			Kind: ErrNotYetValid, Host: host,
			Detail: "valid from " + bad.Cert.NotBefore.UTC().Format(time.RFC3339) + ", it is " + now.UTC().Format(time.RFC3339),
			Hint:   "compare the two hosts' clocks",
		}
	case errors.As(err, &bad) && bad.Reason == x509.Expired:
		return &AuthError{
			Kind: ErrExpired, Host: host,
			Detail: "it ended " + bad.Cert.NotAfter.UTC().Format(time.RFC3339) + ", it is " + now.UTC().Format(time.RFC3339),
			Hint:   "renew it on that host (restart replicad there, or replace its certificate files)",
		}
	case errors.As(err, &bad) && bad.Reason == x509.IncompatibleUsage:
		what := "serve"
		if use == x509.ExtKeyUsageClientAuth {
			what = "call"
		}
		return &AuthError{
			Kind: ErrWrongUse, Host: host, Detail: "its extended key usage does not let it " + what,
			Hint: "it needs both serverAuth and clientAuth",
		}
	}
	return &AuthError{Kind: ErrWrongCA, Host: host, Detail: err.Error(), Hint: "pair the hosts again: replicactl peer invite"}
}

// verifyPeer is the whole check of a connection's other side: identity, entry
// in the Store, pinned authority, dates, usage. It runs on every handshake.
func verifyPeer(cs tls.ConnectionState, store *Store, use x509.ExtKeyUsage, now time.Time) (Record, error) {
	host, err := identify(cs)
	if err != nil {
		return Record{}, err
	}
	rec, err := store.trusted(host)
	if err != nil {
		return Record{}, err
	}
	if err := verifyChain(cs.PeerCertificates, rec.Pin, rec.anchor(), use, now); err != nil {
		return Record{}, err
	}
	return rec, nil
}

// baseTLS is what both directions share. A fresh value per use; configurations
// are never changed once they serve. Verification is entirely ours (verify is
// called on every connection, resumed ones included), since the names in
// our certificates are host ids, not DNS names.
func baseTLS(id *Identity, proto string, verify func(tls.ConnectionState) error) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{proto},
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // replaced by VerifyConnection, which is never nil
		VerifyConnection:       verify,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return id.leaf.Load(), nil },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return id.leaf.Load(), nil },
	}
}
