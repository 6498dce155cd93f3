package kvm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
)

// authority is an administrator's own CA.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	der  []byte
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t)}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	var err error
	if a.der, err = x509.CreateCertificate(rand.Reader, tmpl, tmpl, &a.key.PublicKey, a.key); err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(a.der); err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// files are a host's certificate, key and the authority, as PEM.
func (a *authority) files(n int, ends time.Time) map[string][]byte {
	a.t.Helper()
	key := newKey(a.t)
	id, err := url.Parse(fmt.Sprintf("kvmreplica:host:c0ffee00-0000-4000-8000-%012d", n))
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "host"}, URIs: []*url.URL{id},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: ends, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return map[string][]byte{
		"host.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"host.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
		"ca.crt":   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.der}),
	}
}

// certify puts a host's files in place; its daemon must be restarted.
func (w *world) certify(host string, files map[string][]byte) {
	w.t.Helper()
	for name, b := range files {
		w.must(w.Lab.Host(host).PutFile("/etc/replicad/"+name, b, 0o600))
	}
}

// A certificate that ends while VMs replicate stops them with a message that
// says so on both hosts, warns before, and a new one mends everything.
func TestACertificateThatEndsSaysSoAndANewOneMendsIt(t *testing.T) {
	w := up(t, estate.Options{})
	ca := newAuthority(t)
	week := time.Now().Add(7 * 24 * time.Hour)
	for i, h := range []string{"A", "B"} {
		w.certify(h, ca.files(i+1, week))
		w.ctl(h, "peer", "remove", estate.Peer(map[string]string{"A": "B", "B": "A"}[h]))
		w.reconfigure(h, "[limits]", "[tls]\ncert = \"/etc/replicad/host.crt\"\nkey = \"/etc/replicad/host.key\"\nca = \"/etc/replicad/ca.crt\"\n\n[limits]")
	}
	w.pairAgain()
	d := w.smallGuest("cert", 40, 1<<20)
	w.must(w.Define(w.step(), "A", d))
	w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--yes")
	w.replicating("A", d.Name)
	if out := w.refused("A", 4, "doctor"); !strings.Contains(out, "certificate") || !strings.Contains(out, "replace the certificate files") {
		t.Errorf("doctor does not warn of a certificate that ends in a week:\n%s", out)
	}

	// the next one ends while connections are open
	w.must(w.Daemon("A").Stop(w.step()))
	var ends time.Time
	for lives := 12 * time.Second; ; lives *= 3 { // a busy machine takes longer to start a daemon
		ends = time.Now().Add(lives).Truncate(time.Second)
		w.certify("A", ca.files(1, ends))
		err := w.StartDaemon(w.step(), "A")
		if err == nil {
			break
		}
		if lives > time.Minute || !strings.Contains(err.Error(), "the certificate has expired") {
			t.Fatal(err)
		}
	}
	w.must(waitFor(w.step(), func() bool { return time.Now().After(ends.Add(time.Second)) }))
	for _, c := range []struct{ host, word string }{{"B", "the certificate has expired"}, {"A", "certificate"}} {
		out := w.refused(c.host, 1, "peer", "test", estate.Peer(map[string]string{"A": "B", "B": "A"}[c.host]))
		if !strings.Contains(out, c.word) || !strings.Contains(out, "->") {
			t.Errorf("peer test on %s does not name the certificate and a remedy:\n%s", c.host, out)
		}
		t.Logf("peer test on %s:\n%s", c.host, out)
	}
	// what is connected stays so; the next connection is refused
	w.must(w.Daemon("B").Stop(w.step()))
	w.must(w.StartDaemon(w.step(), "B"))
	w.condition("A", d.Name, "peer-refuses", "certificate")

	// a daemon does not start with it
	w.must(w.Daemon("A").Stop(w.step()))
	if err := w.StartDaemon(w.step(), "A"); err == nil || !strings.Contains(err.Error(), "the certificate has expired") {
		t.Errorf("a daemon with an expired certificate: %v", err)
	}
	w.certify("A", ca.files(1, week))
	w.must(w.StartDaemon(w.step(), "A"))
	w.replicating("A", d.Name)
	w.same(w.Lab.Host("A").Path(d.Disks[0].File), w.onReplica(d, "vda"))
}

// pairAgain pairs the hosts with their present identities.
func (w *world) pairAgain() {
	w.t.Helper()
	var inv struct{ Code string }
	w.must(json.Unmarshal([]byte(w.ctl("A", "--json", "peer", "invite", "--may-send")), &inv))
	w.ctl("B", "peer", "join", fmt.Sprintf("%s:%d", w.Lab.Host("A").IP(), estate.Port), inv.Code, "--may-send")
}
