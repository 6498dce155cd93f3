// Package wire is what one host may ask of another: every message between two
// daemons is a method of Service, and every type here travels as JSON (control)
// or as a delta stream (bulk).
//
// replicad/peer carries Service over HTTPS with mutual certificates (its client
// implements Service, its server calls one); the daemon implements it over the
// replica stores; the session and the failover plans use it. A peer's identity
// is never in a message: the transport puts it into the context (PeerFrom).
//
// Every method is safe to repeat: a duplicate is a no-op that returns the same
// answer, or an *Error. Implementations validate every field before they
// allocate or touch anything.
package wire

import (
	"context"
	"encoding/json"
	"io"
	"time"

	"kvmreplica/replicad/delta"
)

// Protocol versions spoken by this build; Hello carries them.
const (
	ProtocolMin = 1
	ProtocolMax = 1
)

// VMID is a libvirt domain UUID in lower-case canonical form.
type VMID string

// DiskName is a disk's target device name, e.g. "vda": [a-z][a-z0-9]{0,15}.
type DiskName string

// HostID is a host's identity: the UUID in the URI SAN "kvmreplica:host:UUID"
// of its certificate.
type HostID string

// Service is everything a host offers to an authorised peer.
type Service interface {
	// Hello exchanges versions and clocks; it needs authentication only.
	Hello(ctx context.Context, r HelloRequest) (HelloReply, error)
	// Check runs the receiver's side of the connection test or of a failover's
	// prerequisites. It changes nothing.
	Check(ctx context.Context, r CheckRequest) (CheckReply, error)
	// Offer announces a VM and its current description. It creates the
	// relationship or refreshes the description; authorisation, names, room
	// and sizes are checked before anything is made.
	Offer(ctx context.Context, r Offer) (OfferReply, error)
	// Withdraw ends a relationship. A replica that holds anything stays, with
	// its recovery points: only its own host's administrator deletes it.
	Withdraw(ctx context.Context, r Withdraw) error
	// Handshake compares histories at the start of every session.
	Handshake(ctx context.Context, r HandshakeRequest) (HandshakeReply, error)
	// PutSeed streams seed chunks of one disk from r.Offset on and returns the
	// durable cursor. Allowed only while the replica is seeding.
	PutSeed(ctx context.Context, r SeedRequest, body io.Reader) (SeedReply, error)
	// EpochProgress returns the number of chunks of an epoch that are already
	// verified and kept; 0 when it is unknown.
	EpochProgress(ctx context.Context, k EpochKey) (uint32, error)
	// PutEpoch streams an epoch from chunk from on (frames as in
	// docs/formats/delta.md, header first) and returns the position after the
	// durable commit. A replica elsewhere answers KindPosMismatch.
	PutEpoch(ctx context.Context, k EpochKey, from uint32, body io.Reader) (delta.Pos, error)
	// Beat says: at this moment the primary's cut equals the committed
	// position (an empty epoch). Nothing becomes durable.
	Beat(ctx context.Context, r Beat) error
	// Digests hashes ranges of the replica's committed content with a key of
	// the caller's choice.
	Digests(ctx context.Context, r DigestRequest) (DigestReply, error)
	// Status is this host's view of one VM.
	Status(ctx context.Context, vm VMID) (PeerVM, error)
	// Points lists the recovery points this host keeps of a VM.
	Points(ctx context.Context, vm VMID) (PointsReply, error)
	// Failover carries one step of a role change.
	Failover(ctx context.Context, r FailoverRequest) (FailoverReply, error)
}

// HelloRequest opens a conversation.
type HelloRequest struct {
	Min, Max int       // protocol versions the caller speaks
	Host     HostID    // for the message only; identity is the certificate's
	Name     string    // display name
	Version  string    // product version
	Now      time.Time // for the clock-skew warning only; decides nothing
}

// HelloReply answers it. Protocol is the version to use.
type HelloReply struct {
	Protocol int
	Host     HostID
	Name     string
	Version  string
	Now      time.Time
	// Receiving is false while the host does not accept replicas.
	Receiving bool
}

// CheckRequest asks for named checks; empty VM means the connection only.
type CheckRequest struct {
	VM   VMID            `json:",omitempty"`
	For  string          // "connection", "enable", "planned", "reverse"
	Spec json.RawMessage `json:",omitempty"` // libvirt.Spec of the VM
	Need int64           // bytes that will be needed here, 0 = unknown
	// KeepPoints: the recovery points are to be kept (For "planned").
	KeepPoints bool `json:",omitempty"`
}

// CheckReply lists results in the order they were made.
type CheckReply struct{ Checks []Check }

// Check is one line of a prerequisite list. Result is three-valued.
type Check struct {
	Name   string
	Result Result
	Detail string
	Remedy string `json:",omitempty"` // next command or action, when not OK
}

// Result of a check: OK, Failed, or Unknown (could not be checked).
type Result string

// The values of Result.
const (
	OK      Result = "ok"
	Failed  Result = "failed"
	Unknown Result = "unknown"
	Warning Result = "warning"
)

// Disk describes one protected disk.
type Disk struct {
	Name   DiskName
	Size   int64  // bytes as the guest sees them, a multiple of 512
	Format string // always "raw" for what travels; the container is local
	// Joining: the disk was added later and is not whole at the replica yet. Each
	// epoch lists it with the size it has got to, or not at all.
	Joining bool `json:"joining,omitempty"`
}

// Offer announces a VM to its replica host.
type Offer struct {
	VM         VMID
	Name       string          // display name, at most 255 bytes of printable UTF-8
	Spec       json.RawMessage // allow-listed description (libvirt.Spec)
	Disks      []Disk
	Interval   time.Duration
	Generation delta.Generation // the generation that will ship
	Points     int              // about how many recovery points are asked for; the replica decides
	// Retention says which points are asked for, as points.ParsePolicy reads it.
	// It counts when the replica is made; from then on it is the replica's own.
	Retention string `json:",omitempty"`
	// AppEvery is the interval of application-consistent points, 0 = none.
	AppEvery time.Duration `json:",omitempty"`
	// OnSilent and Shutdown are settings that a failover goes on with: "" (start)
	// or "hold" after an unclean boot with a silent peer, and how long the guest may
	// take to shut down in a planned failover, 0 = the default.
	OnSilent string        `json:",omitempty"`
	Shutdown time.Duration `json:",omitempty"`
	// Existing: the replica host's administrator has put images ready; they are
	// compared instead of copied.
	Existing bool `json:",omitempty"`
	// Try asks whether such an offer of a VM that exists there would be taken,
	// with other sizes than now, and changes nothing.
	Try bool `json:",omitempty"`
	// Request correlates both hosts' journals.
	Request string
}

// OfferReply says what the replica made of it.
type OfferReply struct {
	State   string   // "created", "exists"
	Dropped []string // parts of the description that were not taken over
}

// Withdraw ends a relationship.
type Withdraw struct {
	VM      VMID
	Delete  bool // also delete the replica, if it holds nothing that was ever committed
	Request string
}

// HandshakeRequest is the primary's half.
type HandshakeRequest struct {
	VM         VMID
	Generation delta.Generation
	Ancestors  []delta.Pos // parents of Generation, nearest first
	Base       delta.Pos   // the persisted base of the tracker; zero = seeding
	Acked      delta.Pos   // last acknowledged position; zero = none
	Highest    uint64      // highest epoch ever frozen in Generation
	Disks      []Disk
	Running    bool // the VM runs here
	// Known are further positions whose digest the primary still knows, at
	// most MaxKnown; they only serve to notice two contents with one name.
	Known []delta.Pos `json:",omitempty"`
	// Before is the newest position that was committed here before Generation
	// was made. It lies behind Ancestors[0] when an older recovery point was
	// promoted; zero means Ancestors[0].
	Before delta.Pos `json:",omitzero"`
	// Between says that every block that changed between Ancestors[0] and
	// Before is known from undo segments and spools, all intact.
	Between bool `json:",omitempty"`
	// Diverged is the primary's own sticky mark.
	Diverged bool `json:",omitempty"`
	// Compared repeats the HandshakeReply.Asked for which everything was
	// compared, and what differed was committed; CommittedAt is the position that
	// is equal since.
	Compared    uint64    `json:",omitempty"`
	CommittedAt delta.Pos `json:",omitzero"`
}

// Bounds of the lists of a handshake.
const (
	MaxAncestors = 64
	MaxKnown     = 16
	MaxDisks     = 64
)

// HandshakeReply is the replica's half: facts, not a decision. Both sides run
// lineage.Decide on the same two halves.
type HandshakeReply struct {
	Role       string           // "replica", "primary", "none"
	Generation delta.Generation // of Committed; of the seed while seeding; its own for a primary
	Committed  delta.Pos        // zero while seeding
	Ancestors  []delta.Pos
	Sealed     bool // cleanly demoted and sealed at Committed
	Diverged   bool
	Running    bool               // the VM runs there
	Seeding    map[DiskName]int64 // durable cursor per disk, while seeding
	Partial    *EpochKey          // a resumable partial epoch
	VerifyAll  string             // why the replica wants everything compared
	// Asked names one wish to have everything compared, so that the end of an
	// earlier comparison is not taken for the end of this one; 0 = the wish ends
	// by itself.
	Asked uint64 `json:",omitempty"`

	// VM is the VM the answering host's own records name; empty = not told.
	VM VMID `json:",omitempty"`
	// Disks are the disks the answering host holds; empty = not told.
	Disks []DiskName `json:",omitempty"`
	// Sizes are those of the disks in Committed, so that a joining one goes on
	// where it stopped. A disk that is not in it has nothing there; empty = not
	// told, and nothing joins.
	Sizes map[DiskName]int64 `json:"sizes,omitempty"`
	// Base is what the answering host's own tracker is relative to, when it
	// was a primary; Tracked says that this tracker's set is proven complete.
	Base    delta.Pos `json:",omitzero"`
	Tracked bool      `json:",omitempty"`
	// Discard is the generation whose blocks an operator of the answering host
	// agreed to give up (they were saved first); zero = no such consent.
	Discard delta.Generation `json:",omitzero"`
}

// SeedRequest positions a seed stream.
type SeedRequest struct {
	VM         VMID
	Generation delta.Generation
	Disk       DiskName
	Offset     int64 // must equal the durable cursor or lie below it
}

// SeedReply is the durable cursor afterwards.
type SeedReply struct{ Cursor int64 }

// EpochKey names one attempt to ship one epoch.
type EpochKey struct {
	VM         VMID
	Generation delta.Generation
	Epoch      uint64
	Nonce      uint64 // random per frozen epoch
}

// Beat is an empty cut.
type Beat struct {
	VM  VMID
	Pos delta.Pos
	// Pending bytes changed since, for the replica's display.
	Pending  int64
	Interval time.Duration
}

// DigestRequest asks for keyed digests of the committed content. At most
// MaxDigestRanges ranges of at most 1 MiB each.
type DigestRequest struct {
	VM     VMID
	Pos    delta.Pos // must be the committed position; zero while there is none
	Disk   DiskName
	Key    [32]byte
	Ranges []Range
}

// MaxDigestRanges bounds one DigestRequest.
const MaxDigestRanges = 4096

// Range is a byte range of a disk.
type Range struct{ Off, Len int64 }

// DigestReply has one BLAKE3 keyed digest (first 16 bytes) per range.
type DigestReply struct{ Digests [][16]byte }

// PeerVM is one host's view of a VM.
type PeerVM struct {
	VM         VMID
	Name       string
	Role       string
	State      string
	Generation delta.Generation
	Committed  delta.Pos
	Applied    delta.Pos
	Running    bool
	Defined    bool
	Diverged   bool
	// Interrupted names a journalled plan that has not ended.
	Interrupted string
	// Pending bytes changed since Committed, when this host is the primary and
	// can tell; negative = unknown.
	Pending int64
	// Tests are those that this host made of the VM; nil = it does not tell.
	Tests *Tests `json:",omitempty"`
}

// FailoverRequest is one step of a role change. Which fields count depends on
// Step; see docs/formats/wire.md.
type FailoverRequest struct {
	VM      VMID
	Step    string // "request-planned", "promote", "query", "demoted", "release-plan", "release", "ask-start"
	Request string // correlation id
	Reason  string
	At      delta.Pos // the position both sides agree on
	Start   bool      // start the VM on the new primary
	Reverse bool      // reverse replication at once
	Force   bool
	// KeepPoints copies the replica's recovery points before they end.
	KeepPoints bool `json:",omitempty"`
	// Timeout is how long the guest may take to shut down (step
	// "request-planned"), 0 = as the VM's settings say.
	Timeout time.Duration `json:",omitempty"`
	// Before (step "request-planned") is when the request has expired, by the
	// answering host's clock: one that was held up is not begun then.
	Before time.Time `json:",omitzero"`
	// Also are ranges that the survivor will replace besides what the answering
	// host changed by itself (step "release"): they are kept with the patch.
	Also map[DiskName][]Range `json:",omitempty"`
	// Sizes are the survivor's disks (step "release"): what the answering host
	// has behind their ends is kept with the patch.
	Sizes map[DiskName]int64 `json:",omitempty"`
}

// MaxReleased bounds the ranges of one request or reply of a release.
const MaxReleased = 32768

// FailoverReply is the durable answer.
type FailoverReply struct {
	State      string // "accepted", "promoted", "not-promoted", "refused", "running", "stopped"
	Generation delta.Generation
	Parent     delta.Pos
	Detail     string
	Steps      []Step
	// Dirty are the ranges the answering host changed by itself and gives up
	// (step "release"), by disk; All says that they are not known.
	Dirty map[DiskName][]Range `json:",omitempty"`
	All   bool                 `json:",omitempty"`
	// Bytes are what would be, or was, kept as a patch (steps "release-plan" and
	// "release"); Patch is its name.
	Bytes int64  `json:",omitempty"`
	Patch string `json:",omitempty"`
	// Sizes are the answering host's disks (step "release"): whatever lies behind
	// their ends differs.
	Sizes map[DiskName]int64 `json:",omitempty"`
}

// Step is one executed step, for display.
type Step struct {
	Name   string
	Result Result
	Detail string
	Took   time.Duration
}

// Kind is the closed list of error kinds; it crosses the wire as its number.
type Kind int

// The kinds. Numbers never change.
const (
	KindInternal    Kind = 0
	KindNotFound    Kind = 1
	KindConflict    Kind = 2 // exists already, or another operation is under way
	KindRefused     Kind = 3 // not authorised, or not in this state
	KindDiverged    Kind = 4
	KindUnavailable Kind = 5 // try again later
	KindCorrupt     Kind = 6 // digest or format wrong
	KindNoSpace     Kind = 7
	KindInvalid     Kind = 8 // the request itself is wrong
	KindPosMismatch Kind = 9
	KindVersion     Kind = 10
	KindSuspect     Kind = 11 // the replica does not trust what it holds
)

// Error is an error a peer or the daemon reports: a kind to branch on, a text
// for people, and the next command where a person can mend it.
type Error struct {
	Kind Kind
	Text string
	Hint string `json:",omitempty"`
	// Have is the receiver's position for KindPosMismatch.
	Have *delta.Pos `json:",omitempty"`
}

func (e *Error) Error() string {
	if e.Hint != "" {
		return e.Text + " (" + e.Hint + ")"
	}
	return e.Text
}

// Peer is the authenticated other side of a call.
type Peer struct {
	Host HostID
	Name string
}

type peerKey struct{}

// WithPeer returns ctx carrying the authenticated peer; only transports call it.
func WithPeer(ctx context.Context, p Peer) context.Context {
	return context.WithValue(ctx, peerKey{}, p)
}

// PeerFrom returns the authenticated peer of a call; ok is false for local calls.
func PeerFrom(ctx context.Context) (p Peer, ok bool) {
	p, ok = ctx.Value(peerKey{}).(Peer)
	return p, ok
}
