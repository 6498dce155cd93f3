package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// from dials with a source address of its own.
func from(source string) DialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		return d.DialContext(ctx, network, address)
	}
}

func limits(l Limits) func(*ServerConfig) { return func(c *ServerConfig) { c.Limits = l } }

func TestSilentConnectionsAreBoundedAndHonestOnesServed(t *testing.T) {
	const preAuth, perSource = 16, 4
	p, r, _ := pairOf(t, limits(Limits{PreAuth: preAuth, PreAuthPerSource: perSource, Conns: 64}))
	var open []net.Conn
	t.Cleanup(func() {
		for _, c := range open {
			_ = c.Close()
		}
	})
	most := 0
	for i := range 600 {
		c, err := from(fmt.Sprintf("127.0.1.%d", 1+i%50))(soon(t), "tcp", r.addr)
		errFatal(t, err)
		open = append(open, c)
		if n, _ := r.srv.conns.counts(); n > most {
			most = n
		}
		if i%200 == 100 {
			c := p.client(t, r, func(c *ClientConfig) { c.Dial = from("127.0.0.9") })
			if _, err := c.Status(soon(t), vmA); err != nil {
				t.Fatalf("after %d silent connections: %v", i, err)
			}
			_ = c.Close()
		}
	}
	// One may be on its way out, three honest ones came and went.
	if most > preAuth+4 {
		t.Fatalf("%d connections were held, want at most %d", most, preAuth+4)
	}
	t.Logf("600 silent connections from 50 addresses: at most %d held", most)
}

func TestOneSourceCannotFillTheWaitingRoom(t *testing.T) {
	_, r, _ := pairOf(t, limits(Limits{PreAuth: 16, PreAuthPerSource: 3}))
	for range 40 {
		c, err := from("127.0.1.1")(soon(t), "tcp", r.addr)
		errFatal(t, err)
		t.Cleanup(func() { _ = c.Close() })
	}
	c, err := from("127.0.1.2")(soon(t), "tcp", r.addr)
	errFatal(t, err)
	defer func() { _ = c.Close() }()
	waitFor(t, func() bool { _, n := r.srv.conns.counts(); return n == 4 })
}

// waitFor polls without sleeping longer than a tick.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	ctx := soon(t)
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("it did not happen within %v", patience)
		}
	}
}

func TestSlowHandshakesAndHeadersAreCutOff(t *testing.T) {
	p, r, _ := pairOf(t, limits(Limits{Handshake: 300 * time.Millisecond, Control: 300 * time.Millisecond}))
	good := baseTLS(p.id, protoMain, func(tls.ConnectionState) error { return nil })
	authenticated := func() net.Conn {
		for ctx := soon(t); ; {
			// On a busy machine a handshake may itself be cut off.
			if c, err := tls.Dial("tcp", r.addr, good); err == nil || ctx.Err() != nil {
				errFatal(t, err)
				return c
			}
		}
	}
	plain := func() net.Conn {
		c, err := net.Dial("tcp", r.addr)
		errFatal(t, err)
		return c
	}
	for name, c := range map[string]struct {
		dial func() net.Conn
		send string
	}{
		"nothing at all":       {plain, ""},
		"half a TLS record":    {plain, "\x16\x03\x01\x40\x00\x01"},
		"plain HTTP":           {plain, "POST /v1/hello HTTP/1.1\r\n\r\n"},
		"TLS and then nothing": {authenticated, ""},
		"half a header":        {authenticated, "POST /v1/hello HTTP/1.1\r\nHost: x\r\nX-A: "},
		"a body that stops":    {authenticated, "POST /v1/hello HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"},
	} {
		conn := c.dial()
		begin := time.Now()
		_, _ = io.WriteString(conn, c.send)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		_, err := io.Copy(io.Discard, conn)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("%s: still open after %v", name, time.Since(begin))
		}
		_ = conn.Close()
	}
	if r.svc.count() != 0 {
		t.Error("the service was reached")
	}
	waitFor(t, func() bool { n, _ := r.srv.conns.counts(); return n == 0 })
}

func TestABodyThatStallsIsGivenUp(t *testing.T) {
	_, r, c := pairOf(t, limits(Limits{Stall: 200 * time.Millisecond}))
	seen := make(chan error, 1)
	r.svc.put = func(_ context.Context, body io.Reader) error {
		_, err := io.Copy(io.Discard, body)
		seen <- err
		return err
	}
	pr, pw := io.Pipe()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer func() { _ = pw.Close() }()
	wg.Go(func() { _, _ = pw.Write(make([]byte, 1000)) })
	wg.Go(func() { _, _ = c.PutEpoch(soon(t), key(), 0, pr) })
	select {
	case err := <-seen:
		if err == nil {
			t.Fatal("a stalled body looked complete")
		}
	case <-soon(t).Done():
		t.Fatal("the server waits for ever")
	}
}

func TestACallMayTakeLongerThanSendingItMay(t *testing.T) {
	const limit = 3 * time.Second // sending must not take as long on a busy machine
	_, r, c := pairOf(t, limits(Limits{Control: limit, Stall: limit}))
	slow := func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(limit + time.Second):
			return nil
		}
	}
	r.svc.put = func(ctx context.Context, body io.Reader) error {
		_, err := io.Copy(io.Discard, body)
		return errors.Join(err, slow(ctx))
	}
	r.svc.wait = slow
	ctx := soon(t)
	commit := make(chan error, 1)
	go func() {
		_, err := c.PutEpoch(ctx, key(), 0, bytes.NewReader(make([]byte, 1000)))
		commit <- err
	}()
	defer func() {
		if err := <-commit; err != nil {
			t.Errorf("a slow commit: %v", err)
		}
	}()
	if _, err := c.Failover(soon(t), wire.FailoverRequest{VM: vmA, Step: "promote"}); err != nil {
		t.Errorf("a slow step: %v", err)
	}
}

func TestACallerThatNeverReadsItsAnswersIsDropped(t *testing.T) {
	p, r, _ := pairOf(t, limits(Limits{Control: 2 * time.Second}))
	big := make([]wire.Check, 200)
	for i := range big {
		big[i] = wire.Check{Name: strings.Repeat("x", 10_000)}
	}
	r.svc.reply = wire.CheckReply{Checks: big}
	conn, err := tls.Dial("tcp", r.addr, baseTLS(p.id, protoMain, func(tls.ConnectionState) error { return nil }))
	errFatal(t, err)
	defer func() { _ = conn.Close() }()
	go func() {
		for range 100 {
			if _, err := io.WriteString(conn, "POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"); err != nil {
				return
			}
		}
	}()
	waitFor(t, func() bool { return r.svc.count() > 0 })
	waitFor(t, func() bool { n, _ := r.srv.conns.counts(); return n == 0 })
}

func TestAPeerHasABoundedNumberOfConnectionsAndTransfers(t *testing.T) {
	p, r, c := pairOf(t, limits(Limits{PerPeer: 3, BulkPerPeer: 1}))
	started, release := make(chan struct{}, 4), make(chan struct{})
	r.svc.put = func(context.Context, io.Reader) error { started <- struct{}{}; <-release; return nil }
	done := make(chan error, 1)
	go func() {
		_, err := c.PutEpoch(context.Background(), key(), 0, bytes.NewReader(nil))
		done <- err
	}()
	<-started
	if _, err := c.PutEpoch(soon(t), key(), 0, bytes.NewReader(nil)); kindOf(err) != wire.KindUnavailable || !strings.Contains(err.Error(), "under way") {
		t.Errorf("second transfer: %v", err)
	}
	// The transfer has one connection and the refused call may have one; of five
	// more at least three are closed, at least one stays.
	var wg sync.WaitGroup
	defer wg.Wait()
	var ended atomic.Int32
	for range 5 {
		extra, err := tls.Dial("tcp", r.addr, baseTLS(p.id, protoMain, func(tls.ConnectionState) error { return nil }))
		if err != nil {
			ended.Add(1)
			continue
		}
		defer func() { _ = extra.Close() }()
		wg.Go(func() {
			_, _ = extra.Read(make([]byte, 1))
			ended.Add(1)
		})
	}
	waitFor(t, func() bool { n, waiting := r.srv.conns.counts(); return waiting == 0 && n <= 3 && ended.Load() >= 3 })
	if n, _ := r.srv.conns.counts(); n != 3 || ended.Load() > 4 {
		t.Errorf("%d connections are held and %d of 5 were refused", n, ended.Load())
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// raw sends a request as a paired host would, but with any content.
func raw(t *testing.T, c *Client, method, path, contentType, body string) (int, *wire.Error) {
	t.Helper()
	req, err := http.NewRequestWithContext(soon(t), method, "https://peer"+path, strings.NewReader(body))
	errFatal(t, err)
	req.Header.Set("Content-Type", contentType)
	resp, err := c.control.RoundTrip(req)
	errFatal(t, err)
	defer func() { _ = resp.Body.Close() }()
	var e *wire.Error
	if resp.StatusCode != http.StatusOK {
		errors.As(remoteError(resp.Body, resp.StatusCode), &e)
	}
	return resp.StatusCode, e
}

func TestRequestsThatAreNotExactlyOursAreRefused(t *testing.T) {
	_, r, c := pairOf(t)
	vmq := "vm=" + string(vmA) + "&generation=" + strings.Repeat("01", 16)
	for name, q := range map[string]struct{ method, path, ct, body string }{
		"unknown call":         {"POST", "/v1/shutdown", jsonType, "{}"},
		"no version":           {"POST", "/hello", jsonType, "{}"},
		"dots":                 {"POST", "/v1/../v1/hello", jsonType, "{}"},
		"GET":                  {"GET", "/v1/status", jsonType, ""},
		"parameters":           {"POST", "/v1/status?x=1", jsonType, `{"VM":"` + string(vmA) + `"}`},
		"text":                 {"POST", "/v1/status", "text/plain", `{"VM":"` + string(vmA) + `"}`},
		"unknown field":        {"POST", "/v1/status", jsonType, `{"VM":"` + string(vmA) + `","Admin":true}`},
		"two values":           {"POST", "/v1/status", jsonType, `{"VM":"` + string(vmA) + `"}{}`},
		"not JSON":             {"POST", "/v1/status", jsonType, `VM`},
		"empty":                {"POST", "/v1/status", jsonType, ``},
		"one mebibyte":         {"POST", "/v1/status", jsonType, `{"VM":"` + strings.Repeat("a", maxControlRequest) + `"}`},
		"deep nesting":         {"POST", "/v1/offer", jsonType, `{"Spec":` + strings.Repeat("[", 200_000) + `}`},
		"number overflow":      {"POST", "/v1/progress", jsonType, `{"VM":"` + string(vmA) + `","Epoch":18446744073709551616}`},
		"negative epoch":       {"POST", "/v1/progress", jsonType, `{"VM":"` + string(vmA) + `","Epoch":-1}`},
		"path in the VM id":    {"POST", "/v1/status", jsonType, `{"VM":"../../../../etc/passwd"}`},
		"upper-case VM id":     {"POST", "/v1/status", jsonType, `{"VM":"` + strings.ToUpper(string(vmA)) + `"}`},
		"short generation":     {"POST", "/v1/progress", jsonType, `{"VM":"` + string(vmA) + `","Generation":"01","Epoch":1}`},
		"PUT without epoch":    {"PUT", "/v1/epoch?" + vmq, bulkType, ""},
		"PUT with plus sign":   {"PUT", "/v1/epoch?" + vmq + "&epoch=%2B1&nonce=1&from=0", bulkType, ""},
		"PUT with zeros":       {"PUT", "/v1/epoch?" + vmq + "&epoch=01&nonce=1&from=0", bulkType, ""},
		"PUT twice the vm":     {"PUT", "/v1/epoch?" + vmq + "&vm=x&epoch=1&nonce=1&from=0", bulkType, ""},
		"PUT beyond 32 bits":   {"PUT", "/v1/epoch?" + vmq + "&epoch=1&nonce=1&from=4294967296", bulkType, ""},
		"PUT with extra":       {"PUT", "/v1/epoch?" + vmq + "&epoch=1&nonce=1&from=0&force=1", bulkType, ""},
		"seed of a path":       {"PUT", "/v1/seed?" + vmq + "&disk=..%2Fvda&offset=0", bulkType, ""},
		"seed before the disk": {"PUT", "/v1/seed?" + vmq + "&disk=vda&offset=-1", bulkType, ""},
		"seed far behind":      {"PUT", "/v1/seed?" + vmq + "&disk=vda&offset=9223372036854775807", bulkType, ""},
	} {
		code, e := raw(t, c, q.method, q.path, q.ct, q.body)
		if e == nil || e.Kind != wire.KindInvalid && e.Kind != wire.KindNotFound {
			t.Errorf("%s: %d %v", name, code, e)
		}
	}
	if r.svc.count() != 0 {
		t.Error("the service was reached")
	}
	if _, err := c.Status(soon(t), vmA); err != nil {
		t.Errorf("an honest call afterwards: %v", err)
	}
}

func TestHugeHeadersAreRefused(t *testing.T) {
	p, r, _ := pairOf(t)
	conn, err := tls.Dial("tcp", r.addr, baseTLS(p.id, protoMain, func(tls.ConnectionState) error { return nil }))
	errFatal(t, err)
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	go func() {
		_, _ = io.WriteString(conn, "POST /v1/hello HTTP/1.1\r\nHost: x\r\n")
		for range 1000 {
			if _, err := io.WriteString(conn, "X-Filler: "+strings.Repeat("a", 1000)+"\r\n"); err != nil {
				return
			}
		}
	}()
	resp, _ := io.ReadAll(conn)
	if !bytes.HasPrefix(resp, []byte("HTTP/1.1 431")) || r.svc.count() != 0 {
		t.Errorf("answer %.40q", resp)
	}
}

// cutConn dies after a number of bytes written.
type cutConn struct {
	net.Conn
	mu   sync.Mutex
	left int
}

func (c *cutConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(p) <= c.left {
		c.left -= len(p)
		return c.Conn.Write(p)
	}
	n, _ := c.Conn.Write(p[:c.left])
	c.left = 0
	_ = c.Conn.Close()
	return n, io.ErrClosedPipe
}

func TestALinkCutAtAnyByteNeverMakesAWholeBody(t *testing.T) {
	p, r, _ := pairOf(t)
	body := bytes.Repeat([]byte("0123456789abcdef"), 1500)
	var mu sync.Mutex
	whole, cut := 0, 0
	r.svc.put = func(_ context.Context, b io.Reader) error {
		data, err := io.ReadAll(b)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			cut++
			return err
		}
		whole++
		if !bytes.Equal(data, body) {
			t.Errorf("%d of %d bytes looked complete", len(data), len(body))
		}
		return nil
	}
	answered, tries := 0, 0
	for n := 0; n < len(body)+6000; n += 211 {
		tries++
		c := p.client(t, r, func(cfg *ClientConfig) {
			cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
				c, err := dialTCP(ctx, network, addr)
				return &cutConn{Conn: c, left: n}, err
			}
		})
		_, err := c.PutEpoch(soon(t), key(), 0, bytes.NewReader(body))
		if err == nil {
			answered++
		} else if k := kindOf(err); k != wire.KindUnavailable {
			t.Errorf("cut after %d bytes: kind %d, %v", n, k, err)
		}
		_ = c.Close()
	}
	mu.Lock()
	defer mu.Unlock()
	if whole < answered || whole == 0 || cut == 0 {
		t.Fatalf("%d tries: %d arrived whole, %d cut, %d answered", tries, whole, cut, answered)
	}
	t.Logf("%d cuts: %d died before the call, %d arrived cut, %d whole, %d answered", tries, tries-whole-cut, cut, whole, answered)
}

func TestAnAnswerWithoutEndIsCutOff(t *testing.T) {
	_, r, c := pairOf(t)
	big := make([]wire.Check, 500)
	for i := range big {
		big[i] = wire.Check{Name: strings.Repeat("x", 10_000)}
	}
	r.svc.reply = wire.CheckReply{Checks: big}
	if a, err := c.Check(soon(t), wire.CheckRequest{}); kindOf(err) != wire.KindCorrupt {
		t.Fatalf("%d checks, %v", len(a.Checks), err)
	}
	r.svc.reply = wire.DigestReply{Digests: make([][16]byte, 3)}
	q := wire.DigestRequest{VM: vmA, Disk: "vda", Pos: delta.Pos{Epoch: 1}, Ranges: []wire.Range{{Off: 0, Len: 1}}}
	if a, err := c.Digests(soon(t), q); kindOf(err) != wire.KindCorrupt || a.Digests != nil {
		t.Fatalf("three digests for one range: %v", err)
	}
	r.svc.reply = wire.HandshakeReply{Role: "replica", Seeding: map[wire.DiskName]int64{"../vda": 1}}
	if _, err := c.Handshake(soon(t), wire.HandshakeRequest{VM: vmA}); kindOf(err) != wire.KindInvalid {
		t.Fatalf("a path for a disk: %v", err)
	}
	for _, a := range []wire.FailoverReply{
		{Dirty: map[wire.DiskName][]wire.Range{"vda": {{Off: -4096, Len: 8192}}}},
		{Dirty: map[wire.DiskName][]wire.Range{"vda": {{Off: 1 << 62, Len: 1 << 62}}}},
		{Dirty: map[wire.DiskName][]wire.Range{"vda": {{Off: 0, Len: 0}}}},
		{Sizes: map[wire.DiskName]int64{"vda": -1}},
	} {
		r.svc.reply = a
		if got, err := c.Failover(soon(t), wire.FailoverRequest{VM: vmA, Step: "release", Request: "r"}); kindOf(err) != wire.KindCorrupt || got.Dirty != nil || got.Sizes != nil {
			t.Fatalf("%+v: %v", a, err)
		}
	}
}

func TestNothingOfAPeerReachesTheLogRaw(t *testing.T) {
	if got := wire.CleanText("a\x1b[31m\nb\u202ec\xff", 100); strings.ContainsAny(got, "\x1b\n") || strings.Contains(got, "\u202e") {
		t.Errorf("%q", got)
	}
	if got := wire.CleanText(strings.Repeat("ж", 100), 51); len(got) > 51 || !strings.HasPrefix(got, "жж") {
		t.Errorf("%q", got)
	}
}
