package peer

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/wire"
)

// forge is a certificate for host h, signed by h's own authority unless change
// says otherwise.
type forgery struct {
	template *x509.Certificate
	parent   *x509.Certificate
	key      *ecdsa.PrivateKey // of the authority
	extra    [][]byte          // further certificates presented
}

func forge(t *testing.T, h *host, change func(*forgery)) *Identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	f := &forgery{
		template: &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: uriPrefix + string(h.id.Host())},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			URIs:        []*url.URL{hostURI(h.id.Host())},
		},
		parent: h.id.anchor, key: h.id.caKey.(*ecdsa.PrivateKey),
	}
	f.extra = [][]byte{h.id.anchor.Raw}
	change(f)
	if f.parent == nil { // self-signed
		f.parent, f.key = f.template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, f.template, f.parent, key.Public(), f.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	id := &Identity{host: h.id.host, name: h.id.name, anchor: h.id.anchor}
	id.leaf.Store(&tls.Certificate{Certificate: append([][]byte{der}, f.extra...), PrivateKey: key, Leaf: leaf})
	return id
}

func badCertificates(t *testing.T, h *host) map[string]struct {
	id   *Identity
	want error
} {
	t.Helper()
	stranger := newHost(t, "stranger")
	type bad = struct {
		id   *Identity
		want error
	}
	now := time.Now()
	return map[string]bad{
		"expired":       {forge(t, h, func(f *forgery) { f.template.NotAfter = now.Add(-time.Minute) }), ErrExpired},
		"not yet valid": {forge(t, h, func(f *forgery) { f.template.NotBefore = now.Add(time.Minute) }), ErrNotYetValid},
		"self-signed":   {forge(t, h, func(f *forgery) { f.parent = nil }), ErrWrongCA},
		"wrong authority": {forge(t, h, func(f *forgery) {
			f.parent, f.key, f.extra = stranger.id.anchor, stranger.id.caKey.(*ecdsa.PrivateKey), [][]byte{stranger.id.anchor.Raw}
		}), ErrWrongCA},
		"wrong authority shown with the pinned one": {forge(t, h, func(f *forgery) {
			f.parent, f.key = stranger.id.anchor, stranger.id.caKey.(*ecdsa.PrivateKey)
			f.extra = [][]byte{h.id.anchor.Raw, stranger.id.anchor.Raw}
		}), ErrWrongCA},
		"neither use":      {forge(t, h, func(f *forgery) { f.template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} }), ErrWrongUse},
		"common name only": {forge(t, h, func(f *forgery) { f.template.URIs = nil }), ErrNoIdentity},
		"two identities": {forge(t, h, func(f *forgery) {
			f.template.URIs = append(f.template.URIs, hostURI(stranger.id.Host()))
		}), ErrNoIdentity},
		"identity in upper case": {forge(t, h, func(f *forgery) {
			f.template.URIs = []*url.URL{hostURI(wire.HostID(strings.ToUpper(string(h.id.Host()))))}
		}), ErrNoIdentity},
		"a leaf of the leaf": {leafOfLeaf(t, h), ErrWrongCA},
		"ten thousand names": {forge(t, h, func(f *forgery) {
			for range 3000 {
				f.template.DNSNames = append(f.template.DNSNames, "a.example")
			}
		}), ErrTooBig},
		"long chain": {forge(t, h, func(f *forgery) {
			for range 10 {
				f.extra = append(f.extra, stranger.id.anchor.Raw)
			}
		}), ErrTooBig},
		"right authority, other host": {forge(t, h, func(f *forgery) { f.template.URIs = []*url.URL{hostURI(stranger.id.Host())} }), ErrUnknownPeer},
	}
}

// leafOfLeaf: an honest leaf's key signs another certificate.
func leafOfLeaf(t *testing.T, h *host) *Identity {
	t.Helper()
	return forge(t, h, func(f *forgery) {
		pair := h.id.leaf.Load()
		f.parent, f.key = pair.Leaf, pair.PrivateKey.(*ecdsa.PrivateKey)
		f.extra = [][]byte{pair.Leaf.Raw, h.id.anchor.Raw}
	})
}

// logged collects a server's log.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func TestServerRefusesEveryBadCertificateAndSaysWhyInItsLog(t *testing.T) {
	p := newHost(t, "primary")
	for name, bad := range badCertificates(t, p) {
		t.Run(name, func(t *testing.T) {
			log := &logged{}
			r := newHost(t, "replica")
			r.serve(t, func(c *ServerConfig) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
			r.trust(t, p, all())
			r.own.set(vmA, Relation{Peer: p.id.Host(), Receives: true})
			q := newHostAs(t, bad.id)
			q.trust(t, r, Authorisation{})
			_, err := q.client(t, r).Status(soon(t), vmA)
			if kindOf(err) != wire.KindRefused {
				t.Errorf("caller learnt: %v", err)
			}
			if r.svc.count() != 0 {
				t.Error("the call reached the service")
			}
			if !strings.Contains(log.String(), bad.want.Error()) {
				t.Errorf("log does not say %q: %s", bad.want, log)
			}
		})
	}
}

func TestClientRefusesEveryBadCertificate(t *testing.T) {
	r := newHost(t, "replica")
	for name, bad := range badCertificates(t, r) {
		t.Run(name, func(t *testing.T) {
			p, q := newHost(t, "primary"), newHostAs(t, bad.id)
			q.serve(t)
			q.trust(t, p, all())
			r.addr = q.addr
			p.trust(t, r, Authorisation{})
			_, err := p.client(t, r).Status(soon(t), vmA)
			want := bad.want
			if errors.Is(want, ErrUnknownPeer) {
				want = ErrWrongHost
			}
			if !errors.Is(err, want) || kindOf(err) != wire.KindRefused {
				t.Errorf("got %v, want %v", err, want)
			}
			if q.svc.count() != 0 {
				t.Error("the call reached the service")
			}
		})
	}
}

func TestOneUseOnlyServesOneDirection(t *testing.T) {
	only := func(use x509.ExtKeyUsage) func(*forgery) {
		return func(f *forgery) { f.template.ExtKeyUsage = []x509.ExtKeyUsage{use} }
	}
	r, p := newHost(t, "replica"), newHost(t, "primary")
	r.serve(t)
	r.trust(t, p, all())
	q := newHostAs(t, forge(t, p, only(x509.ExtKeyUsageServerAuth)))
	q.trust(t, r, Authorisation{})
	if _, err := q.client(t, r).Hello(soon(t), wire.HelloRequest{Min: 1, Max: 1}); kindOf(err) != wire.KindRefused {
		t.Errorf("a server certificate called: %v", err)
	}
	s := newHostAs(t, forge(t, r, only(x509.ExtKeyUsageClientAuth)))
	s.serve(t)
	s.trust(t, p, all())
	r.addr = s.addr
	p.trust(t, r, Authorisation{})
	if _, err := p.client(t, r).Hello(soon(t), wire.HelloRequest{Min: 1, Max: 1}); !errors.Is(err, ErrWrongUse) {
		t.Errorf("a client certificate served: %v", err)
	}
}

func TestNoCertificateOldTLSAndResumptionAreRefused(t *testing.T) {
	p, r, c := pairOf(t)
	if _, err := c.Hello(soon(t), wire.HelloRequest{Min: 1, Max: 1}); err != nil {
		t.Fatal(err)
	}
	before := r.svc.count()
	try := func(change func(*tls.Config)) error {
		cfg := baseTLS(p.id, protoMain, func(tls.ConnectionState) error { return nil })
		change(cfg)
		conn, err := tls.Dial("tcp", r.addr, cfg)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := conn.Write([]byte("POST /v1/hello HTTP/1.1\r\nHost: peer\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{\"Min\":1,\"Max\":1}\n")); err != nil {
			return err
		}
		n, err := conn.Read(make([]byte, 1))
		if n == 1 {
			return nil
		}
		return err
	}
	if err := try(func(*tls.Config) {}); err != nil {
		t.Fatalf("the honest form fails: %v", err)
	}
	cache := tls.NewLRUClientSessionCache(4)
	for name, change := range map[string]func(*tls.Config){
		"no certificate":                func(c *tls.Config) { c.GetClientCertificate = nil },
		"TLS 1.2":                       func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		"no protocol":                   func(c *tls.Config) { c.NextProtos = nil },
		"HTTP/2":                        func(c *tls.Config) { c.NextProtos = []string{"h2"} },
		"pairing without an invitation": func(c *tls.Config) { c.NextProtos = []string{protoPair} },
	} {
		if err := try(change); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for range 2 {
		if err := try(func(c *tls.Config) { c.ClientSessionCache = cache; c.ServerName = "peer" }); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := cache.Get("peer"); ok {
		t.Error("the server handed out a session ticket")
	}
	if n := r.svc.count(); n != before+3 {
		t.Errorf("%d calls reached the service, want 3", n-before)
	}
}

func TestRotationNeedsNoNewPairing(t *testing.T) {
	p, r, _ := pairOf(t)
	old := p.id.Leaf()
	for _, h := range []*host{p, r} {
		if err := h.id.Rotate(time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if p.id.Leaf().Equal(old) {
		t.Fatal("nothing rotated")
	}
	if _, err := p.client(t, r).Status(soon(t), vmA); err != nil {
		t.Fatal(err)
	}
}

func TestIdentitySurvivesRestartAndRenewsInTime(t *testing.T) {
	dir, now := fsxtest.NewMem(), time.Now()
	a, err := OpenIdentity(dir, "a", now)
	if err != nil {
		t.Fatal(err)
	}
	b, err := OpenIdentity(dir, "a", now.Add(leafLife-renewBefore-48*time.Hour))
	if err != nil || b.Host() != a.Host() || b.Pin() != a.Pin() || !b.Leaf().Equal(a.Leaf()) {
		t.Fatalf("reopened: %v, %v", b, err)
	}
	c, err := OpenIdentity(dir, "a", now.Add(leafLife))
	if err != nil || c.Pin() != a.Pin() || c.Leaf().Equal(a.Leaf()) {
		t.Fatalf("an ended leaf was kept: %v", err)
	}
	if done, err := a.Renew(now); done || err != nil {
		t.Fatalf("renewed too early: %v", err)
	}
	if done, err := a.Renew(now.Add(leafLife - renewBefore)); !done || err != nil {
		t.Fatalf("not renewed 60 days before the end: %v", err)
	}
}

func TestExpiryIsToldThirtySevenAndOneDayBefore(t *testing.T) {
	end := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		left     time.Duration
		soon     bool
		severity string
		days     int
	}{
		{31 * 24 * time.Hour, false, "info", 31},
		{30 * 24 * time.Hour, true, "info", 30},
		{8 * 24 * time.Hour, true, "info", 8},
		{7 * 24 * time.Hour, true, "warning", 7},
		{25 * time.Hour, true, "warning", 1},
		{24 * time.Hour, true, "critical", 1},
		{time.Minute, true, "critical", 0},
		{-time.Minute, true, "critical", -1},
		{-25 * time.Hour, true, "critical", -2},
	} {
		e, soon := expiry("x", end, end.Add(-c.left))
		if soon != c.soon || e.Severity != c.severity || e.Days != c.days {
			t.Errorf("%v left: %v %+v", c.left, soon, e)
		}
	}
	h := newHost(t, "a")
	if got := h.id.Expiries(h.id.Leaf().NotAfter.Add(-time.Hour)); len(got) != 1 || got[0].Severity != "critical" || got[0].Hint == "" {
		t.Errorf("%+v", got)
	}
}

func TestBringYourOwnCertificate(t *testing.T) {
	owner := newHost(t, "owner")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := wire.HostID("12345678-1234-4234-8234-123456789abc")
	issue := func(change func(*x509.Certificate)) (cert, keyPEM []byte) {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(5), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, URIs: []*url.URL{hostURI(id)},
		}
		change(c)
		der, err := x509.CreateCertificate(rand.Reader, c, owner.id.anchor, key.Public(), owner.id.caKey)
		if err != nil {
			t.Fatal(err)
		}
		keyPEM, err = encodeKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return encodeCerts(der), keyPEM
	}
	bundle := encodeCerts(newHost(t, "x").id.Anchor(), owner.id.Anchor())
	cert, keyPEM := issue(func(*x509.Certificate) {})
	own, err := LoadIdentity(cert, keyPEM, bundle, "own", time.Now())
	if err != nil || own.Host() != id || own.Pin() != owner.id.Pin() {
		t.Fatalf("%v, %v", own, err)
	}
	if _, err := own.Renew(time.Now().Add(time.Hour)); err != nil || own.Rotate(time.Now()) == nil {
		t.Error("files made elsewhere are not ours to renew")
	}
	p, r := newHostAs(t, own), newHost(t, "replica")
	r.serve(t)
	r.trust(t, p, all())
	p.trust(t, r, Authorisation{})
	if _, err := p.client(t, r).Hello(soon(t), wire.HelloRequest{Min: 1, Max: 1}); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		bundle []byte
		want   error
	}{
		"client use only": {func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }, bundle, ErrWrongUse},
		"expired":         {func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, bundle, ErrExpired},
		"foreign bundle":  {func(*x509.Certificate) {}, encodeCerts(r.id.Anchor()), ErrWrongCA},
	} {
		cert, keyPEM := issue(c.change)
		if _, err := LoadIdentity(cert, keyPEM, c.bundle, "own", time.Now()); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestRemovalEndsLiveConnectionsAndTheirCalls(t *testing.T) {
	p, r, c := pairOf(t)
	started := make(chan struct{})
	r.svc.put = func(ctx context.Context, _ io.Reader) error {
		close(started)
		<-ctx.Done()
		return ctx.Err()
	}
	failed := make(chan error, 1)
	ctx := soon(t)
	go func() {
		_, err := c.PutEpoch(ctx, key(), 0, bytes.NewReader([]byte("x")))
		failed <- err
	}()
	<-started
	if err := r.store.Remove(p.id.Host()); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err == nil || ctx.Err() != nil {
		t.Fatalf("the call went on: %v", err)
	}
	n := r.svc.count()
	if _, err := c.Status(soon(t), vmA); kindOf(err) != wire.KindRefused {
		t.Fatalf("after removal: %v", err)
	}
	if r.svc.count() != n {
		t.Fatal("a removed host's call reached the service")
	}
}

func TestRemovalAtTheCallerEndsItsConnectionsToo(t *testing.T) {
	p, r, c := pairOf(t)
	if _, err := c.Status(soon(t), vmA); err != nil {
		t.Fatal(err)
	}
	if err := p.store.Remove(r.id.Host()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Status(soon(t), vmA); !errors.Is(err, ErrRemovedPeer) || kindOf(err) != wire.KindRefused {
		t.Fatalf("got %v", err)
	}
}

// A host that moved: what hangs on a connection to where it was ends at once, and
// the next call goes to where it is. Other changes of the record end nothing.
func TestAnotherAddressEndsTheConnectionsToTheOldOne(t *testing.T) {
	p, r, c := pairOf(t)
	started := make(chan struct{}, 1)
	r.svc.put = func(ctx context.Context, _ io.Reader) error {
		started <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	failed := make(chan error, 1)
	ctx := soon(t)
	go func() {
		_, err := c.PutEpoch(ctx, key(), 0, bytes.NewReader([]byte("x")))
		failed <- err
	}()
	<-started
	errFatal(t, p.store.Allow(r.id.Host(), all()))
	if _, err := c.Status(soon(t), vmA); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-failed:
		t.Fatalf("a change of rights ended a transfer: %v", err)
	default:
	}
	old := r.addr
	r.serve(t) // the same host, elsewhere
	errFatal(t, p.store.SetAddress(r.id.Host(), r.addr))
	if err := <-failed; err == nil || ctx.Err() != nil {
		t.Fatalf("the transfer to %s went on: %v", old, err)
	}
	r.svc.put = nil
	if _, err := c.Status(soon(t), vmA); err != nil {
		t.Fatalf("at its new address: %v", err)
	}
}

// An open connection, in the middle of a transfer, ends with the certificate of
// either side.
func TestAConnectionEndsWithItsCertificate(t *testing.T) {
	brief := func(f *forgery) { f.template.NotAfter = time.Now().Add(2 * time.Second) }
	for name, c := range map[string]struct {
		caller, server bool // whose certificate is brief
	}{"caller's": {caller: true}, "server's": {server: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, r := newHost(t, "primary"), newHost(t, "replica")
			if c.caller {
				p = newHostAs(t, forge(t, p, brief))
			}
			if c.server {
				r = newHostAs(t, forge(t, r, brief))
			}
			r.serve(t)
			r.trust(t, p, all())
			p.trust(t, r, Authorisation{})
			r.own.set(vmA, Relation{Peer: p.id.Host(), Receives: true})
			started := make(chan struct{})
			r.svc.put = func(ctx context.Context, _ io.Reader) error {
				close(started)
				<-ctx.Done()
				return ctx.Err()
			}
			cl, failed, ctx := p.client(t, r), make(chan error, 1), soon(t)
			go func() {
				_, err := cl.PutEpoch(ctx, key(), 0, bytes.NewReader([]byte("x")))
				failed <- err
			}()
			<-started
			if err := <-failed; err == nil || ctx.Err() != nil {
				t.Fatalf("the transfer went on: %v", err)
			}
			if _, err := cl.Status(soon(t), vmA); kindOf(err) != wire.KindRefused {
				t.Fatalf("afterwards: %v", err)
			}
		})
	}
}
