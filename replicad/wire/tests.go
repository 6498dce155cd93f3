package wire

import "time"

// Tests is what one host tells of the test copies and drills it made of a VM.
// It is for display; nothing is decided by it.
type Tests struct {
	Copies    int      `json:"copies"` // that exist now
	Last      *TestEnd `json:"last_test,omitempty"`
	LastDrill *Drill   `json:"last_drill,omitempty"`
	Proven    *Drill   `json:"proven,omitempty"` // the last that succeeded
}

// TestEnd is the last test copy of a VM that was taken away.
type TestEnd struct {
	Host    string    `json:"host,omitempty"` // on which it was
	Name    string    `json:"name"`
	Purpose string    `json:"purpose"`
	Point   string    `json:"point"`
	Cut     time.Time `json:"cut"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended"`
	Ran     bool      `json:"ran"`              // its guest was let run
	Reason  string    `json:"reason,omitempty"` // why it ended when nobody asked for that
}

// Drill is one failover drill and what it proved.
type Drill struct {
	Host    string        `json:"host,omitempty"` // on which it was
	VM      string        `json:"vm"`
	Started time.Time     `json:"started"`
	OK      bool          `json:"ok"`
	Point   string        `json:"point"`
	Cut     time.Time     `json:"cut"`
	Proof   string        `json:"proof"`
	RTO     time.Duration `json:"rto_ns"` // from the command to the proof; 0 = not proven
	Failure string        `json:"failure,omitempty"`
	Report  string        `json:"report"` // file of the whole report, Markdown; .json beside it
}

// On names the host that t is of.
func (t Tests) On(host string) {
	if t.Last != nil {
		t.Last.Host = host
	}
	for _, d := range []*Drill{t.LastDrill, t.Proven} {
		if d != nil {
			d.Host = host
		}
	}
}

// MaxPath bounds the name of a file on the other host.
const MaxPath = 4096

// Clean makes t fit to be told: texts come from guests, libvirt and programs.
func (t Tests) Clean() Tests {
	if t.Last != nil {
		e := *t.Last
		e.Name, e.Reason = CleanText(e.Name, MaxName), CleanText(e.Reason, MaxText)
		t.Last = &e
	}
	for _, d := range []**Drill{&t.LastDrill, &t.Proven} {
		if *d != nil {
			c := **d
			c.VM, c.Proof = CleanText(c.VM, MaxName), CleanText(c.Proof, MaxText)
			c.Failure, c.Report = CleanText(c.Failure, MaxText), CleanText(c.Report, MaxPath)
			*d = &c
		}
	}
	return t
}

// Validate refuses what no honest peer answers.
func (t Tests) Validate() error {
	if t.Copies < 0 {
		return invalid("%d test copies", t.Copies)
	}
	if e := t.Last; e != nil {
		if err := firstError(checkText("name", e.Name, MaxName), checkText("host name", e.Host, MaxName), checkText("purpose", e.Purpose, MaxName),
			checkText("position", e.Point, MaxName), checkText("reason", e.Reason, MaxText)); err != nil {
			return err
		}
	}
	for _, d := range []*Drill{t.LastDrill, t.Proven} {
		if d == nil {
			continue
		}
		if err := firstError(checkText("VM name", d.VM, MaxName), checkText("host name", d.Host, MaxName), checkText("position", d.Point, MaxName),
			checkText("proof", d.Proof, MaxText), checkText("failure", d.Failure, MaxText), checkText("report", d.Report, MaxPath)); err != nil {
			return err
		}
	}
	return nil
}
