package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/libvirt"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/session"
	"kvmreplica/replicad/wire"
)

// Record is everything durable about one VM on one host, besides its tracker,
// its store and a running plan's journal. It is one JSON file that a person
// can read in a disaster, replaced atomically.
type Record struct {
	Version int             `json:"version"`
	VM      wire.VMID       `json:"vm"`
	Name    string          `json:"name"`
	Lineage lineage.Lineage `json:"lineage"`
	Peer    wire.HostID     `json:"peer"`
	// Interval between cuts while this host ships; handed on when roles change.
	Interval time.Duration `json:"interval_ns"`
	Disks    []Disk        `json:"disks"`
	// Spec is the allow-listed description, as made here or as the peer sent it.
	Spec json.RawMessage `json:"spec,omitempty"`
	// Native: the domain was this host's own before protection; it is edited,
	// never rendered. Otherwise it was rendered here from Spec.
	Native bool `json:"native"`
	// Autostart is what libvirt's flag said before we took it over.
	Autostart bool `json:"autostart"`
	// WantRunning: the guest was running when last seen, so it is started after
	// a reboot.
	WantRunning bool `json:"want_running"`
	// Placed: the persistent definition points at our exports.
	Placed bool `json:"placed"`
	// Ended: the relationship is over; only this record is left to remove.
	Ended  bool `json:"ended,omitempty"`
	Paused bool `json:"paused"`
	// Bypass are the disks whose export was found missing from the guest's block
	// graph, until everything was marked for comparison; see passes.
	Bypass string `json:"bypass,omitempty"`
	// Snapshots lay above the exports when the guest was seen last.
	Snapshots []Snapshot `json:"snapshots,omitempty"`
	// StartAt is when the initial copy begins; zero = it may.
	StartAt time.Time `json:"start_at,omitzero"`
	// OnSilent is what happens after an unclean boot with a silent peer:
	// "start" or "hold"; handed on when roles change.
	OnSilent string `json:"on_silent_peer"`
	// Shutdown is how long the guest may take to shut down in a planned failover
	// that does not say, 0 = the default; handed on when roles change.
	Shutdown time.Duration `json:"shutdown_ns,omitempty"`
	// Verified and Scrub are the session's progress of the full comparison.
	Verified bool           `json:"verified"`
	Scrub    session.Cursor `json:"scrub"`
	// Pass is the comparison of everything that a person asked for last.
	Pass *Pass `json:"pass,omitempty"`
	// NoReverse: promoted, and nothing ships back (yet).
	NoReverse bool `json:"no_reverse"`
	// Existing: the replica begins with images that were given (see existing.go);
	// nothing was committed into them yet.
	Existing bool `json:"existing,omitempty"`
	// Incomplete: the replica's base is being overwritten and holds no
	// consistent state until the next commit.
	Incomplete bool `json:"incomplete"`
	// ReleasedBase and ReleasedTracked say what the tracker of a released old
	// primary was relative to, and whether its set was proven.
	ReleasedBase    delta.Pos `json:"released_base,omitzero"`
	ReleasedTracked bool      `json:"released_tracked,omitempty"`
	// Given names the patch with which this host's present store began: what it
	// gave up then; empty = none.
	Given string `json:"given,omitempty"`
	// UnionMarked: what a released old primary had changed by itself is marked
	// in this host's tracker.
	UnionMarked bool `json:"union_marked,omitempty"`
	// Overlay is set while the guest's writes since a failover lie beside the
	// images.
	Overlay *Overlay `json:"overlay,omitempty"`
	// Next is a generation whose first epoch may be committed here already.
	Next *Succession `json:"next,omitempty"`
	// Superseded says why this host, although nothing else here tells so, must
	// not start the guest: the other host was promoted.
	Superseded string `json:"superseded,omitempty"`
	// Refused are correlation ids of promotions this host declined for good.
	Refused []string `json:"refused,omitempty"`
	// EpochFloor is where the epochs of a tracker began that replaced a lost one.
	EpochFloor uint64 `json:"epoch_floor,omitempty"`
	// Promotion is the correlation id that made Lineage.Generation here.
	Promotion string `json:"promotion,omitempty"`
	// Retention says which recovery points are kept while this host is the
	// replica, as points.ParsePolicy reads it; empty = the default. PointsQuota
	// bounds what they take in bytes, 0 = no limit but space. They are this
	// host's own: a primary asks once, when the replica is made.
	Retention   string `json:"retention,omitempty"`
	PointsQuota int64  `json:"points_quota,omitempty"`
	// AppEvery is the interval of application-consistent points while this host
	// ships, 0 = none; handed on when roles change.
	AppEvery time.Duration `json:"app_every_ns,omitempty"`
	// Rate bounds what this host sends of the VM, in bytes per second, 0 = only
	// the host's own limits do. It is this host's and stays when roles change.
	Rate int64 `json:"rate,omitempty"`
	// Orphan: the primary ended the relationship; the copy is kept until this
	// host's administrator deletes it.
	Orphan *Orphan `json:"orphan,omitempty"`
	// History says where the recovery points of the last promotion were kept.
	History string `json:"history,omitempty"`
	// Acked is the last position the peer committed, for display when the data
	// plane is off.
	Acked   delta.Pos `json:"acked,omitzero"`
	LastCut time.Time `json:"last_cut,omitzero"`
	Created time.Time `json:"created"`
}

// Orphan says how a replica lost its primary.
type Orphan struct {
	Since   time.Time `json:"since"`
	Request string    `json:"request"`
}

// Succession is a generation that follows the present one.
type Succession struct {
	Generation delta.Generation `json:"generation"`
	Ancestors  []delta.Pos      `json:"ancestors"`
}

// Disk is one protected disk on this host.
type Disk struct {
	Name wire.DiskName `json:"name"`
	Size int64         `json:"size"`
	Kind string        `json:"kind"`           // "raw", "block" or "nbd"
	Path string        `json:"path,omitempty"` // the real image; never a link
	URI  string        `json:"uri,omitempty"`  // kind nbd: the server that has the image
	// Live is the disk on its own image, as QEMU had it when it was taken over.
	Live libvirt.Disk `json:"live,omitzero"`
	// Original is what the domain said of the disk before it pointed at our
	// export; the way back.
	Original *libvirt.DiskOriginal `json:"original,omitempty"`
	// State is where the disk stands between being protected and not; see
	// diskset.go. Out: the state that the VM was failed over to did not have it.
	State DiskState `json:"state,omitempty"`
	Out   bool      `json:"out,omitempty"`
	// Of a replica's disk. New: its image is still to be made. Joins are the
	// commits in which it was not whole. Spec is what the description said of
	// one that leaves.
	New   bool            `json:"new,omitempty"`
	Joins []Span          `json:"joins,omitempty"`
	Spec  json.RawMessage `json:"spec,omitempty"`
}

const (
	recordVersion = 1
	recordFile    = "record.json"
	planFile      = "plan.json"
	maxRecord     = 4 << 20
	maxRefused    = 64
)

// loadRecord reads and validates a VM's record. Absence is fs.ErrNotExist.
func loadRecord(fsys fsx.FS) (Record, error) {
	var r Record
	if err := fsx.ReadJSON(fsys, recordFile, maxRecord, &r); err != nil {
		return r, fmt.Errorf("read the VM's record: %w", err)
	}
	if r.Version != recordVersion {
		return r, fmt.Errorf("the VM's record has version %d, this build knows %d; install the version that wrote it", r.Version, recordVersion)
	}
	if r.Lineage.VM != r.VM {
		return r, fmt.Errorf("the VM's record names %s but its lineage names %s: the state directory was copied", r.VM, r.Lineage.VM)
	}
	return r, r.Lineage.Validate()
}

func saveRecord(fsys fsx.FS, r Record) error {
	r.Version = recordVersion
	if len(r.Refused) > maxRefused {
		r.Refused = r.Refused[len(r.Refused)-maxRefused:]
	}
	if err := fsx.WriteJSON(fsys, recordFile, r); err != nil {
		return fmt.Errorf("write the VM's record: %w", err)
	}
	return nil
}

// absent reports that a record does not exist, as against being unreadable.
func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// disk finds a disk of the record.
func (r *Record) disk(name wire.DiskName) (Disk, bool) {
	for _, d := range r.Disks {
		if d.Name == name {
			return d, true
		}
	}
	return Disk{}, false
}

// serving are the disks that this host serves, or would.
func (v *VM) serving() []Disk {
	r := v.record()
	return r.served()
}

// where says to people where a disk's real content is.
func (d Disk) where() string {
	if d.Kind == diskNBD {
		return d.URI
	}
	return d.Path
}

// wireDisks is what travels.
func (r *Record) wireDisks() []wire.Disk {
	var out []wire.Disk
	for _, d := range r.served() {
		out = append(out, wire.Disk{Name: d.Name, Size: d.Size, Format: "raw", Joining: d.State == joining})
	}
	return out
}
