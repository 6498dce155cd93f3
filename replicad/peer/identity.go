package peer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/wire"
)

// uriPrefix precedes the host's UUID in the certificate's URI SAN.
const uriPrefix = "kvmreplica:host:"

// Lives of the certificates we make, and when a leaf is made anew.
const (
	caLife      = 30 * 365 * 24 * time.Hour
	leafLife    = 2 * 365 * 24 * time.Hour
	renewBefore = 60 * 24 * time.Hour
	backdate    = 24 * time.Hour // clocks differ; the certificate must not be "not yet valid" there
)

const maxPEM = 64 << 10

// Names of the identity's files, below the given directory.
const (
	caKeyFile    = "identity/ca.key"
	caCertFile   = "identity/ca.crt"
	leafFile     = "identity/host.pem" // leaf certificate and key, replaced together
	identityRoot = "identity"
)

// Pin is the SHA-256 of the SubjectPublicKeyInfo of the authority that signs a
// host's certificates. Pinning the authority and not the leaf lets a host
// renew its certificate without pairing again.
type Pin [32]byte

// String is the lower-case hexadecimal form.
func (p Pin) String() string { return hex.EncodeToString(p[:]) }

// MarshalText is the hexadecimal form.
func (p Pin) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads the form MarshalText writes; anything else is an error.
func (p *Pin) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(p)) {
		return fmt.Errorf("pin has %d digits, want %d", len(b), hex.EncodedLen(len(p)))
	}
	_, err := hex.Decode(p[:], b)
	return err
}

func pinOf(c *x509.Certificate) Pin { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// Identity is this host's certificate and what signs it. Safe for concurrent use.
type Identity struct {
	host   wire.HostID
	name   string
	anchor *x509.Certificate
	caKey  crypto.Signer // nil for bring-your-own
	store  fsx.FS        // nil for bring-your-own
	leaf   atomic.Pointer[tls.Certificate]
}

// Host is this host's id.
func (i *Identity) Host() wire.HostID { return i.host }

// Name is the display name sent to peers.
func (i *Identity) Name() string { return i.name }

// Pin is what peers pin.
func (i *Identity) Pin() Pin { return pinOf(i.anchor) }

// Anchor is the authority's certificate in DER.
func (i *Identity) Anchor() []byte { return i.anchor.Raw }

// Leaf is the host's present certificate.
func (i *Identity) Leaf() *x509.Certificate { return i.leaf.Load().Leaf }

// OpenIdentity reads the host's self-made identity from dir, or makes it: an
// authority of its own and a certificate signed by it. Private keys are
// written through dir, which must create files readable by their owner only.
func OpenIdentity(dir fsx.FS, name string, now time.Time) (*Identity, error) {
	if !wire.ValidText(name, wire.MaxName) || name == "" {
		return nil, fmt.Errorf("host name %.64q is empty or not printable text", name)
	}
	ca, err := fsx.ReadFile(dir, caCertFile, maxPEM)
	if errors.Is(err, fs.ErrNotExist) {
		return createIdentity(dir, name, now)
	}
	if err != nil {
		return nil, fmt.Errorf("read host authority: %w", err)
	}
	i := &Identity{name: name, store: dir}
	if i.anchor, err = parseOne(ca); err != nil {
		return nil, fmt.Errorf("host authority %s: %w", caCertFile, err)
	}
	if err := i.anchor.CheckSignature(i.anchor.SignatureAlgorithm, i.anchor.RawTBSCertificate, i.anchor.Signature); err != nil {
		return nil, fmt.Errorf("host authority %s is damaged (%w): restore it from a backup, or remove the directory %s and pair again", caCertFile, err, identityRoot)
	}
	if i.host, err = hostOf(i.anchor); err != nil {
		return nil, fmt.Errorf("host authority %s: %w", caCertFile, err)
	}
	keyPEM, err := fsx.ReadFile(dir, caKeyFile, maxPEM)
	if err != nil {
		return nil, fmt.Errorf("read host authority key: %w", err)
	}
	if i.caKey, err = parseKey(keyPEM); err != nil {
		return nil, fmt.Errorf("host authority key %s: %w", caKeyFile, err)
	}
	if !publicEqual(i.caKey, i.anchor) {
		return nil, fmt.Errorf("%s does not belong to %s", caKeyFile, caCertFile)
	}
	return i, i.loadLeaf(now)
}

// loadLeaf reads the leaf, or makes a new one if it is gone, damaged or due.
func (i *Identity) loadLeaf(now time.Time) error {
	data, err := fsx.ReadFile(i.store, leafFile, maxPEM)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read host certificate: %w", err)
	}
	if err == nil {
		pair, perr := tls.X509KeyPair(data, data)
		if perr == nil && i.whole(&pair) && now.Before(pair.Leaf.NotAfter.Add(-renewBefore)) {
			i.leaf.Store(&pair)
			return nil
		}
	}
	return i.makeLeaf(now)
}

// whole tells a leaf with its authority, as makeLeaf wrote them.
func (i *Identity) whole(pair *tls.Certificate) bool {
	return len(pair.Certificate) == 2 && bytes.Equal(pair.Certificate[1], i.anchor.Raw) && pair.Leaf.CheckSignatureFrom(i.anchor) == nil
}

// createIdentity makes the key first and the certificate that names it last,
// so that a crash in between starts over.
func createIdentity(dir fsx.FS, name string, now time.Time) (*Identity, error) {
	if err := dir.MkdirAll(identityRoot); err != nil {
		return nil, fmt.Errorf("make identity directory: %w", err)
	}
	id, err := newUUID()
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make host authority key: %w", err)
	}
	i := &Identity{host: wire.HostID(id), name: name, caKey: key, store: dir}
	der, err := signCA(i.host, key, now)
	if err != nil {
		return nil, err
	}
	if i.anchor, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("parse new host authority: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, err
	}
	if err := fsx.WriteAtomic(dir, caKeyFile, keyPEM); err != nil {
		return nil, err
	}
	if err := i.makeLeaf(now); err != nil {
		return nil, err
	}
	return i, fsx.WriteAtomic(dir, caCertFile, encodeCerts(der))
}

func signCA(host wire.HostID, key crypto.Signer, now time.Time) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "KVM Replica authority of " + string(host)},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caLife),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		URIs:                  []*url.URL{hostURI(host)},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make host authority: %w", err)
	}
	return der, nil
}

// makeLeaf makes a new key and certificate and makes them durable before use.
func (i *Identity) makeLeaf(now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make host key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "KVM Replica host " + string(i.host)},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(leafLife),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:         []*url.URL{hostURI(i.host)},
	}
	der, err := x509.CreateCertificate(rand.Reader, t, i.anchor, key.Public(), i.caKey)
	if err != nil {
		return fmt.Errorf("make host certificate: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return err
	}
	data := append(encodeCerts(der, i.anchor.Raw), keyPEM...)
	pair, err := tls.X509KeyPair(data, data)
	if err != nil {
		return fmt.Errorf("load new host certificate: %w", err)
	}
	if err := fsx.WriteAtomic(i.store, leafFile, data); err != nil {
		return err
	}
	i.leaf.Store(&pair)
	return nil
}

// Renew makes a new certificate when the present one has less than 60 days
// left. Peers need not be told: they pin the authority. A bring-your-own
// identity is never renewed here.
func (i *Identity) Renew(now time.Time) (renewed bool, err error) {
	if i.caKey == nil || now.Before(i.Leaf().NotAfter.Add(-renewBefore)) {
		return false, nil
	}
	return true, i.makeLeaf(now)
}

// Rotate makes a new certificate at once.
func (i *Identity) Rotate(now time.Time) error {
	if i.caKey == nil {
		return errors.New("the host certificate comes from files; replace them and reload")
	}
	return i.makeLeaf(now)
}

// LoadIdentity takes a certificate made elsewhere: certPEM holds the leaf and
// its intermediates, keyPEM its key, bundlePEM the authorities. Peers will pin
// the authority of the bundle that the certificate chains to.
func LoadIdentity(certPEM, keyPEM, bundlePEM []byte, name string, now time.Time) (*Identity, error) {
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("load host certificate: %w", err)
	}
	host, err := hostOf(pair.Leaf)
	if err != nil {
		return nil, fmt.Errorf("host certificate: %w", err)
	}
	roots, inter := x509.NewCertPool(), x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bundlePEM) {
		return nil, errors.New("the CA bundle holds no certificate")
	}
	for _, der := range pair.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("host certificate chain: %w", err)
		}
		inter.AddCert(c)
	}
	i := &Identity{host: host, name: name}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		chains, err := pair.Leaf.Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use},
		})
		if err != nil {
			return nil, explain(err, pair.Leaf, use, now)
		}
		i.anchor = chains[0][len(chains[0])-1]
	}
	pair.Certificate = append(pair.Certificate, i.anchor.Raw)
	i.leaf.Store(&pair)
	return i, nil
}

// Expiry is a certificate that ends soon.
type Expiry struct {
	What string // "host certificate" or "host authority"
	Ends time.Time
	// Days left, rounded down; negative when it has ended.
	Days int
	// Severity is "info" (30 days), "warning" (7 days) or "critical" (1 day or
	// ended).
	Severity string
	Hint     string
}

// Expiries lists the certificates that end within 30 days.
func (i *Identity) Expiries(now time.Time) []Expiry {
	hint := "restart replicad: it makes a new certificate"
	if i.caKey == nil {
		hint = "replace the certificate files and reload replicad"
	}
	var all []Expiry
	for _, c := range []struct {
		what string
		cert *x509.Certificate
		hint string
	}{{"host certificate", i.Leaf(), hint}, {"host authority", i.anchor, "pair this host again with every peer"}} {
		if e, soon := expiry(c.what, c.cert.NotAfter, now); soon {
			e.Hint = c.hint
			all = append(all, e)
		}
	}
	return all
}

func expiry(what string, ends, now time.Time) (Expiry, bool) {
	const day = 24 * time.Hour
	left := ends.Sub(now)
	e := Expiry{What: what, Ends: ends, Days: int(left / day), Severity: "info"}
	if left < 0 {
		e.Days = -int(-left/day) - 1
	}
	switch {
	case left <= day:
		e.Severity = "critical"
	case left <= 7*day:
		e.Severity = "warning"
	}
	return e, left <= 30*day
}

func hostURI(h wire.HostID) *url.URL {
	return &url.URL{Scheme: "kvmreplica", Opaque: "host:" + string(h)}
}

// hostOf reads the one identity a certificate carries.
func hostOf(c *x509.Certificate) (wire.HostID, error) {
	var found []wire.HostID
	for _, u := range c.URIs {
		if s, ok := strings.CutPrefix(u.String(), uriPrefix); ok {
			found = append(found, wire.HostID(s))
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("it names %d hosts as %sUUID in its URI names, want exactly one", len(found), uriPrefix)
	}
	if !found[0].Valid() {
		return "", fmt.Errorf("its host id %.64q is not a lower-case UUID", string(found[0]))
	}
	return found[0], nil
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func newUUID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("make host id: %w", err)
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}

func encodeCerts(ders ...[]byte) []byte {
	var out []byte
	for _, d := range ders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: d})...)
	}
	return out
}

func encodeKey(k crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func parseOne(data []byte) (*x509.Certificate, error) {
	b, _ := pem.Decode(data)
	if b == nil || b.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM certificate in it")
	}
	return x509.ParseCertificate(b.Bytes)
}

func parseKey(data []byte) (crypto.Signer, error) {
	b, _ := pem.Decode(data)
	if b == nil || b.Type != "PRIVATE KEY" {
		return nil, errors.New("no PEM private key in it")
	}
	k, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		return nil, errors.New("not a usable private key")
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, errors.New("not a signing key")
	}
	return s, nil
}

func publicEqual(k crypto.Signer, c *x509.Certificate) bool {
	pub, ok := k.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(c.PublicKey)
}
