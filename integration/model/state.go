// Package model is an explicit-state model of how a primary tracks changes and
// hands them to a replica: the write path, freeze, copy-before-write, shipping,
// acknowledging, abandoning, the lazy clean step, the handshake, and what a
// process death or a power cut leaves. It follows ARCHITECTURE.md and imports
// nothing of the product; it asks whether the rules are enough, not whether the
// code obeys them.
//
// Explore visits every state that any interleaving of the steps can reach for
// one program of guest writes and checks the invariants in each of them.
//
// # What is modelled
//
// Two connections write a fixed list of writes, each of one or two granules,
// granule by granule. A granule on the platter holds any value it had since the
// last sync of the image; a mark of the intent map, the base and the highest
// frozen number likewise until their own sync. One epoch is frozen at a time;
// it stays protected by copy-before-write until Ack or Abandon. The replica's
// commit is one step; its answer may be lost. The replica may be put back to
// the state before its last commit. After a crash, granules may be compared with
// the replica and become clean. A clean stop keeps the exact bits. A process death keeps the page cache and
// the exact bitmap; a power cut keeps neither.
//
// # Invariants
//
//	I1  a granule that differs from the committed one is dirty, whenever the
//	    handshake would trust the dirty set
//	I1d the same in every state a crash leaves
//	I2  data is written only where the mark is durable
//	I3  no write is in an older epoch than one it saw answered
//	I4  the frozen content never changes once drained, and is the cut
//	I5  what the replica commits is the cut, over all disks
//	I6  a region is cleared only when idle, clean, synced, and the last epoch
//	    that contained it acknowledged
//	I9  a number that left the host never names another content
//	I10 a clear never becomes visible before the base it depends on is durable
//
// What is not modelled: time, the size of anything, torn intent pages (they
// read as "all marked"), failing syncs, promotion.
package model

// maxGranules and maxRegions bound a layout.
const (
	maxGranules = 6
	maxRegions  = 4
)

// slot is one guest write in flight.
type slot struct {
	write uint8 // 1-based index into the program; 0 = idle
	at    step
	tag   uint8 // epoch it belongs to; 0 = not yet tagged
	saw   uint8 // highest tag among writes answered before its issue
	left  uint8 // granules still to be written
}

// step is where a write stands.
type step uint8

const (
	written step = iota // holds its ranges; intent pages handed over, not synced
	marked              // every region it touches is durably marked
	tagged              // has its epoch and its bits; writes its granules
)

// phase is where the clean step stands.
type phase uint8

const (
	resting     phase = iota
	imageSynced       // the base comes next
	baseWritten       // and is not synced
	baseSynced        // the clears come next
	cleared           // mutant: the base comes after the clears
)

// state is one configuration of the whole system. It is comparable.
type state struct {
	image   [maxGranules]uint8 // what a read of the primary returns
	platter [maxGranules]uint8 // set of values a power cut may leave, as bits
	replica [maxGranules]uint8 // committed content
	before  [maxGranules]uint8 // content before the last commit
	cut     [maxGranules]uint8 // what the frozen epoch must contain (ghost)
	copied  [maxGranules]uint8 // old content kept by copy-before-write
	lastTag [maxRegions]uint8  // last epoch that contains changes of a region

	slots [2]slot

	active  uint8 // dirty bits, by granule
	frozen  uint8
	kept    uint8 // frozen granules whose old content was copied
	late    uint8 // mutant: bits that return only after the next freeze
	mayZero uint8 // regions whose mark may be absent after a cut
	mayOne  uint8 // regions whose mark may be present after a cut
	shown   uint8 // marks as the page cache has them
	durable uint8 // marks RAM believes durable

	next      uint8 // next write of the program
	current   uint8 // number new writes are tagged with
	epoch     uint8 // the frozen epoch, 0 = none
	half      bool  // mutant: disk 0 is frozen, the others not yet
	acked     uint8 // position A is relative to
	committed uint8 // replica's position
	previous  uint8 // and before its last commit
	answer    bool  // the answer to the commit is on its way
	partial   bool  // bytes of the frozen epoch have left the host
	session   bool  // the handshake was made

	highest uint8 // highest frozen number as the page cache has it
	highs   uint8 // set of values a cut may leave, as bits
	base    uint8 // base as the page cache has it
	bases   uint8

	clean   phase // where the clean step stands
	covered uint8 // the position it works for

	compared uint8 // granule whose comparison is under way, plus one

	sawDone uint8 // highest tag of an answered write (ghost)
	left    uint8 // highest number of which bytes left the host (ghost)

	freezes, crashes, rollbacks, stops uint8
}

// Target is a set of granules one write covers, lowest first.
type Target []uint8

// Config is the size of a model and which mutant it has.
type Config struct {
	Granules []Granule // at most 6
	Program  []Target  // at most 7 writes
	Epochs   int       // freezes at most; 6 at most
	Crashes  int
	// Rollbacks: how often the replica may be put back by one commit.
	Rollbacks int
	// Stops: how often the process may be stopped in order and started again.
	Stops int
	// Compares: after a crash, granules that equal the replica's committed
	// content may be found so by digest and become clean.
	Compares bool
	Mutant   Mutant
	// Rules checks I2, I6 and I10 as rules, at the step that would break
	// them. Without it only their consequences (I1, I1d, I3, I4, I5, I9) are.
	Rules bool
	// MaxStates ends the search unfinished; 0 = 20 million.
	MaxStates int
	// Compact keeps only fingerprints of states that were dealt with: a tenth
	// of the memory, but a violation comes without its trace.
	Compact bool
}

// Granule says where a granule lies.
type Granule struct{ Disk, Region uint8 }

// Mutant is a deliberate fault in the design.
type Mutant uint8

// The mutants. Sound is the design.
const (
	Sound                Mutant = iota
	IntentAfterData             // data first, mark afterwards
	BelieveUnsynced             // a mark counts as durable before its sync (B1)
	OpenTrustsPages             // after a kill, unsynced pages count as durable
	ClearWithoutSync            // regions cleared without an image sync
	ClearForLaterAck            // sync, then an ack, then clearing what that ack freed
	ClearPinned                 // regions of writes in flight are cleared
	ClearBySubtraction          // ack removes the frozen bits from the active ones
	CopyAfterWrite              // copy-before-write comes after the write
	NoLockAcrossEpochs          // no range lock between an old and a new write
	FreezePerDisk               // one disk after the other
	NoDrain                     // shipped while writes of the epoch are running
	YoungerKept                 // the next epoch goes without what an abandoned one had
	KillLosesFrozen             // after a kill only the active bits are taken
	BaseAfterClears             // the base is persisted after the clears
	NumberAfterShipping         // bytes leave before the number is durable
	BehindAckedIsTrusted        // a replica behind the acknowledged position counts as a lost ack
	RebaseInMemory              // going back behind the base is not made durable
	NoHandshake                 // shipping goes on without asking where the replica is
	RecoveredAsOld              // what a crash made dirty again counts as written long ago
	CompareForgetsWrites        // a comparison does not notice a write that was already running
	StopKeepsBase               // a clean stop keeps the exact bits but not the position they are relative to
	mutants
)

// String names the mutant.
func (m Mutant) String() string {
	names := [...]string{
		"sound", "intent after data", "mark believed before its sync", "open trusts unsynced pages",
		"clear without image sync", "clear for a later ack", "clear under a write in flight",
		"clear by subtraction", "copy after write", "no range lock between epochs", "freeze per disk",
		"no drain", "younger epoch kept after its parent was abandoned", "kill loses the frozen bits",
		"base persisted after clears", "number persisted after shipping", "replica behind the acked position trusted",
		"rebase in memory only", "no handshake", "recovered regions counted as old",
		"comparison forgets a running write", "clean stop forgets what its bits are relative to",
	}
	if int(m) < len(names) {
		return names[m]
	}
	return "?"
}

// Mutants lists all of them but Sound.
func Mutants() []Mutant {
	var out []Mutant
	for m := Sound + 1; m < mutants; m++ {
		out = append(out, m)
	}
	return out
}
