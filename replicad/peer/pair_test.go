package peer

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"kvmreplica/replicad/wire"
)

// inviter is a serving host with an open invitation.
func inviter(t *testing.T, o InviteOptions) (*host, string) {
	t.Helper()
	r := newHost(t, "replica")
	r.serve(t)
	r.pair.pace.SetLimit(rate.Inf)
	inv, err := r.pair.Invite(o)
	if err != nil {
		t.Fatal(err)
	}
	return r, inv.Code
}

func join(t *testing.T, p *host, addr, code string, change ...func(*JoinOptions)) (Record, error) {
	t.Helper()
	o := JoinOptions{Listen: ":7878"}
	for _, c := range change {
		c(&o)
	}
	return Join(soon(t), p.id, p.store, addr, code, o)
}

func TestPairingPinsBothSidesWithWhatEachGranted(t *testing.T) {
	r, code := inviter(t, InviteOptions{Grant: all()})
	p := newHost(t, "primary")
	rec, err := join(t, p, r.addr, strings.ToLower(strings.ReplaceAll(code, "-", " ")))
	if err != nil {
		t.Fatal(err)
	}
	if rec.Host != r.id.Host() || rec.Pin != r.id.Pin() || rec.Name != "replica" || rec.Address != r.addr || rec.Allow.MaySend {
		t.Errorf("joiner's record: %+v", rec)
	}
	got, ok := r.store.Get(p.id.Host())
	if !ok || got.Pin != p.id.Pin() || got.Name != "primary" || got.Address != "127.0.0.1:7878" || !got.Allow.MaySend {
		t.Errorf("inviter's record: %+v", got)
	}
	if _, err := p.client(t, r).Hello(soon(t), wire.HelloRequest{Min: 1, Max: 1}); err != nil {
		t.Errorf("first call: %v", err)
	}
	stored, ok := p.store.Get(r.id.Host())
	if !ok || stored.Pin != rec.Pin {
		t.Errorf("joiner stored %+v", stored)
	}
}

func TestACodeWorksOnce(t *testing.T) {
	r, code := inviter(t, InviteOptions{})
	if _, err := join(t, newHost(t, "first"), r.addr, code); err != nil {
		t.Fatal(err)
	}
	if _, err := r.pair.Invite(InviteOptions{}); err != nil {
		t.Fatal(err)
	}
	second := newHost(t, "second")
	if _, err := join(t, second, r.addr, code); kindOf(err) != wire.KindRefused {
		t.Errorf("second use: %v", err)
	}
	if _, ok := r.store.Get(second.id.Host()); ok {
		t.Error("second host was paired")
	}
	if len(second.store.Peers()) != 0 {
		t.Error("second host pinned the inviter")
	}
}

func TestOfManyConcurrentJoinsOneWins(t *testing.T) {
	r, code := inviter(t, InviteOptions{})
	const n = 8
	var wg sync.WaitGroup
	var won, lost int
	var mu sync.Mutex
	for range n {
		p := newHost(t, "racer")
		wg.Go(func() {
			_, err := Join(context.Background(), p.id, p.store, r.addr, code, JoinOptions{})
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				won++
			} else {
				lost++
			}
		})
	}
	wg.Wait()
	if won != 1 || lost != n-1 || len(r.store.Peers()) != 1 {
		t.Fatalf("%d won, %d lost, %d paired", won, lost, len(r.store.Peers()))
	}
}

func TestAnInvitationEndsWithItsTime(t *testing.T) {
	r, code := inviter(t, InviteOptions{TTL: time.Minute})
	base := time.Now()
	var mu sync.Mutex
	offset := time.Duration(0)
	r.pair.now = func() time.Time { mu.Lock(); defer mu.Unlock(); return base.Add(offset) }
	if !r.pair.open() {
		t.Fatal("not open at first")
	}
	mu.Lock()
	offset = time.Minute + time.Second
	mu.Unlock()
	_, err := join(t, newHost(t, "late"), r.addr, code)
	if kindOf(err) != wire.KindRefused || !strings.Contains(err.Error(), "no open invitation") {
		t.Errorf("late join: %v", err)
	}
	if len(r.store.Peers()) != 0 {
		t.Error("a late host was paired")
	}
}

func TestWrongCodesCloseTheInvitation(t *testing.T) {
	r, code := inviter(t, InviteOptions{})
	p := newHost(t, "guesser")
	for i := range maxWrongCodes {
		wrong, err := newCode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := join(t, p, r.addr, wrong); kindOf(err) != wire.KindRefused {
			t.Fatalf("guess %d: %v", i, err)
		}
	}
	if _, err := join(t, p, r.addr, code); kindOf(err) != wire.KindRefused {
		t.Errorf("the right code after %d wrong ones: %v", maxWrongCodes, err)
	}
	if len(r.store.Peers()) != 0 || len(p.store.Peers()) != 0 {
		t.Error("a guesser was paired")
	}
}

func TestGuessingIsPaced(t *testing.T) {
	r := newHost(t, "replica")
	r.serve(t)
	base := time.Now()
	r.pair.now = func() time.Time { return base }
	if _, err := r.pair.Invite(InviteOptions{}); err != nil {
		t.Fatal(err)
	}
	p, paced := newHost(t, "guesser"), 0
	for range pairBurst + 3 {
		wrong, err := newCode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := join(t, p, r.addr, wrong); kindOf(err) == wire.KindUnavailable {
			paced++
		}
	}
	if paced != 3 {
		t.Fatalf("%d attempts were turned away, want 3", paced)
	}
}

func TestMistypedCodesAreCaughtBeforeTheyTravel(t *testing.T) {
	code, err := newCode()
	if err != nil {
		t.Fatal(err)
	}
	plain := strings.ReplaceAll(code, "-", "")
	if _, err := codeKey(plain); err != nil {
		t.Fatal(err)
	}
	for i := range len(plain) {
		b := []byte(plain)
		b[i] = codeAlphabet[(strings.IndexByte(codeAlphabet, b[i])+1)%32]
		if _, err := codeKey(string(b)); !errors.Is(err, errCode) {
			t.Errorf("a slip at place %d went through", i)
		}
	}
	for _, bad := range []string{"", "x", plain[1:], plain + "0", strings.Repeat("0", 1000), "уууу-уууу-уууу-уууу"} {
		if _, err := codeKey(bad); err == nil {
			t.Errorf("%.20q accepted", bad)
		}
	}
	key := func(s string) []byte { k, err := codeKey(s); errFatal(t, err); return k }
	ambiguous := "1010101010101" + "10"
	full := ambiguous + string(codeAlphabet[checkDigit([]byte(ambiguous))])
	if !bytes.Equal(key(full), key(strings.NewReplacer("1", "l", "0", "o").Replace(full))) {
		t.Error("l and o are not read as 1 and 0")
	}
}

func errFatal(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mitm terminates TLS towards the joiner with its own certificate, opens its
// own pairing connection to the inviter, and relays after change.
func mitm(t *testing.T, target string, change func(request bool, data []byte) []byte) (addr string) {
	t.Helper()
	m := newHost(t, "mitm")
	accept := func(tls.ConnectionState) error { return nil }
	l, err := tls.Listen("tcp", "127.0.0.1:0", baseTLS(m.id, protoPair, accept))
	errFatal(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				up, err := tls.Dial("tcp", target, baseTLS(m.id, protoPair, accept))
				if err != nil {
					return
				}
				defer func() { _ = up.Close() }()
				pass := func(dst io.Writer, src io.Reader, request bool) {
					buf := make([]byte, 32<<10)
					for {
						n, err := src.Read(buf)
						if n > 0 {
							if _, werr := dst.Write(change(request, buf[:n])); werr != nil {
								return
							}
						}
						if err != nil {
							return
						}
					}
				}
				done := make(chan struct{})
				go func() { pass(c, up, false); _ = c.Close(); close(done) }()
				pass(up, c, true)
				_ = up.Close()
				<-done
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return l.Addr().String()
}

func TestAManInTheMiddleEndsPairingOnBothSides(t *testing.T) {
	r, code := inviter(t, InviteOptions{Grant: all()})
	p := newHost(t, "primary")
	relayed := 0
	addr := mitm(t, r.addr, func(request bool, data []byte) []byte {
		if request {
			relayed += len(data)
		}
		return data
	})
	_, err := join(t, p, addr, code)
	if kindOf(err) != wire.KindRefused {
		t.Errorf("joiner: %v", err)
	}
	if relayed == 0 {
		t.Fatal("the attack did not take place")
	}
	if len(r.store.Peers()) != 0 || len(p.store.Peers()) != 0 {
		t.Error("somebody was paired")
	}
}

// TestAManInTheMiddleWhoRewritesTheRequestGainsNothing: the attacker puts its
// own authority, name and nonce into the joiner's request, in every
// combination, and keeps the joiner's proof.
func TestAManInTheMiddleWhoRewritesTheRequestGainsNothing(t *testing.T) {
	for rewrite := range 8 {
		r, code := inviter(t, InviteOptions{Grant: all()})
		p, m := newHost(t, "primary"), newHost(t, "primary")
		l, err := tls.Listen("tcp", "127.0.0.1:0", baseTLS(m.id, protoPair, func(tls.ConnectionState) error { return nil }))
		errFatal(t, err)
		got := make(chan error, 1)
		go func() {
			defer close(got)
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer func() { _ = c.Close() }()
			req, err := http.ReadRequest(bufio.NewReader(c))
			if err != nil {
				return
			}
			var q pairRequest
			if decodeStrict(req.Body, &q) != nil {
				return
			}
			q.Anchor = m.id.Anchor() // else the certificate does not even fit
			if rewrite&1 != 0 {
				q.Address = "10.6.6.6:666"
			}
			if rewrite&2 != 0 {
				q.Name = "mitm"
			}
			if rewrite&4 != 0 {
				q.Nonce = make([]byte, nonceSize)
			}
			up, _, err := dialTLS(context.Background(), m.id, r.addr, protoPair, dialTCP, func(tls.ConnectionState) error { return nil })
			if err != nil {
				return
			}
			defer func() { _ = up.Close() }()
			got <- roundTrip(context.Background(), up, pairPath, q, &pairReply{})
		}()
		if _, err := join(t, p, l.Addr().String(), code); err == nil {
			t.Errorf("rewrite %d: the joiner believes to be paired", rewrite)
		}
		if err := <-got; kindOf(err) != wire.KindRefused || !strings.Contains(err.Error(), "code is wrong") {
			t.Errorf("rewrite %d: the inviter answered the man in the middle: %v", rewrite, err)
		}
		if len(r.store.Peers()) != 0 || len(p.store.Peers()) != 0 {
			t.Errorf("rewrite %d: somebody was paired", rewrite)
		}
		_ = l.Close()
	}
}

func TestAnInviterThatDoesNotKnowTheCodeIsNotPinned(t *testing.T) {
	p := newHost(t, "primary")
	evil, _ := inviter(t, InviteOptions{})
	// It accepts whatever the joiner proves, and makes up its own proof.
	evilCode, err := newCode()
	errFatal(t, err)
	evilKey, err := codeKey(evilCode)
	errFatal(t, err)
	realCode, err := newCode()
	errFatal(t, err)
	l, err := tls.Listen("tcp", "127.0.0.1:0", baseTLS(evil.id, protoPair, func(tls.ConnectionState) error { return nil }))
	errFatal(t, err)
	var wg sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	wg.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = c.Read(make([]byte, 64<<10))
		body := `{"Name":"evil","Anchor":"` + b64(evil.id.Anchor()) + `","Proof":"` + b64(prove(evilKey, "invite", make([]byte, 32))) + `"}`
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"+body)
	})
	_, err = join(t, p, l.Addr().String(), realCode)
	if kindOf(err) != wire.KindRefused || !strings.Contains(err.Error(), "stands between") {
		t.Errorf("got %v", err)
	}
	if len(p.store.Peers()) != 0 {
		t.Error("the impostor was pinned")
	}
}

func TestAProofIsWorthNothingOnAnotherConnection(t *testing.T) {
	r, code := inviter(t, InviteOptions{})
	p := newHost(t, "primary")
	var recorded bytes.Buffer
	// The recorder keeps the joiner's bytes and drops the connection.
	k, err := codeKey(code)
	errFatal(t, err)
	dial := func() (*tls.Conn, tls.ConnectionState) {
		c, cs, err := dialTLS(soon(t), p.id, r.addr, protoPair, dialTCP, func(tls.ConnectionState) error { return nil })
		errFatal(t, err)
		return c, cs
	}
	c1, cs1 := dial()
	q := pairRequest{Name: "primary", Address: ":1", Anchor: p.id.Anchor(), Nonce: make([]byte, nonceSize)}
	tr, err := transcript(cs1, side{p.id.Host(), q.Name, p.id.Leaf(), q.Anchor}, side{host: r.id.Host(), leaf: cs1.PeerCertificates[0]}, q.Address, q.Nonce)
	errFatal(t, err)
	q.Proof = prove(k, "join", tr)
	recorded.Write(q.Proof)
	_ = c1.Close()
	c2, _ := dial()
	defer func() { _ = c2.Close() }()
	q.Proof = recorded.Bytes()
	if err := roundTrip(soon(t), c2, pairPath, q, &pairReply{}); kindOf(err) != wire.KindRefused {
		t.Fatalf("replayed proof: %v", err)
	}
	if len(r.store.Peers()) != 0 {
		t.Fatal("paired by a replay")
	}
}

func TestAnInvitedHostCannotTakeAnothersName(t *testing.T) {
	r, code := inviter(t, InviteOptions{Grant: all()})
	p, evil := newHost(t, "primary"), newHost(t, "primary")
	r.trust(t, p, all())
	// evil's authority signs a leaf with p's id.
	stolen := forge(t, p, func(f *forgery) {
		f.parent, f.key, f.extra = evil.id.anchor, evil.id.caKey.(*ecdsa.PrivateKey), [][]byte{evil.id.anchor.Raw}
	})
	stolen.anchor = evil.id.anchor
	if _, err := join(t, newHostAs(t, stolen), r.addr, code); kindOf(err) != wire.KindConflict {
		t.Fatalf("got %v", err)
	}
	if got, _ := r.store.Get(p.id.Host()); got.Pin != p.id.Pin() {
		t.Fatal("the pinned key was replaced")
	}
	again, err := r.pair.Invite(InviteOptions{})
	errFatal(t, err)
	if _, err := join(t, p, r.addr, again.Code); err != nil {
		t.Errorf("the same host pairing again: %v", err)
	}
	errFatal(t, r.store.Remove(p.id.Host()))
	last, err := r.pair.Invite(InviteOptions{})
	errFatal(t, err)
	if _, err := join(t, newHostAs(t, stolen), r.addr, last.Code); err != nil {
		t.Errorf("set up anew after removal: %v", err)
	}
}

func TestThePairingDoorLeadsNowhereElse(t *testing.T) {
	r, _ := inviter(t, InviteOptions{})
	p := newHost(t, "primary")
	for _, path := range []string{"/v1/hello", "/v1/status", "/", "/pair/2"} {
		c, _, err := dialTLS(soon(t), p.id, r.addr, protoPair, dialTCP, func(tls.ConnectionState) error { return nil })
		errFatal(t, err)
		if err := roundTrip(soon(t), c, path, wire.HelloRequest{Min: 1, Max: 1}, &nothing{}); kindOf(err) != wire.KindNotFound {
			t.Errorf("%s: %v", path, err)
		}
		_ = c.Close()
	}
	if r.svc.count() != 0 {
		t.Error("the service was reached")
	}
}

func TestPairingRequestsAreBounded(t *testing.T) {
	r, _ := inviter(t, InviteOptions{})
	p := newHost(t, "primary")
	for name, q := range map[string]any{
		"too long":       pairRequest{Name: "x", Anchor: make([]byte, maxPairBody)},
		"no proof":       pairRequest{Name: "x", Anchor: p.id.Anchor(), Nonce: make([]byte, nonceSize)},
		"control bytes":  pairRequest{Name: "a\x1b[2J", Anchor: p.id.Anchor(), Nonce: make([]byte, nonceSize), Proof: make([]byte, 32)},
		"unknown fields": map[string]any{"Name": "x", "Admin": true},
		"foreign anchor": pairRequest{Name: "x", Anchor: r.id.Anchor(), Nonce: make([]byte, nonceSize), Proof: make([]byte, 32)},
	} {
		c, _, err := dialTLS(soon(t), p.id, r.addr, protoPair, dialTCP, func(tls.ConnectionState) error { return nil })
		errFatal(t, err)
		err = roundTrip(soon(t), c, pairPath, q, &pairReply{})
		k := kindOf(err)
		// The rest of what is too long is never read, so the answer may meet a
		// connection that was reset.
		cut := name == "too long" && k == wire.KindUnavailable
		if k != wire.KindInvalid && k != wire.KindRefused && !cut {
			t.Errorf("%s: %v", name, err)
		}
		_ = c.Close()
	}
	if !r.pair.open() {
		t.Error("malformed requests closed the invitation")
	}
}

func TestAHostIsNotPairedWithItself(t *testing.T) {
	r, code := inviter(t, InviteOptions{})
	if _, err := join(t, r, r.addr, code); kindOf(err) != wire.KindRefused {
		t.Fatalf("got %v", err)
	}
}

func TestJoinMistakesAreNamed(t *testing.T) {
	r, code := inviter(t, InviteOptions{})
	p := newHost(t, "primary")
	for name, c := range map[string]struct {
		addr, code string
		kind       wire.Kind
	}{
		"no port":       {"127.0.0.1", code, wire.KindInvalid},
		"mistyped code": {r.addr, "AAAA-AAAA-AAAA-AAAB", wire.KindInvalid},
		"nobody there":  {closedPort(t), code, wire.KindUnavailable},
	} {
		if _, err := join(t, p, c.addr, c.code); kindOf(err) != c.kind {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := r.pair.Invite(InviteOptions{Grant: Authorisation{MaySend: true}}); err == nil {
		t.Error("an invitation without a storage root was accepted")
	}
	for range maxInvites - 1 {
		_, err := r.pair.Invite(InviteOptions{})
		errFatal(t, err)
	}
	if _, err := r.pair.Invite(InviteOptions{}); kindOf(err) != wire.KindConflict {
		t.Errorf("one invitation too many: %v", err)
	}
	r.pair.Cancel()
	if r.pair.open() {
		t.Error("cancelled invitations are open")
	}
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	errFatal(t, err)
	errFatal(t, l.Close())
	return l.Addr().String()
}

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
