package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"kvmreplica/cbt"
	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx/fsxtest"
)

// freezeDisks and freezeDirty are the VM that is frozen.
const (
	freezeDisks = 16
	freezeDirty = 400 << 20 // per disk: 102,400 granules
)

// measureFreeze freezes a VM of 16 disks while a writer writes: what the writer
// notices, and what the freeze as a whole takes, at each cost of a sync.
func measureFreeze(ctx context.Context, o *options, r *rig, rep *report) error {
	title("Freeze of %d disks with %d dirty granules each, under a writer", freezeDisks, freezeDirty/cbt.GranuleSize)
	fmt.Printf("%-6s %-34s %-34s %s\n", "sync", "longest write, us [quartiles]", "longest write without a freeze, us", "whole freeze, us")
	for _, cost := range append([]time.Duration{0}, flushCosts()...) {
		if err := freezeAt(ctx, o, r, rep, cost); err != nil {
			return err
		}
	}
	return nil
}

func freezeAt(ctx context.Context, o *options, r *rig, rep *report, cost time.Duration) (err error) {
	h := blocktest.NewHost()
	cfg := cbt.Config{FS: h.FS, VMID: "vm", BootID: "boot"}
	dir := filepath.Join(r.dir, "freeze")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for i := range freezeDisks {
		name := fmt.Sprintf("vd%c", 'a'+i)
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 100<<30)); err != nil {
			return err
		}
		f, err := block.OpenFile(path, block.FileOptions{DirtyLimit: -1})
		if err != nil {
			return err
		}
		defer f.Close()
		cfg.Disks = append(cfg.Disks, cbt.DiskConfig{Name: name, Device: f})
	}
	gen := [16]byte{1}
	g, err := cbt.Create(cfg, cbt.Start{Generation: gen, Dirty: cbt.DirtyNone})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close(context.WithoutCancel(ctx))) }()
	h.Power.SetHook(func(op fsxtest.Op) error {
		if op.Kind == fsxtest.Sync && cost > 0 {
			<-time.After(cost)
		}
		return nil
	})
	var stall, calm, whole []float64
	for range max(5, o.rounds) {
		for _, d := range cfg.Disks {
			if err := g.Disk(d.Name).Mark(0, freezeDirty); err != nil {
				return err
			}
		}
		c, s, w, err := freezeOnce(ctx, g, gen)
		if err != nil {
			return err
		}
		stall, calm, whole = append(stall, s.Seconds()*1e6), append(calm, c.Seconds()*1e6), append(whole, w.Seconds()*1e6)
	}
	show := func(s spread) string { return fmt.Sprintf("%.1f [%.1f %.1f]", s.Median, s.Low, s.High) }
	fmt.Printf("%-6s %-34s %-34s %s\n", cost, show(spreadOf(stall)), show(spreadOf(calm)), show(spreadOf(whole)))
	rep.value("freeze "+cost.String(), "longest write", "us", spreadOf(stall), 0)
	rep.value("freeze "+cost.String(), "longest write without a freeze", "us", spreadOf(calm), 0)
	rep.value("freeze "+cost.String(), "whole freeze", "us", spreadOf(whole), 0)
	return nil
}

// freezeOnce freezes beside a writer, and for comparison lets the writer write
// as long without one.
func freezeOnce(ctx context.Context, g *cbt.Group, gen [16]byte) (calm, stall, whole time.Duration, err error) {
	w := startWriter(g.Disk("vda"))
	defer func() { err = errors.Join(err, w.stop()) }()
	start := time.Now()
	w.reset()
	e, err := g.Freeze(ctx)
	if err != nil {
		return 0, 0, 0, err
	}
	whole, stall = time.Since(start), w.reset()
	<-time.After(whole)
	calm = w.reset()
	if err := e.Drain(ctx); err != nil {
		return 0, 0, 0, err
	}
	return calm, stall, whole, e.Ack(cbt.Position{Generation: gen, Epoch: e.Number()})
}

// writer writes all the time and knows its longest write.
type writer struct {
	mu      sync.Mutex
	longest time.Duration // guarded by mu
	quit    chan struct{}
	done    chan error
}

// startWriter returns when the writer is under way.
func startWriter(d *cbt.Disk) *writer {
	w := &writer{quit: make(chan struct{}), done: make(chan error, 1)}
	ready := make(chan struct{})
	go func() {
		p := make([]byte, cbt.GranuleSize)
		for i := int64(0); ; i++ {
			begun := time.Now()
			// Behind the dirty part: nothing to copy, so that only the gate counts.
			if _, err := d.WriteAt(p, freezeDirty+i%4*cbt.GranuleSize); err != nil {
				w.done <- err
				return
			}
			took := time.Since(begun)
			w.mu.Lock()
			w.longest = max(w.longest, took)
			w.mu.Unlock()
			if i == 100 {
				close(ready)
			}
			select {
			case <-w.quit:
				w.done <- nil
				return
			default:
			}
		}
	}()
	select {
	case <-ready:
	case <-time.After(patience):
	}
	return w
}

// reset returns the longest write since the last call.
func (w *writer) reset() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	longest := w.longest
	w.longest = 0
	return longest
}

func (w *writer) stop() error {
	close(w.quit)
	return <-w.done
}
