package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// Position says where our export stands in a disk's real block graph.
type Position string

// The three cases, and the one in which nothing can be said.
const (
	// PositionTop: every guest write reaches the export.
	PositionTop Position = "top"
	// PositionBelowOverlay: an external snapshot stands above the export;
	// guest writes land there until it is merged. Tracking stays exact.
	PositionBelowOverlay Position = "below-overlay"
	// PositionAbsent: the guest writes past us.
	PositionAbsent Position = "absent"
)

// DiskGraph is the real block graph of one disk, asked of QEMU itself.
type DiskGraph struct {
	Target   string
	Device   string // QOM path of the device's drive property
	Top      Node
	Position Position
	// Ours is the node of our export; empty when it is absent.
	Ours string
	// Overlays are the file names above our export, top first.
	Overlays []string
	// Jobs says that a block job works on this graph.
	Jobs bool
	Size int64 // what the guest sees
}

// Node is one node of a block graph.
type Node struct {
	Name, Driver, File string
	ReadOnly           bool
	Size               int64
}

// Graph reads the real block graph of every disk of a running domain, keyed by
// target, and finds exports in it. A disk that is missing in exports is
// reported with PositionAbsent.
func (h *Host) Graph(ctx context.Context, uuid string, exports map[string]NBDSource) (map[string]DiskGraph, error) {
	d, err := h.Domain(ctx, uuid)
	if err != nil {
		return nil, err
	}
	if d.State == StateOff || d.State == StateCrashed {
		return nil, &Error{Op: "read block graph of " + uuid, Kind: KindState, Msg: "it is " + string(d.State)}
	}
	v, err := readGraph(ctx, domainMonitor{h, uuid})
	if err != nil {
		return nil, fmt.Errorf("read block graph of %s: %w", uuid, err)
	}
	out := map[string]DiskGraph{}
	for _, k := range d.Disks {
		g, err := v.disk(k.Target, k.Alias)
		if errors.Is(err, errNoMedium) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read block graph of %s: %w", uuid, err)
		}
		v.locate(&g, exports[k.Target])
		out[k.Target] = g
	}
	return out, nil
}

// graphView is QEMU's answer to three questions, taken one after another.
type graphView struct {
	devices []qBlock
	nodes   map[string]Node
	edges   map[string][]qChild // by parent node
	jobs    bool
}

type qChild struct{ edge, node string }

type qBlock struct {
	QDev     string `json:"qdev"`
	Inserted *struct {
		Node string `json:"node-name"`
	} `json:"inserted"`
}

type qNode struct {
	Name   string `json:"node-name"`
	Driver string `json:"drv"`
	File   string `json:"file"`
	RO     bool   `json:"ro"`
	Image  struct {
		Size int64 `json:"virtual-size"`
	} `json:"image"`
}

type qGraph struct {
	Nodes []struct {
		ID   int64  `json:"id"`
		Type string `json:"type"`
		Name string `json:"name"`
	} `json:"nodes"`
	Edges []struct {
		Parent int64  `json:"parent"`
		Child  int64  `json:"child"`
		Name   string `json:"name"`
	} `json:"edges"`
}

func readGraph(ctx context.Context, m monitor) (*graphView, error) {
	v := &graphView{nodes: map[string]Node{}, edges: map[string][]qChild{}}
	if err := m.qmp(ctx, "query-block", nil, &v.devices); err != nil {
		return nil, err
	}
	var ns []qNode
	if err := m.qmp(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &ns); err != nil {
		return nil, err
	}
	for _, n := range ns {
		v.nodes[n.Name] = Node{Name: n.Name, Driver: n.Driver, File: n.File, ReadOnly: n.RO, Size: n.Image.Size}
	}
	var g qGraph
	if err := m.qmp(ctx, "x-debug-query-block-graph", nil, &g); err != nil {
		return nil, err
	}
	drivers := map[int64]string{}
	for _, n := range g.Nodes {
		switch n.Type {
		case "block-driver":
			drivers[n.ID] = n.Name
		case "block-job":
			v.jobs = true
		}
	}
	for _, e := range g.Edges {
		p, isNode := drivers[e.Parent]
		c, known := drivers[e.Child]
		if isNode && known {
			v.edges[p] = append(v.edges[p], qChild{e.Name, c})
		}
	}
	return v, nil
}

var (
	errNoMedium = errors.New("the drive is empty")
	errNoDevice = errors.New("QEMU has no such device")
)

// disk finds the device of a disk by libvirt's alias.
func (v *graphView) disk(target, alias string) (DiskGraph, error) {
	path := "/machine/peripheral/" + alias
	for _, b := range v.devices {
		if alias == "" || b.QDev == "" {
			continue
		}
		if b.QDev != alias && b.QDev != path && !strings.HasPrefix(b.QDev, path+"/") {
			continue
		}
		g := DiskGraph{Target: target, Device: b.QDev, Jobs: v.jobs, Position: PositionAbsent}
		if !strings.HasPrefix(g.Device, "/") {
			g.Device = path
		}
		if b.Inserted == nil {
			return g, fmt.Errorf("disk %s: %w", target, errNoMedium)
		}
		n, ok := v.nodes[b.Inserted.Node]
		if !ok {
			n = Node{Name: b.Inserted.Node}
		}
		g.Top, g.Size = n, n.Size
		return g, nil
	}
	return DiskGraph{}, fmt.Errorf("disk %s (alias %q): %w", target, alias, errNoDevice)
}

// locate walks from the device's top node down to the export. A "backing" edge
// of anything but a filter is an overlay; a mirror's "target" is not where the
// guest's data lives, so it is not followed.
func (v *graphView) locate(g *DiskGraph, src NBDSource) {
	if src.Socket == "" {
		return
	}
	type place struct {
		node     string
		overlays []string
	}
	queue := []place{{node: g.Top.Name}}
	for seen := map[string]bool{}; len(queue) > 0; queue = queue[1:] {
		p := queue[0]
		if seen[p.node] {
			continue
		}
		seen[p.node] = true
		n := v.nodes[p.node]
		if isExport(n, src) {
			g.Ours, g.Overlays = n.Name, p.overlays
			g.Position = PositionTop
			if len(p.overlays) > 0 {
				g.Position = PositionBelowOverlay
			}
			return
		}
		for _, c := range v.edges[p.node] {
			next := place{node: c.node, overlays: p.overlays}
			switch c.edge {
			case "file":
			case "backing":
				if !isFilter(n.Driver) {
					next.overlays = append(append([]string(nil), p.overlays...), imageFile(n.File))
				}
			default:
				continue
			}
			queue = append(queue, next)
		}
	}
}

// imageFile is the file of a node whose name QEMU writes as JSON, because its
// backing file is not the one that the image names; else the name as it is.
func imageFile(name string) string {
	rest, found := strings.CutPrefix(name, "json:")
	if !found {
		return name
	}
	var j struct {
		File struct {
			Filename string `json:"filename"`
		} `json:"file"`
	}
	if json.Unmarshal([]byte(rest), &j) != nil || j.File.Filename == "" {
		return name
	}
	return j.File.Filename
}

func isFilter(driver string) bool {
	switch driver {
	case "mirror_top", "commit_top", "copy-on-read", "copy-before-write", "backup-top", "throttle", "preallocate", "snapshot-access":
		return true
	}
	return false
}

// isExport reports whether a node is the NBD client of src.
func isExport(n Node, src NBDSource) bool {
	if n.Driver != "nbd" {
		return false
	}
	sock, export, ok := nbdFile(n.File)
	return ok && sock == src.Socket && export == src.Export
}

// nbdFile reads QEMU's name of an NBD node over a unix socket.
func nbdFile(file string) (socket, export string, ok bool) {
	if rest, found := strings.CutPrefix(file, "nbd+unix:///"); found {
		export, socket, ok = strings.Cut(rest, "?socket=")
		return socket, export, ok
	}
	rest, found := strings.CutPrefix(file, "json:")
	if !found {
		return "", "", false
	}
	var j struct {
		Export string `json:"export"`
		Server struct {
			Path string `json:"path"`
		} `json:"server"`
		Path string `json:"server.path"`
	}
	if json.Unmarshal([]byte(rest), &j) != nil {
		return "", "", false
	}
	return j.Server.Path + j.Path, j.Export, true
}
