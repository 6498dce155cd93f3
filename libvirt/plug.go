package libvirt

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// ReconnectDelay is the time QEMU keeps retrying a lost export on nodes we
// add, in seconds: a day. The guest waits meanwhile and sees no error.
const ReconnectDelay = 86400

// InsertState is how far an export is under a disk of a running domain. It is
// read from QEMU itself, so a crashed run can be continued or taken back
// without remembering anything.
//
//	Out ⇄ Added ⇄ Swapped ⇄ Bare ⇄ Named ⇄ Renamed ⇄ In
//
// The guest writes to the image itself in Out and Added, to the export after.
type InsertState int

// The states on the way in (upwards) and out (downwards).
const (
	// InsertOut: the disk is on its own image, nothing of ours exists.
	InsertOut InsertState = iota
	// InsertAdded: QEMU is connected to the export (node T); not yet used.
	InsertAdded
	// InsertSwapped: the guest writes to T; libvirt's nodes of the image exist.
	InsertSwapped
	// InsertBare: the guest writes to T; the image is closed in QEMU.
	InsertBare
	// InsertNamed: nodes with libvirt's names stand ready on the export.
	InsertNamed
	// InsertRenamed: the guest writes to those; T still exists.
	InsertRenamed
	// InsertIn: done; also the state after a cold start on the export.
	InsertIn
)

// String is the state's stable name.
func (s InsertState) String() string {
	names := [...]string{"out", "added", "swapped", "bare", "named", "renamed", "in"}
	if s >= 0 && int(s) < len(names) {
		return names[s]
	}
	return "unknown"
}

// InsertRequest is one disk to put on an export, or to take off it.
type InsertRequest struct {
	// Disk is the disk on its own image (Path, Kind, Cache, Discard,
	// DetectZeroes, IO, IOThread are used): from the live document before the
	// insertion, from the kept original afterwards.
	Disk   Disk
	Source NBDSource // Reconnect is ignored: live nodes get ReconnectDelay

	// The callbacks may run more than once and must bear it; AfterReopen also
	// runs when an insertion is given up before anything was swapped.

	// AfterRelease runs when QEMU has just closed the image: take QEMU's lock
	// bytes now. An error takes everything back.
	AfterRelease func(ctx context.Context) error
	// BeforeReopen runs before QEMU opens the image again: stop epochs, sync,
	// release the lock bytes. An error stops there: the guest stays on the
	// export.
	BeforeReopen func(ctx context.Context) error
	// AfterReopen runs as soon as the guest writes to the image itself: sync
	// at once what came through the export since BeforeReopen.
	AfterReopen func(ctx context.Context) error
}

// plug is one disk's place in QEMU's block graph, and the small steps on it.
type plug struct {
	m      monitor
	req    InsertRequest
	device string // QOM path
	state  InsertState
	names  nodeNames
	exists map[string]Node
	top    string
	jobs   bool
	size   int64
}

// nodeNames are the nodes of one disk: libvirt's own, and T. T's name holds
// what is needed to make libvirt's names again when they are gone.
type nodeNames struct {
	index   string // libvirt's number
	layered bool   // a raw format node stands on the storage node
	temp    string
}

func (n nodeNames) storage() string { return "libvirt-" + n.index + "-storage" }
func (n nodeNames) format() string  { return "libvirt-" + n.index + "-format" }

// own is the node libvirt believes the device is on.
func (n nodeNames) own() string {
	if n.layered {
		return n.format()
	}
	return n.storage()
}

const tempPrefix = "kvmr-"

// namesOf derives the names from the device's present top node.
func namesOf(target, top string) (nodeNames, error) {
	var n nodeNames
	if rest, ok := strings.CutPrefix(top, tempPrefix+target+"-"); ok && len(rest) > 1 {
		n.index, n.layered = rest[:len(rest)-1], strings.HasSuffix(rest, "f")
	} else if rest, ok := strings.CutPrefix(top, "libvirt-"); ok {
		var kind string
		n.index, kind, _ = strings.Cut(rest, "-")
		n.layered = kind == "format"
		if kind != "format" && kind != "storage" {
			n.index = ""
		}
	}
	if n.index == "" || len(n.index) > 6 || strings.Trim(n.index, "0123456789") != "" {
		return n, fmt.Errorf("disk %s is on node %q, which is neither libvirt's nor ours", target, top)
	}
	mark := "s"
	if n.layered {
		mark = "f"
	}
	n.temp = tempPrefix + target + "-" + n.index + mark
	return n, nil
}

// probe reads the state anew.
func (p *plug) probe(ctx context.Context, alias string) error {
	v, err := readGraph(ctx, p.m)
	if err != nil {
		return err
	}
	t := p.req.Disk.Target
	g, err := v.disk(t, alias)
	if err != nil {
		return err
	}
	p.device, p.top, p.exists, p.size, p.jobs = g.Device, g.Top.Name, v.nodes, g.Size, g.Jobs
	if p.names, err = namesOf(t, p.top); err != nil {
		return err
	}
	p.state, err = p.stateNow()
	return err
}

// stateNow tells the state from the nodes that exist and the one in use.
func (p *plug) stateNow() (InsertState, error) {
	n := p.names
	temp, hasTemp := p.exists[n.temp]
	storage, hasStorage := p.exists[n.storage()]
	format, hasFormat := p.exists[n.format()]
	t := p.req.Disk.Target
	switch {
	case hasTemp && !isExport(temp, p.req.Source):
		return 0, fmt.Errorf("disk %s: node %s is not on the expected export but on %q", t, temp.Name, temp.File)
	case hasFormat && format.Driver != "raw":
		return 0, fmt.Errorf("disk %s: node %s is %s, not raw", t, format.Name, format.Driver)
	}
	onExport := hasStorage && storage.Driver == "nbd"
	if onExport && !isExport(storage, p.req.Source) {
		return 0, fmt.Errorf("disk %s: node %s is not on the expected export but on %q", t, storage.Name, storage.File)
	}
	if hasStorage && !onExport && storage.Driver != "file" && storage.Driver != "host_device" {
		return 0, fmt.Errorf("disk %s: node %s has driver %s", t, storage.Name, storage.Driver)
	}
	switch onTemp := p.top == n.temp; {
	case !onTemp && !hasStorage:
		return 0, fmt.Errorf("disk %s: node %s has no storage node", t, p.top)
	case !onTemp && !onExport && !hasTemp:
		return InsertOut, nil
	case !onTemp && !onExport:
		return InsertAdded, nil
	case !onTemp && hasTemp:
		return InsertRenamed, nil
	case !onTemp:
		return InsertIn, nil
	case !hasStorage:
		return InsertBare, nil
	case onExport:
		return InsertNamed, nil
	}
	return InsertSwapped, nil
}

// forward makes one step towards In.
func (p *plug) forward(ctx context.Context) error {
	n := p.names
	switch p.state {
	case InsertOut:
		if p.jobs {
			return fmt.Errorf("disk %s: a block job is running in this guest; wait for it or abort it", p.req.Disk.Target)
		}
		if err := p.add(ctx, p.nbdNode(n.temp, true), n.temp); err != nil {
			return err
		}
		return p.checkSize(ctx)
	case InsertAdded:
		return p.use(ctx, n.temp)
	case InsertSwapped:
		if err := p.del(ctx, n.format(), n.storage()); err != nil {
			return err
		}
		return runHook(ctx, "after the image was closed", p.req.AfterRelease)
	case InsertBare:
		// Again, for a run that was cut off just before the callback.
		if err := runHook(ctx, "after the image was closed", p.req.AfterRelease); err != nil {
			return err
		}
		return p.addOwn(ctx, p.nbdNode(n.storage(), !n.layered))
	case InsertNamed:
		if err := p.completeOwn(ctx); err != nil {
			return err
		}
		return p.use(ctx, n.own())
	case InsertRenamed:
		return p.del(ctx, n.temp)
	}
	return nil
}

// backward makes one step towards Out.
func (p *plug) backward(ctx context.Context) error {
	n := p.names
	switch p.state {
	case InsertIn:
		return p.add(ctx, p.nbdNode(n.temp, true), n.temp)
	case InsertRenamed:
		return p.use(ctx, n.temp)
	case InsertNamed:
		return p.del(ctx, n.format(), n.storage())
	case InsertBare:
		if err := runHook(ctx, "before the image is opened again", p.req.BeforeReopen); err != nil {
			return err
		}
		return p.addOwn(ctx, p.imageNode(n.storage(), !n.layered))
	case InsertSwapped:
		if err := p.completeOwn(ctx); err != nil {
			return err
		}
		if err := p.use(ctx, n.own()); err != nil {
			return err
		}
		return runHook(ctx, "after the guest is on its image again", p.req.AfterReopen)
	case InsertAdded:
		// Again, for a run that was cut off just before the callback.
		if err := runHook(ctx, "after the guest is on its image again", p.req.AfterReopen); err != nil {
			return err
		}
		return p.del(ctx, n.temp)
	}
	return nil
}

func runHook(ctx context.Context, when string, fn func(context.Context) error) error {
	if fn == nil {
		return nil
	}
	if err := fn(ctx); err != nil {
		return fmt.Errorf("%s: %w", when, err)
	}
	return nil
}

// addOwn makes the nodes with libvirt's names on storage node opts.
func (p *plug) addOwn(ctx context.Context, opts map[string]any) error {
	n := p.names
	if !n.layered {
		return p.add(ctx, opts, n.storage())
	}
	if err := p.add(ctx, opts, ""); err != nil {
		return err
	}
	return p.add(ctx, p.rawNode(), n.format())
}

// completeOwn adds the format node when a crash left only its storage node.
func (p *plug) completeOwn(ctx context.Context) error {
	if _, has := p.exists[p.names.format()]; has || !p.names.layered {
		return nil
	}
	return p.add(ctx, p.rawNode(), p.names.format())
}

// add makes a node and, when it is to be used by a device in an iothread,
// moves it there.
func (p *plug) add(ctx context.Context, opts map[string]any, top string) error {
	if err := p.m.qmp(ctx, "blockdev-add", opts, nil); err != nil {
		return err
	}
	if top == "" || p.req.Disk.IOThread == 0 {
		return nil
	}
	return p.m.qmp(ctx, "x-blockdev-set-iothread", map[string]any{
		"node-name": top, "iothread": fmt.Sprintf("iothread%d", p.req.Disk.IOThread),
	}, nil)
}

// del removes nodes that exist, in the order given.
func (p *plug) del(ctx context.Context, names ...string) error {
	for _, n := range names {
		if _, has := p.exists[n]; !has {
			continue
		}
		if err := p.m.qmp(ctx, "blockdev-del", map[string]any{"node-name": n}, nil); err != nil {
			return err
		}
	}
	return nil
}

// use puts the guest's device on a node. QEMU drains all requests first.
func (p *plug) use(ctx context.Context, node string) error {
	if p.req.Disk.IOThread != 0 {
		// A node whose iothread was never set (a crash in between) is refused
		// by qom-set; setting it twice is harmless.
		if err := p.m.qmp(ctx, "x-blockdev-set-iothread", map[string]any{
			"node-name": node, "iothread": fmt.Sprintf("iothread%d", p.req.Disk.IOThread),
		}, nil); err != nil {
			return err
		}
	}
	return p.m.qmp(ctx, "qom-set", map[string]any{"path": p.device, "property": "drive", "value": node}, nil)
}

// checkSize refuses an export of another size than the guest's disk.
func (p *plug) checkSize(ctx context.Context) error {
	v, err := readGraph(ctx, p.m)
	if err != nil {
		return err
	}
	n, ok := v.nodes[p.names.temp]
	if !ok {
		return errors.New("the new node is not there")
	}
	if n.Size != p.size {
		return fmt.Errorf("disk %s has %d bytes but its export has %d; nothing was changed", p.req.Disk.Target, p.size, n.Size)
	}
	if n.ReadOnly {
		return fmt.Errorf("disk %s: the export is read-only; nothing was changed", p.req.Disk.Target)
	}
	return nil
}
