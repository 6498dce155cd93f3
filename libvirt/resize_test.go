package libvirt

import (
	"context"
	"errors"
	"strings"
	"testing"
)

// resizable is a QEMU whose export has become longer: it takes the new size only
// after it has used, and so noticed the end of, its old connection.
type resizable struct {
	*simQEMU
	export  int64
	knows   int64
	resizes int
	uses    int
}

func (r *resizable) qmp(ctx context.Context, command string, args, out any) error {
	a, _ := args.(map[string]any)
	switch command {
	case "human-monitor-command":
		if !strings.HasPrefix(a["command-line"].(string), "qemu-io ") {
			return &QMPError{Command: command, Desc: "unknown command"}
		}
		if r.uses++; r.uses > 2 {
			r.knows = r.export
		}
		return nil
	case "block_resize":
		if a["size"].(int64) > r.knows {
			return &QMPError{Command: command, Desc: "Cannot grow NBD nodes"}
		}
		r.nodes[a["node-name"].(string)].size = a["size"].(int64)
		r.resizes++
		return nil
	}
	return r.simQEMU.qmp(ctx, command, args, out)
}

func TestAGuestIsShownThatItsExportHasGrown(t *testing.T) {
	q := newSim(t, true, "")
	reqs := q.reqs(0)
	r := &resizable{simQEMU: q, export: 2 << 20, knows: 1 << 20}
	var state *Error
	if err := resizeDisk(t.Context(), r, "vda", "virtio-disk0", reqs[0].Source, 2<<20); !errors.As(err, &state) || state.Kind != KindState {
		t.Errorf("a disk that is not on its export: %v", err)
	}
	if err := q.inserter().insertAll(t.Context(), reqs); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := resizeDisk(t.Context(), r, "vda", "virtio-disk0", reqs[0].Source, 2<<20); err != nil {
			t.Fatal(err)
		}
	}
	if top := q.nodes[q.devices["/machine/peripheral/virtio-disk0/virtio-backend"]]; top.size != 2<<20 || r.resizes != 1 {
		t.Errorf("the guest sees %d bytes after %d resizes", top.size, r.resizes)
	}
}
