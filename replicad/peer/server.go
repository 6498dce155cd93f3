package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"kvmreplica/replicad/wire"
)

// Relation is what this host knows about a VM it shares with a peer.
type Relation struct {
	// Peer is the other host of the relationship.
	Peer wire.HostID
	// Receives says that this host holds, or is being sent, the replica. Only
	// then may the peer send data for the VM.
	Receives bool
}

// Usage is what a peer's VMs hold on this host.
type Usage struct {
	VMs   int
	Bytes int64 // sum of the disks' sizes
}

// Ownership is asked before every call about a VM. It must answer from memory.
type Ownership interface {
	// Relation returns the relationship of vm; ok is false when there is none.
	Relation(vm wire.VMID) (r Relation, ok bool)
	// Usage sums what host holds here, without the VM except.
	Usage(host wire.HostID, except wire.VMID) Usage
}

// ServerConfig is what a Server needs. Identity, Store, Service and Ownership
// must be set.
type ServerConfig struct {
	Identity  *Identity
	Store     *Store
	Service   wire.Service
	Ownership Ownership
	// Pairing answers joins; nil = this server never pairs.
	Pairing *Pairing
	// Receiving says whether this host takes replicas at all; nil = no.
	Receiving func() bool
	Limits    Limits
	Log       *slog.Logger
	// Now is the clock for certificates; nil = time.Now.
	Now func() time.Time
}

// Server offers a wire.Service to paired hosts.
type Server struct {
	cfg    ServerConfig
	conns  *conns
	offers chan struct{} // one Offer at a time, so that quotas hold

	mu    sync.Mutex
	bands map[wire.HostID]*Bandwidth // guarded by mu
	bulk  map[wire.HostID]int        // seeds and epochs under way; guarded by mu

	strangers onceIn // limits the log of refused handshakes
}

// NewServer checks cfg.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Identity == nil || cfg.Store == nil || cfg.Service == nil || cfg.Ownership == nil {
		return nil, errors.New("peer server: identity, store, service and ownership are needed")
	}
	if cfg.Receiving == nil {
		cfg.Receiving = func() bool { return false }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Limits = cfg.Limits.withDefaults()
	return &Server{
		cfg: cfg, conns: newConns(cfg.Limits), offers: make(chan struct{}, 1),
		bands: map[wire.HostID]*Bandwidth{}, bulk: map[wire.HostID]int{},
	}, nil
}

// Serve accepts connections from l until ctx ends, then closes every
// connection, waits for its handlers and returns nil. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := s.cfg.Store.Watch(s.recordChanged)
	defer stop()
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	var handlers sync.WaitGroup
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handlers.Add(1)
			defer handlers.Done()
			s.serveOne(w, r)
		}),
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){
			protoPair: func(_ *http.Server, c *tls.Conn, _ http.Handler) {
				handlers.Add(1)
				defer handlers.Done()
				s.servePairing(c)
			},
		},
		ReadHeaderTimeout:            s.cfg.Limits.Handshake,
		IdleTimeout:                  idleTimeout,
		MaxHeaderBytes:               maxHeader,
		BaseContext:                  func(net.Listener) context.Context { return inner },
		ErrorLog:                     slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		DisableGeneralOptionsHandler: true,
	}
	end := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer end()
	err := srv.Serve(&listener{Listener: l, server: s})
	cancel()
	_ = srv.Close()
	handlers.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve peers on %s: %w", l.Addr(), err)
}

// listener admits connections and puts TLS on them.
type listener struct {
	net.Listener
	server *Server
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c, err := l.server.conns.admit(raw)
		if err != nil {
			continue
		}
		return tls.Server(c, l.server.tlsFor(c)), nil
	}
}

// tlsFor is the configuration of one connection. It offers pairing only while
// an invitation is open.
func (s *Server) tlsFor(c *conn) *tls.Config {
	cfg := baseTLS(s.cfg.Identity, protoMain, func(cs tls.ConnectionState) error {
		return s.verify(c, cs)
	})
	if s.cfg.Pairing != nil && s.cfg.Pairing.open() {
		cfg.NextProtos = append(cfg.NextProtos, protoPair)
	}
	return cfg
}

func (s *Server) verify(c *conn, cs tls.ConnectionState) error {
	if cs.NegotiatedProtocol == protoPair {
		// Whoever it is must only know the code; the pairing exchange decides.
		_, err := identify(cs)
		return err
	}
	rec, err := verifyPeer(cs, s.cfg.Store, x509.ExtKeyUsageClientAuth, s.cfg.Now())
	if err == nil && cs.NegotiatedProtocol != protoMain {
		err = &AuthError{Kind: ErrWrongUse, Host: rec.Host, Detail: "no common protocol"}
	}
	if err == nil {
		err = s.conns.authenticated(c, rec.Host, cs.PeerCertificates[0].NotAfter.Sub(s.cfg.Now()))
	}
	if err == nil {
		// Removed between the two steps: recordChanged did not see c.
		_, err = s.cfg.Store.trusted(rec.Host)
	}
	c.refused.Store(err != nil)
	if err != nil && s.strangers.due(c.source, s.cfg.Now()) {
		s.cfg.Log.Warn("peer connection refused", "address", c.source, "reason", wire.CleanText(err.Error(), wire.MaxText))
	}
	return err
}

// recordChanged follows the Store: a removed host's connections end now.
func (s *Server) recordChanged(h wire.HostID) {
	rec, ok := s.cfg.Store.Get(h)
	if !ok {
		s.conns.closeOf(h)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.bands[h]; b != nil && b.Get() != rec.Allow.Bandwidth {
		b.Set(rec.Allow.Bandwidth)
	}
}

// band is the budget of what host may send here.
func (s *Server) band(rec Record) *Bandwidth {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.bands[rec.Host]
	if b == nil {
		b = &Bandwidth{}
		b.Set(rec.Allow.Bandwidth)
		s.bands[rec.Host] = b
	}
	return b
}

// beginBulk takes one of the host's places for seeds and epochs.
func (s *Server) beginBulk(h wire.HostID) (end func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bulk[h] >= s.cfg.Limits.BulkPerPeer {
		return nil, &wire.Error{Kind: wire.KindUnavailable, Text: fmt.Sprintf("%d transfers of this host are under way already", s.bulk[h])}
	}
	s.bulk[h]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.bulk[h]--; s.bulk[h] == 0 {
			delete(s.bulk, h)
		}
	}, nil
}

// onceIn lets one event per key through every minute, and forgets old keys.
type onceIn struct {
	mu   sync.Mutex
	last map[string]time.Time // guarded by mu
}

const (
	logEvery = time.Minute
	logKeys  = 256
)

func (o *onceIn) due(key string, now time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.last == nil || len(o.last) >= logKeys {
		o.last = map[string]time.Time{}
	}
	if t, ok := o.last[key]; ok && now.Sub(t) < logEvery {
		return false
	}
	o.last[key] = now
	return true
}
