package peer

import (
	"bufio"
	"bytes"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kvmreplica/replicad/wire"
)

// The pairing code: 15 random base-32 digits (75 bits) and a check digit that
// catches slips of the finger, written in groups of four.
const (
	codeAlphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ" // without I, L, O, U
	codeSecret   = 15
	codeLength   = codeSecret + 1
	codeGroup    = 4
)

// Life of an invitation.
const (
	DefaultInviteTTL = 15 * time.Minute
	maxInviteTTL     = 24 * time.Hour
	maxInvites       = 8
	maxWrongCodes    = 10
	pairEvery        = time.Second // one attempt per second over all callers,
	pairBurst        = 5           // after this many
)

const (
	exporterLabel = "EXPORTER-kvmreplica-pairing-1"
	nonceSize     = 16
	maxPairBody   = 16 << 10
)

// InviteOptions say what the joining host will be allowed. The zero value
// grants nothing and lives DefaultInviteTTL.
type InviteOptions struct {
	TTL   time.Duration
	Grant Authorisation
}

// Invitation is what the operator carries to the other host.
type Invitation struct {
	Code    string
	Expires time.Time
}

// Pairing keeps the open invitations of a host. They live in memory only: a
// restart closes them. Safe for concurrent use.
type Pairing struct {
	id    *Identity
	store *Store
	log   *slog.Logger
	now   func() time.Time
	pace  *rate.Limiter

	mu      sync.Mutex
	invites []*invite // guarded by mu
}

type invite struct {
	key     []byte
	expires time.Time
	grant   Authorisation
	wrong   int
}

// NewPairing starts without invitations. now nil means time.Now, log nil none.
func NewPairing(id *Identity, store *Store, log *slog.Logger, now func() time.Time) *Pairing {
	if now == nil {
		now = time.Now
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Pairing{id: id, store: store, log: log, now: now, pace: rate.NewLimiter(rate.Every(pairEvery), pairBurst)}
}

// Invite makes a code that one host may use once.
func (p *Pairing) Invite(o InviteOptions) (Invitation, error) {
	if o.TTL == 0 {
		o.TTL = DefaultInviteTTL
	}
	if o.TTL < 0 || o.TTL > maxInviteTTL {
		return Invitation{}, fmt.Errorf("an invitation lives at most %v", maxInviteTTL)
	}
	if err := o.Grant.Validate(); err != nil {
		return Invitation{}, fmt.Errorf("invite: %w", err)
	}
	code, err := newCode()
	if err != nil {
		return Invitation{}, err
	}
	key, err := codeKey(code)
	if err != nil {
		return Invitation{}, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prune()
	if len(p.invites) >= maxInvites {
		return Invitation{}, &wire.Error{Kind: wire.KindConflict, Text: fmt.Sprintf("%d invitations are open already", maxInvites), Hint: "wait until one expires"}
	}
	expires := p.now().Add(o.TTL)
	p.invites = append(p.invites, &invite{key: key, expires: expires, grant: o.Grant})
	return Invitation{Code: code, Expires: expires}, nil
}

// Cancel closes every open invitation.
func (p *Pairing) Cancel() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.invites = nil
}

func (p *Pairing) open() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prune()
	return len(p.invites) > 0
}

// prune drops what has expired or was guessed at too often. p.mu is held.
func (p *Pairing) prune() {
	now, kept := p.now(), p.invites[:0]
	for _, i := range p.invites {
		if now.Before(i.expires) && i.wrong < maxWrongCodes {
			kept = append(kept, i)
		}
	}
	p.invites = kept
}

// redeem finds the invitation whose key made proof, and uses it up. A wrong
// proof counts against every open invitation: it could have been meant for any.
func (p *Pairing) redeem(transcript, proof []byte) (*invite, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.prune()
	for n, i := range p.invites {
		if hmac.Equal(prove(i.key, "join", transcript), proof) {
			p.invites = append(p.invites[:n], p.invites[n+1:]...)
			return i, nil
		}
	}
	for _, i := range p.invites {
		i.wrong++
	}
	p.prune()
	return nil, &wire.Error{
		Kind: wire.KindRefused, Text: "the pairing code is wrong, used or expired, or somebody stands between the hosts",
		Hint: "make a new code there: replicactl peer invite",
	}
}

// pairRequest is the joiner's half. Its identity and key are those of the TLS
// connection; Anchor is the authority to pin.
type pairRequest struct {
	Name    string
	Address string // may lack the host: ":port" means "where I come from"
	Anchor  []byte
	Nonce   []byte
	Proof   []byte
}

// pairReply is the inviter's half.
type pairReply struct {
	Name   string
	Anchor []byte
	Proof  []byte
}

// Validate refuses what no honest joiner sends.
func (r pairRequest) Validate() error {
	switch {
	case r.Name == "" || !wire.ValidText(r.Name, wire.MaxName) || !wire.ValidText(r.Address, wire.MaxName):
		return badRoute("host name or address is not printable text")
	case len(r.Nonce) != nonceSize || len(r.Proof) != sha256.Size || len(r.Anchor) > maxCertSize:
		return badRoute("pairing request has parts of the wrong size")
	}
	return nil
}

// side is what one end of a pairing looks like from either end.
type side struct {
	host   wire.HostID
	name   string
	leaf   *x509.Certificate
	anchor []byte
}

// transcript binds a proof to everything that matters: this one TLS connection
// (exporter), both certificates, both authorities, both names, the nonce. A
// man in the middle has two connections with two keys, so what one side proves
// is worthless towards the other.
func transcript(cs tls.ConnectionState, joiner, inviter side, address string, nonce []byte) ([]byte, error) {
	bind, err := cs.ExportKeyingMaterial(exporterLabel, nil, sha256.Size)
	if err != nil {
		return nil, fmt.Errorf("bind to the connection: %w", err)
	}
	h := sha256.New()
	for _, part := range [][]byte{
		[]byte(protoPair), bind, nonce, []byte(address),
		[]byte(joiner.host), []byte(joiner.name), joiner.leaf.Raw, joiner.anchor,
		[]byte(inviter.host), []byte(inviter.name), inviter.leaf.Raw, inviter.anchor,
	} {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(part)))
		h.Write(n[:])
		h.Write(part)
	}
	return h.Sum(nil), nil
}

func prove(key []byte, role string, transcript []byte) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(role))
	m.Write([]byte{0})
	m.Write(transcript)
	return m.Sum(nil)
}

// checkAnchor proves that the certificate of the connection was signed by the
// authority the other side asks us to pin, and is fit for use.
func checkAnchor(cs tls.ConnectionState, anchor []byte, use x509.ExtKeyUsage, now time.Time) (*x509.Certificate, error) {
	a, err := x509.ParseCertificate(anchor)
	if err != nil || !a.IsCA {
		return nil, badRoute("the authority's certificate is not usable")
	}
	return a, verifyChain(cs.PeerCertificates, pinOf(a), a, use, now)
}

// servePairing answers one join on a connection that speaks protoPair, and
// ends it. A stranger never meets more of HTTP than this, and learns nothing
// from a refusal but that it was one.
func (s *Server) servePairing(c *tls.Conn) {
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Log.Error("pairing crashed", "panic", fmt.Sprint(p))
		}
		_ = c.Close()
	}()
	if c.SetDeadline(time.Now().Add(s.cfg.Limits.Handshake)) != nil {
		return
	}
	r, err := http.ReadRequest(bufio.NewReader(io.LimitReader(c, maxHeader+maxPairBody)))
	if err != nil {
		return
	}
	reply, err := s.pairOne(c.ConnectionState(), r, c.RemoteAddr().String())
	if err != nil && s.strangers.due("pair "+hostPart(c.RemoteAddr()), s.cfg.Now()) {
		s.cfg.Log.Warn("pairing refused", "address", c.RemoteAddr().String(), "reason", wire.CleanText(err.Error(), wire.MaxText))
	}
	code, data := encodeReply(reply, err)
	resp := &http.Response{
		StatusCode: code, ProtoMajor: 1, ProtoMinor: 1, ContentLength: int64(len(data)), Close: true,
		Header: http.Header{"Content-Type": {jsonType}}, Body: io.NopCloser(bytes.NewReader(data)),
	}
	_ = resp.Write(c)
}

func (s *Server) pairOne(cs tls.ConnectionState, r *http.Request, remote string) (pairReply, error) {
	if s.cfg.Pairing == nil || r.Method != http.MethodPost || r.URL.Path != pairPath {
		return pairReply{}, &wire.Error{Kind: wire.KindNotFound, Text: "no such call"}
	}
	if r.ContentLength <= 0 || r.ContentLength > maxPairBody {
		return pairReply{}, badRoute("pairing request of %d bytes", r.ContentLength)
	}
	var q pairRequest
	if err := decodeStrict(r.Body, &q); err != nil {
		return pairReply{}, badRoute("request is not valid")
	}
	return s.cfg.Pairing.join(cs, q, remote)
}

// join is the inviter's side of the exchange.
func (p *Pairing) join(cs tls.ConnectionState, q pairRequest, remote string) (pairReply, error) {
	if !p.pace.AllowN(p.now(), 1) {
		return pairReply{}, &wire.Error{Kind: wire.KindUnavailable, Text: "too many pairing attempts", Hint: "wait some seconds"}
	}
	if err := q.Validate(); err != nil {
		return pairReply{}, err
	}
	host, err := identify(cs)
	if err != nil {
		return pairReply{}, refused("", "%s", err)
	}
	anchor, err := checkAnchor(cs, q.Anchor, x509.ExtKeyUsageClientAuth, p.now())
	if err != nil {
		return pairReply{}, refused("", "%s", err)
	}
	if host == p.id.Host() {
		return pairReply{}, refused("", "a host cannot be paired with itself (or its state was copied)")
	}
	joiner := side{host, q.Name, cs.PeerCertificates[0], q.Anchor}
	inviter := side{p.id.Host(), p.id.Name(), p.id.Leaf(), p.id.Anchor()}
	// The joiner does not know our name and authority yet; its proof binds our
	// certificate and the connection, ours binds everything.
	pre, err := transcript(cs, joiner, side{host: inviter.host, leaf: inviter.leaf}, q.Address, q.Nonce)
	if err != nil {
		return pairReply{}, err
	}
	full, err := transcript(cs, joiner, inviter, q.Address, q.Nonce)
	if err != nil {
		return pairReply{}, err
	}
	inv, err := p.redeem(pre, q.Proof)
	if err != nil {
		return pairReply{}, err
	}
	rec := Record{
		Host: host, Name: q.Name, Address: fillAddress(q.Address, remote),
		Pin: pinOf(anchor), Anchor: q.Anchor, Allow: inv.grant,
	}
	if err := p.store.Put(rec); err != nil {
		return pairReply{}, err
	}
	p.log.Info("peer paired", "peer", q.Name, "host", host)
	return pairReply{Name: p.id.Name(), Anchor: p.id.Anchor(), Proof: prove(inv.key, "invite", full)}, nil
}

// fillAddress completes ":port" by the address the joiner came from.
func fillAddress(address, remote string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		from, _, err := net.SplitHostPort(remote)
		if err != nil {
			return ""
		}
		host = from
	}
	if a := net.JoinHostPort(host, port); checkAddress(a) == nil {
		return a
	}
	return ""
}

func newCode() (string, error) {
	var b [codeSecret]byte
	if _, err := io.ReadFull(rand.Reader, b[:]); err != nil {
		return "", fmt.Errorf("make pairing code: %w", err)
	}
	digits := make([]byte, 0, codeLength)
	for _, v := range b {
		digits = append(digits, codeAlphabet[v%32])
	}
	digits = append(digits, codeAlphabet[checkDigit(digits)])
	var groups []string
	for ; len(digits) > 0; digits = digits[codeGroup:] {
		groups = append(groups, string(digits[:codeGroup]))
	}
	return strings.Join(groups, "-"), nil
}

// checkDigit weighs the places differently, so that swapped neighbours show.
func checkDigit(digits []byte) int {
	sum := 0
	for i, d := range digits {
		sum += (2*i + 1) * strings.IndexByte(codeAlphabet, d)
	}
	return sum % 32
}

var errCode = errors.New("the pairing code is mistyped: 16 letters and digits, as printed by peer invite")

// codeKey reads a code as a person may have typed it and derives its key.
func codeKey(code string) ([]byte, error) {
	if len(code) > 64 {
		return nil, errCode
	}
	c := strings.NewReplacer("-", "", " ", "", "I", "1", "L", "1", "O", "0").Replace(strings.ToUpper(code))
	if len(c) != codeLength {
		return nil, errCode
	}
	for i := range len(c) {
		if strings.IndexByte(codeAlphabet, c[i]) < 0 {
			return nil, errCode
		}
	}
	if codeAlphabet[checkDigit([]byte(c[:codeSecret]))] != c[codeSecret] {
		return nil, errCode
	}
	return hkdf.Key(sha256.New, []byte(c[:codeSecret]), nil, protoPair, sha256.Size)
}
