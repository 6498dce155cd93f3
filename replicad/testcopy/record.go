package testcopy

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// Phase of a copy.
type Phase string

// The phases.
const (
	Starting Phase = "starting"
	Running  Phase = "running" // its guest was let run once
	Ending   Phase = "ending"
)

// Copy is everything durable about one test copy. It is one JSON file, written
// before anything is made for it.
type Copy struct {
	Version int       `json:"version"`
	ID      string    `json:"id"`
	VM      wire.VMID `json:"vm"`
	Of      string    `json:"of"` // the VM's name
	Name    string    `json:"name"`
	UUID    string    `json:"uuid"`
	At      delta.Pos `json:"at"`
	Ordinal uint64    `json:"ordinal,omitempty"`
	Cut     time.Time `json:"cut"`
	Disks   []string  `json:"disks"`
	NICs    []NIC     `json:"nics,omitempty"`
	Quota   int64     `json:"quota_bytes"`
	Boot    string    `json:"boot_id"`
	Request string    `json:"request"`
	// Purpose is "test" or "drill".
	Purpose string    `json:"purpose"`
	Started time.Time `json:"started"`
	Phase   Phase     `json:"phase"`
	// Pinned: the point was pinned for this copy.
	Pinned bool `json:"pinned"`
	// Reason is why it is ending, when nobody asked for that.
	Reason string `json:"reason,omitempty"`
	// Ran: its guest was let run.
	Ran bool `json:"ran"`
	// Serial: the guest has a serial port, whose output is kept.
	Serial bool `json:"serial"`
}

// NIC is one network card of a copy.
type NIC struct {
	// Origin is the address of the real VM's card, MAC the copy's.
	Origin string `json:"origin"`
	MAC    string `json:"mac"`
	// Logical is the network's name on the primary, Network the libvirt network,
	// HostBridge the bridge that the copy's card is in.
	Logical    string `json:"logical"`
	Network    string `json:"network,omitempty"`
	HostBridge string `json:"host_bridge,omitempty"`
	// Bridge is that of an isolated network, which was made for this copy.
	Bridge   string `json:"bridge,omitempty"`
	Isolated bool   `json:"isolated"`
	User     bool   `json:"user,omitempty"`
	// IP is reserved for the card.
	IP string `json:"ip,omitempty"`
}

// owner names the copy as the owner of its pin.
func (c *Copy) owner() string { return "test:" + c.ID }

// Isolated reports whether no card of the copy leads anywhere.
func (c *Copy) Isolated() bool {
	for _, n := range c.NICs {
		if !n.Isolated {
			return false
		}
	}
	return true
}

// Ended is what is remembered of a copy.
type Ended struct {
	ID      string    `json:"id"`
	VM      wire.VMID `json:"vm"`
	Of      string    `json:"of"`
	Name    string    `json:"name"`
	Purpose string    `json:"purpose"`
	Point   string    `json:"point"`
	Cut     time.Time `json:"cut"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended"`
	// Ran: its guest was let run.
	Ran bool `json:"ran"`
	// Reason is why it ended when nobody asked for that; empty = asked.
	Reason string `json:"reason,omitempty"`
}

const (
	copyFile    = "copy.json"
	startFile   = "start.json"
	stopFile    = "stop.json"
	endedFile   = "ended.json"
	testsDir    = "tests"
	copyVersion = 1
	maxCopy     = 1 << 20
)

// loadCopy reads a record. Absence is fs.ErrNotExist.
func loadCopy(fsys fsx.FS) (Copy, error) {
	var c Copy
	if err := fsx.ReadJSON(fsys, copyFile, maxCopy, &c); err != nil {
		return c, fmt.Errorf("read the test copy's record: %w", err)
	}
	if c.Version != copyVersion {
		return c, fmt.Errorf("the test copy's record has version %d, this build knows %d", c.Version, copyVersion)
	}
	return c, nil
}

func saveCopy(fsys fsx.FS, c Copy) error {
	c.Version = copyVersion
	return saveJSON(fsys, copyFile, c, "write the test copy's record")
}

func saveJSON(fsys fsx.FS, name string, v any, what string) error {
	if err := fsx.WriteJSON(fsys, name, v); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// endedCopies is ended.json.
type endedCopies struct {
	Version int     `json:"version"`
	Copies  []Ended `json:"copies"`
}

// loadEnded reads what is remembered; a damaged file is forgotten, it is only
// for display.
func (m *Manager) loadEnded() []Ended {
	var f endedCopies
	err := fsx.ReadJSON(m.fsys, endedFile, maxCopy, &f)
	if err == nil && f.Version != copyVersion {
		err = fmt.Errorf("version %d, this build knows %d", f.Version, copyVersion)
	}
	if err != nil && !absent(err) {
		m.deps.Log.Warn("what is remembered of earlier tests cannot be read", "err", err)
		return nil
	}
	return f.Copies
}

// remember adds a copy to what is remembered; twice is harmless.
func (m *Manager) remember(e Ended) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.ended {
		if o.ID == e.ID {
			return nil
		}
	}
	all := append(m.ended[:len(m.ended):len(m.ended)], e)
	if len(all) > maxEnded {
		all = all[len(all)-maxEnded:]
	}
	if err := saveJSON(m.fsys, endedFile, endedCopies{copyVersion, all}, "remember the test"); err != nil {
		return err
	}
	m.ended = all
	return nil
}
