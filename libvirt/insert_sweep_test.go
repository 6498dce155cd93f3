package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
)

// simQEMU is QEMU's block layer as far as the insertion uses it, with the
// refusals a real one makes.
type simQEMU struct {
	t       *testing.T
	devices map[string]string // qdev → top node
	nodes   map[string]*simNode
	thread  map[string]string // qdev → iothread
	// locked: images on which replicad holds QEMU's lock bytes.
	locked map[string]bool
	swaps  []string

	calls  int
	failAt int // index of the call that fails; 0 = none
	after  bool
	dead   bool // every call fails from there on: our process is gone
	crash  bool
}

type simNode struct {
	driver, file, child, thread string
	size                        int64
}

var errLost = errors.New("the answer was lost")

func newSim(t *testing.T, layered bool, iothread string) *simQEMU {
	q := &simQEMU{t: t, devices: map[string]string{}, nodes: map[string]*simNode{}, thread: map[string]string{}, locked: map[string]bool{}}
	for n, dev := range []string{"virtio-disk0", "virtio-disk1"} {
		storage := fmt.Sprintf("libvirt-%d-storage", n+1)
		q.nodes[storage] = &simNode{driver: "file", file: fmt.Sprintf("/img/%d.raw", n), size: 1 << 20, thread: iothread}
		top := storage
		if layered {
			top = fmt.Sprintf("libvirt-%d-format", n+1)
			q.nodes[top] = &simNode{driver: "raw", child: storage, size: 1 << 20, thread: iothread}
		}
		qdev := "/machine/peripheral/" + dev + "/virtio-backend"
		q.devices[qdev], q.thread[qdev] = top, iothread
	}
	return q
}

func (q *simQEMU) qmp(_ context.Context, command string, args, out any) error {
	if q.dead {
		return errLost
	}
	q.calls++
	if q.calls == q.failAt && !q.after {
		q.dead = q.crash
		return &QMPError{Command: command, Desc: "injected"}
	}
	res, err := q.do(command, args)
	if q.calls == q.failAt && q.after {
		q.dead = q.crash
		return errLost
	}
	if err != nil {
		return &QMPError{Command: command, Desc: err.Error()}
	}
	if out == nil {
		return nil
	}
	b, _ := json.Marshal(res)
	return json.Unmarshal(b, out)
}

func (q *simQEMU) inUse(name string) bool {
	for _, top := range q.devices {
		if top == name {
			return true
		}
	}
	for _, n := range q.nodes {
		if n.child == name {
			return true
		}
	}
	return false
}

func (q *simQEMU) do(command string, args any) (any, error) {
	a, _ := args.(map[string]any)
	str := func(k string) string { s, _ := a[k].(string); return s }
	switch command {
	case "query-block":
		var r []any
		for d, top := range q.devices {
			r = append(r, map[string]any{"qdev": d, "inserted": map[string]any{"node-name": top}})
		}
		return r, nil
	case "query-named-block-nodes":
		var r []any
		for name, n := range q.nodes {
			r = append(r, map[string]any{"node-name": name, "drv": n.driver, "file": n.file, "image": map[string]any{"virtual-size": n.size}})
		}
		return r, nil
	case "x-debug-query-block-graph":
		return q.graph(), nil
	case "blockdev-add":
		return nil, q.add(a)
	case "blockdev-del":
		if q.nodes[str("node-name")] == nil {
			return nil, errors.New("no such node")
		}
		if q.inUse(str("node-name")) {
			return nil, errors.New("node is in use")
		}
		delete(q.nodes, str("node-name"))
		return nil, nil
	case "x-blockdev-set-iothread":
		for n := q.nodes[str("node-name")]; n != nil; n = q.nodes[n.child] {
			n.thread = str("iothread")
		}
		return nil, nil
	case "qom-set":
		return nil, q.swap(str("path"), str("value"))
	}
	return nil, fmt.Errorf("unknown command %s", command)
}

func (q *simQEMU) graph() any {
	ids := map[string]int{}
	var nodes, edges []any
	for name := range q.nodes {
		ids[name] = len(ids) + 1
		nodes = append(nodes, map[string]any{"id": ids[name], "type": "block-driver", "name": name})
	}
	for name, n := range q.nodes {
		if n.child != "" {
			edges = append(edges, map[string]any{"parent": ids[name], "child": ids[n.child], "name": "file"})
		}
	}
	return map[string]any{"nodes": nodes, "edges": edges}
}

func (q *simQEMU) add(a map[string]any) error {
	name := a["node-name"].(string)
	if q.nodes[name] != nil {
		return errors.New("duplicate node name")
	}
	n := &simNode{driver: a["driver"].(string), size: 1 << 20}
	switch n.driver {
	case "nbd":
		n.file = fmt.Sprintf("nbd+unix:///%s?socket=%s", a["export"], a["server"].(map[string]any)["path"])
	case "file":
		n.file = a["filename"].(string)
	case "raw":
		n.child = a["file"].(string)
		if q.nodes[n.child] == nil {
			return errors.New("no such child")
		}
	}
	q.nodes[name] = n
	return nil
}

func (q *simQEMU) swap(path, node string) error {
	n := q.nodes[node]
	if n == nil {
		return errors.New("no such node")
	}
	if n.thread != q.thread[path] {
		return errors.New("different aio context is not supported for new node")
	}
	root := n
	for root.child != "" {
		root = q.nodes[root.child]
	}
	if root.driver == "file" && q.locked[root.file] {
		return errors.New(`failed to get "write" lock`)
	}
	q.devices[path] = node
	q.swaps = append(q.swaps, node)
	return nil
}

// reqs are requests whose callbacks keep the lock as the daemon would.
func (q *simQEMU) reqs(iothread int) []InsertRequest {
	var out []InsertRequest
	for n, target := range []string{"vda", "vdb"} {
		img := fmt.Sprintf("/img/%d.raw", n)
		out = append(out, InsertRequest{
			Disk:   Disk{Target: target, Bus: "virtio", Device: "disk", Kind: SourceFile, Path: img, Format: "raw", Cache: "none", IOThread: iothread},
			Source: NBDSource{Socket: "/run/r/" + target + ".sock", Export: target},
			AfterRelease: func(context.Context) error {
				q.locked[img] = true
				return nil
			},
			BeforeReopen: func(context.Context) error {
				delete(q.locked, img)
				return nil
			},
		})
	}
	return out
}

func (q *simQEMU) inserter() *inserter {
	return &inserter{
		uuid: "u",
		open: func(ctx context.Context, r InsertRequest) (*plug, string, error) {
			alias := map[string]string{"vda": "virtio-disk0", "vdb": "virtio-disk1"}[r.Disk.Target]
			p := &plug{m: q, req: r}
			return p, alias, p.probe(ctx, alias)
		},
		explain: func(_ InsertRequest, err error) error { return err },
	}
}

// all reports the state of both disks.
func (q *simQEMU) states(i *inserter, reqs []InsertRequest) []InsertState {
	var out []InsertState
	for _, r := range reqs {
		st, err := i.probe(q.t.Context(), r)
		if err != nil {
			q.t.Fatalf("probe: %v", err)
		}
		out = append(out, st)
	}
	return out
}

func variants(t *testing.T, run func(t *testing.T, layered bool, iothread int)) {
	for _, layered := range []bool{true, false} {
		for _, th := range []int{0, 1} {
			t.Run(fmt.Sprintf("layered=%v,iothread=%d", layered, th), func(t *testing.T) { run(t, layered, th) })
		}
	}
}

func threadName(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("iothread%d", n)
}

func TestEveryFailingCommandOfAnInsertionIsTakenBack(t *testing.T) {
	variants(t, func(t *testing.T, layered bool, th int) {
		total := 0
		for n := 0; n <= total; n++ {
			for _, after := range []bool{false, true} {
				q := newSim(t, layered, threadName(th))
				i, reqs := q.inserter(), q.reqs(th)
				q.failAt, q.after = n, after
				err := i.insertAll(t.Context(), reqs)
				if n == 0 {
					total = q.calls
					if err != nil {
						t.Fatal(err)
					}
					continue
				}
				if err == nil {
					t.Fatalf("call %d (after=%v) failed and nobody noticed", n, after)
				}
				q.failAt = 0
				if st := q.states(i, reqs); !slices.Equal(st, []InsertState{InsertOut, InsertOut}) {
					t.Fatalf("call %d (after=%v): left in %v by %v", n, after, st, err)
				}
				q.clean(layered)
			}
		}
		if total < 50 {
			t.Fatalf("only %d commands were swept", total)
		}
	})
}

// clean checks that nothing of ours is left and libvirt's nodes are whole.
func (q *simQEMU) clean(layered bool) {
	q.t.Helper()
	want := 2
	if layered {
		want = 4
	}
	if len(q.nodes) != want {
		q.t.Fatalf("%d nodes are left: %v", len(q.nodes), sortedKeys(q.nodes))
	}
	if len(q.locked) > 0 {
		q.t.Fatal("replicad still holds the image lock")
	}
}

func TestACrashAtEveryCommandCanBeContinuedOrTakenBack(t *testing.T) {
	variants(t, func(t *testing.T, layered bool, th int) {
		if layered == (th == 0) {
			return // two of the four combinations cover every line
		}
		for _, inward := range []bool{true, false} {
			total := 0
			for n := 0; n <= total; n++ {
				for mode := range 4 {
					after, onward := mode&1 == 1, mode&2 == 2
					q := newSim(t, layered, threadName(th))
					i, reqs := q.inserter(), q.reqs(th)
					if !inward {
						if err := i.insertAll(t.Context(), reqs); err != nil {
							t.Fatal(err)
						}
					}
					q.calls, q.failAt, q.after, q.crash = 0, n, after, true
					if inward {
						_ = i.insertAll(t.Context(), reqs)
					} else {
						_ = i.removeAll(t.Context(), reqs)
					}
					if n == 0 {
						total = q.calls
						continue
					}
					// A new process looks at what is there.
					q.dead, q.failAt = false, 0
					var err error
					want := []InsertState{InsertOut, InsertOut}
					if onward == inward {
						want = []InsertState{InsertIn, InsertIn}
						err = i.insertAll(t.Context(), reqs)
					} else {
						err = i.removeAll(t.Context(), reqs)
					}
					if err != nil {
						t.Fatalf("inward=%v, crash at call %d (after=%v), then onward=%v: %v", inward, n, after, onward, err)
					}
					if st := q.states(i, reqs); !slices.Equal(st, want) {
						t.Fatalf("inward=%v, crash at call %d (after=%v), then onward=%v: %v", inward, n, after, onward, st)
					}
					if want[0] == InsertOut {
						q.clean(layered)
					} else if len(q.locked) != 2 {
						t.Fatalf("inward=%v, crash at call %d (after=%v): in, but only %v are locked", inward, n, after, q.locked)
					}
				}
			}
		}
	})
}

func TestAnExportOfAnotherSizeIsRefusedBeforeAnySwap(t *testing.T) {
	q := newSim(t, true, "")
	for _, n := range q.nodes {
		n.size = 1<<20 + 512
	}
	i, reqs := q.inserter(), q.reqs(0)
	if err := i.insertAll(t.Context(), reqs); err == nil {
		t.Fatal("accepted")
	}
	if len(q.swaps) != 0 {
		t.Fatalf("the guest's disk was swapped: %v", q.swaps)
	}
	q.clean(true)
}

func TestAForeignNodeUnderOurNameIsNotTouched(t *testing.T) {
	q := newSim(t, true, "")
	q.nodes["kvmr-vda-1f"] = &simNode{driver: "nbd", file: "nbd+unix:///other?socket=/x"}
	i, reqs := q.inserter(), q.reqs(0)
	if _, err := i.probe(t.Context(), reqs[0]); err == nil {
		t.Fatal("taken for ours")
	}
}
