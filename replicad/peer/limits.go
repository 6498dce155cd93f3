package peer

import (
	"context"
	"io"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// Deadlines, by name.
const (
	dialTimeout      = 10 * time.Second
	handshakeTimeout = 10 * time.Second // TLS and request header, both sides
	idleTimeout      = 2 * time.Minute  // between requests of one connection
	controlTimeout   = 30 * time.Second // ordinary control calls
	digestTimeout    = 2 * time.Minute  // Digests reads up to 4 GiB there
	failoverTimeout  = 10 * time.Minute // a step may start or stop a guest
	offerTimeout     = 2 * time.Minute  // the replica allocates disks
	answerTimeout    = 30 * time.Second // from the first byte of an answer to its last
	commitTimeout    = 5 * time.Minute  // from the end of a body to its durable answer
	stallTimeout     = 60 * time.Second // a bulk body or a socket that does not move
	continueTimeout  = 30 * time.Second // the other side's leave to send a body
	testTimeout      = 20 * time.Second // the whole connection test
)

// Sizes of what travels as JSON.
const (
	maxControlRequest = 1 << 20
	maxControlReply   = 4 << 20
	maxHeader         = 16 << 10
)

// Limits bound what strangers and peers may hold. The zero value means the
// defaults.
type Limits struct {
	// Conns is the total number of connections (default 512).
	Conns int
	// PreAuth is the number of connections that have not proven an identity
	// yet (default 64). When it is reached the oldest of them is dropped.
	PreAuth int
	// PreAuthPerSource is the same per source address (default 16).
	PreAuthPerSource int
	// PerPeer is the number of connections of one paired host (default 32).
	PerPeer int
	// BulkPerPeer is the number of seeds and epochs one paired host may send
	// at once (default 8).
	BulkPerPeer int
	// Handshake, Control and Stall are how long a caller may take for TLS and
	// the header (default 10 s), for sending a control request or taking its
	// answer (30 s), and between two pieces of a bulk body (60 s).
	Handshake, Control, Stall time.Duration
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.Conns, 512)
	def(&l.PreAuth, 64)
	def(&l.PreAuthPerSource, 16)
	def(&l.PerPeer, 32)
	def(&l.BulkPerPeer, 8)
	if l.Handshake <= 0 {
		l.Handshake = handshakeTimeout
	}
	if l.Control <= 0 {
		l.Control = controlTimeout
	}
	if l.Stall <= 0 {
		l.Stall = stallTimeout
	}
	return l
}

// Bandwidth limits bulk bodies to a number of bytes per second. The zero value
// does not limit. Safe for concurrent use; several streams share one budget.
type Bandwidth struct {
	limit atomic.Pointer[rate.Limiter]
}

// maxPiece bounds what is read at once, and so the error of the limit.
const maxPiece = 64 << 10

// Set changes the limit; 0 or less means none. Streams under way follow within
// the time one piece takes, at most a tenth of a second above 10 KiB/s.
func (b *Bandwidth) Set(bytesPerSecond int64) {
	if bytesPerSecond <= 0 {
		b.limit.Store(nil)
		return
	}
	b.limit.Store(rate.NewLimiter(rate.Limit(bytesPerSecond), piece(bytesPerSecond)))
}

// Get is the present limit; 0 means none.
func (b *Bandwidth) Get() int64 {
	if l := b.limit.Load(); l != nil {
		return int64(l.Limit())
	}
	return 0
}

func piece(bytesPerSecond int64) int {
	return int(min(max(bytesPerSecond/10, 1<<10), maxPiece))
}

// Reader returns r limited by b; a wait ends with ctx.
func (b *Bandwidth) Reader(ctx context.Context, r io.Reader) io.Reader {
	return &limitedReader{ctx: ctx, band: b, r: r}
}

type limitedReader struct {
	ctx  context.Context
	band *Bandwidth
	r    io.Reader
}

func (l *limitedReader) Read(p []byte) (int, error) {
	lim := l.band.limit.Load()
	if lim == nil {
		return l.r.Read(p)
	}
	if len(p) > lim.Burst() {
		p = p[:lim.Burst()]
	}
	n, err := l.r.Read(p)
	if n > 0 {
		if werr := lim.WaitN(l.ctx, n); werr != nil {
			return n, werr
		}
	}
	return n, err
}
