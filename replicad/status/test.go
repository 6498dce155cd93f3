package status

import (
	"time"

	"kvmreplica/replicad/wire"
)

// Test is a test copy of a VM that exists on this host.
type Test struct {
	ID      string `json:"id"`
	Name    string `json:"name"` // of its domain
	UUID    string `json:"uuid"`
	Purpose string `json:"purpose"` // "test" or "drill"
	// Point is the position the copy runs on, Ordinal its number when it was a
	// recovery point, Cut the primary's clock at the cut.
	Point   string    `json:"point"`
	Ordinal uint64    `json:"ordinal,omitempty"`
	Cut     time.Time `json:"cut"`
	Started time.Time `json:"started"`
	Phase   string    `json:"phase"`           // "starting", "running", "ending"
	Guest   string    `json:"guest,omitempty"` // what libvirt says of it
	// Isolated: no network card leads anywhere; Proven is when that was last
	// asked of the kernel.
	Isolated bool          `json:"isolated"`
	Proven   time.Time     `json:"proven,omitzero"`
	Networks []TestNetwork `json:"networks,omitempty"`
	Console  string        `json:"console,omitempty"` // file of the serial port's output
	Written  int64         `json:"written_bytes"`
	Quota    int64         `json:"quota_bytes"`
	Trouble  string        `json:"trouble,omitempty"`
}

// TestNetwork is one network card of a test copy.
type TestNetwork struct {
	Logical  string `json:"logical"` // the network's name on the primary
	MAC      string `json:"mac"`
	Network  string `json:"network,omitempty"`
	Bridge   string `json:"bridge,omitempty"`
	Isolated bool   `json:"isolated"`
	IP       string `json:"ip,omitempty"` // reserved for it
}

// TestEnd is the last test copy of a VM that was taken away, on either host.
type TestEnd = wire.TestEnd

// Drill is one failover drill and what it proved, on either host.
type Drill = wire.Drill
