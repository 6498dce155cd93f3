package sim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
)

const (
	recordFile = "record.json"
	planFile   = "plan.json"
)

// record is what a host knows of the VM, durably; vm.Record is its model.
type record struct {
	Lineage lineage.Lineage
	// Promotion is the correlation id of the promotion that made the present
	// generation here; Refused are those declined for good.
	Promotion string   `json:",omitempty"`
	Refused   []string `json:",omitempty"`
	// NoReverse: nothing is shipped until somebody asks for it.
	NoReverse   bool
	WantRunning bool
	// Incomplete: the images came from this host's own time as a primary and
	// are no consistent state.
	Incomplete      bool
	ReleasedBase    delta.Pos
	ReleasedTracked bool
	UnionMarked     bool
	Superseded      string
	// Next is who may follow once its first epoch is committed.
	Next *succession `json:",omitempty"`
}

type succession struct {
	Generation delta.Generation
	Ancestors  []delta.Pos
}

// loadRecord reads the record; false when the VM is not known here.
func (h *host) loadRecord() (bool, error) {
	b, err := fsx.ReadFile(h.m.FS, recordFile, 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	h.rec = record{}
	return true, json.Unmarshal(b, &h.rec)
}

// update makes a changed record durable before it counts.
func (h *host) update(edit func(*record)) error {
	r := h.rec
	r.Refused = append([]string(nil), h.rec.Refused...)
	edit(&r)
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := fsx.WriteAtomic(h.m.FS, recordFile, b); err != nil {
		return fmt.Errorf("write the record: %w", err)
	}
	h.rec = r
	return nil
}

// move is a change of role, with what goes along with it.
func (h *host) move(c lineage.Change, edit func(*record)) error {
	l, err := h.rec.Lineage.Apply(c)
	if err != nil {
		return err
	}
	err = h.update(func(r *record) {
		r.Lineage = l
		if edit != nil {
			edit(r)
		}
	})
	if err == nil {
		h.w.count("role " + string(c.Event))
	}
	return err
}
