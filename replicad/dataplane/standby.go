package dataplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/overlay"
	"kvmreplica/replicad/points"
	"kvmreplica/replicad/standby"
	"kvmreplica/replicad/wire"
)

// OverlayConfig says where a VM lives that was failed over for the time being.
type OverlayConfig struct {
	// Dir holds the overlay's log, Store the replica store it stands on.
	Dir   string `json:"dir"`
	Store string `json:"store"`
	// Rate bounds what is written into the images after the commit, in bytes
	// per second; 0 = 64 MiB.
	Rate int64 `json:"rate,omitempty"`
	// Aside are disks that the store has beside those that are served: the state
	// failed over to did not have them. Their images are opened when it asks.
	Aside []DiskConfig `json:"aside,omitempty"`
}

// Flattening in the background.
const (
	flattenRate  = 64 << 20
	flattenRetry = 10 * time.Second
)

// flattening is the back end of a VM that was failed over: the disks over the
// replica's state, and the way from there to plain images.
type flattening struct {
	cfg    Config
	log    *slog.Logger
	disks  *standby.Standby
	begin  chan struct{} // closed when there is something to flatten
	once   sync.Once
	cancel context.CancelFunc // ends run
	ctx    context.Context
	ended  chan struct{} // closed when run will touch nothing any more

	mu      sync.Mutex
	failure string // guarded by mu
	running bool   // guarded by mu
}

// openOverlay puts the overlay's disks above the images.
func (p *Plane) openOverlay() error {
	if p.cfg.Overlay == nil {
		return nil
	}
	c, err := p.standbyConfig()
	if err != nil {
		return err
	}
	s, err := standby.Open(c)
	if errors.Is(err, fs.ErrNotExist) {
		return &wire.Error{Kind: wire.KindCorrupt, Text: "what the guest wrote since the failover is missing: " + err.Error(), Hint: "mount the file system of " + p.cfg.Overlay.Dir + ", or give the writes up: replicactl failover cancel " + p.cfg.Name}
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.over = &flattening{cfg: p.cfg, log: p.log, disks: s, begin: make(chan struct{}), ended: make(chan struct{}), ctx: ctx, cancel: cancel}
	for _, i := range p.images {
		dev := s.Disk(string(i.cfg.Name))
		if dev == nil {
			return fmt.Errorf("disk %s is not part of the failover", i.cfg.Name)
		}
		i.under, i.dev = i.dev, dev
	}
	if s.Status().Phase != overlay.Running {
		p.over.start()
	}
	return nil
}

// setAside is the image of a disk that is not served, nil for any other. It is
// opened once.
func (p *Plane) setAside(disk string) (*image, error) {
	p.asideMu.Lock()
	defer p.asideMu.Unlock()
	for _, i := range p.aside {
		if string(i.cfg.Name) == disk {
			return i, nil
		}
	}
	for _, d := range p.cfg.Overlay.Aside {
		if string(d.Name) != disk {
			continue
		}
		i, err := p.parts.image(context.Background(), d, p.cfg.DirtyBytes)
		if err == nil && d.QemuLock {
			if err = i.lock(); err != nil {
				err = errors.Join(err, i.dev.Close())
			}
		}
		if err != nil {
			return nil, fmt.Errorf("disk %s, which only recovery points have: %w", disk, err)
		}
		p.aside = append(p.aside, i)
		return i, nil
	}
	return nil, nil
}

func (p *Plane) standbyConfig() (standby.Config, error) {
	var c standby.Config
	dir, err1 := fsx.OS(p.cfg.Overlay.Dir)
	store, err2 := fsx.OS(p.cfg.Overlay.Store)
	shared, err3 := fsx.OS(p.cfg.SharedDir)
	boot, err4 := p.cfg.bootID()
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return c, fmt.Errorf("open the overlay: %w", err)
	}
	byName := func(disk string) (*image, error) {
		if i, err := p.setAside(disk); i != nil || err != nil {
			return i, err
		}
		_, i, err := p.image(wire.DiskName(disk))
		return i, err
	}
	c.Image = func(disk string) (block.Device, error) {
		i, err := byName(disk)
		if err != nil {
			return nil, err
		}
		if i.under != nil {
			return i.under, nil
		}
		return i.dev, nil
	}
	c.Store = points.Config{FS: store, VM: p.vm, Log: p.log.With("part", "points"), Identity: func(disk string) (points.Identity, error) {
		i, err := byName(disk)
		if err != nil {
			return points.Identity{}, err
		}
		if i.file == nil {
			return points.Identity{File: i.cfg.URI}, nil
		}
		id, err := i.file.Identity()
		return points.FileIdentity(id), err
	}}
	c.Overlay = overlay.Config{FS: dir, Shared: shared, BootID: boot, Data: func(disk string, _ int64) (block.Device, error) {
		i, err := byName(disk)
		if err != nil {
			return nil, err
		}
		return block.OpenFile(i.cfg.Overlay, block.FileOptions{})
	}}
	return c, nil
}

// commitOverlay makes it durable that the guest's writes stay.
func (p *Plane) commitOverlay() error {
	if p.over == nil {
		return nil // the images are the disks already
	}
	if err := p.over.disks.Commit(); err != nil {
		return err
	}
	p.over.start()
	return nil
}

// history says what the commit will end.
func (p *Plane) history() (HistoryReply, error) {
	if p.over == nil {
		return HistoryReply{}, standby.ErrEnded
	}
	h, err := p.over.disks.History()
	return HistoryReply(h), err
}

// keepPoints copies the recovery points for as long as somebody waits for it.
func (p *Plane) keepPoints(ctx context.Context, r KeepRequest) (KeepReply, error) {
	if p.over == nil {
		return KeepReply{}, standby.ErrEnded
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.over.ctx, cancel)() // the disks are being closed
	c, err := p.over.disks.KeepPoints(ctx, r.Dir)
	return KeepReply(c), err
}

func (p *Plane) overlayStatus() *OverlayStatus {
	if p.over == nil {
		return nil
	}
	s := p.over.disks.Status()
	p.over.mu.Lock()
	defer p.over.mu.Unlock()
	return &OverlayStatus{Phase: s.Phase.String(), At: s.Head.At, Bytes: s.Bytes, Moved: s.Moved, Failure: p.over.failure}
}

// closeOverlay ends the flattening where it is and lets go of everything but
// the images.
func (p *Plane) closeOverlay() error {
	if p.over == nil {
		return nil
	}
	p.over.cancel()
	p.over.mu.Lock()
	running := p.over.running
	p.over.mu.Unlock()
	if running {
		<-p.over.ended
	}
	return p.over.disks.Close()
}

func (f *flattening) start() { f.once.Do(func() { close(f.begin) }) }

// run flattens once that is decided, until it is done, ctx ends or the overlay
// is closed.
func (f *flattening) run(ctx context.Context) {
	f.mu.Lock()
	f.running = true
	f.mu.Unlock()
	defer close(f.ended)
	defer context.AfterFunc(ctx, f.cancel)()
	select {
	case <-f.ctx.Done():
		return
	case <-f.begin:
	}
	for {
		err := f.disks.Flatten(f.ctx, pacer(f.cfg.Overlay.Rate))
		if err == nil {
			err = f.tidy()
		}
		if err == nil || f.ctx.Err() != nil {
			return
		}
		f.log.Error("bring the images to what the guest wrote", "err", err)
		f.mu.Lock()
		f.failure = err.Error()
		f.mu.Unlock()
		select {
		case <-f.ctx.Done():
			return
		case <-time.After(flattenRetry):
		}
	}
}

// tidy removes what counts no more.
func (f *flattening) tidy() error {
	f.mu.Lock()
	f.failure = ""
	f.mu.Unlock()
	for _, d := range f.cfg.Disks {
		if err := os.Remove(d.Overlay); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the overlay's file: %w", err)
		}
	}
	f.log.Info("the images hold everything, the overlay has ended", "bytes", f.disks.Status().Moved)
	return nil
}

// pacer keeps the background work below a rate, over the time since it began.
func pacer(rate int64) points.Pace {
	if rate <= 0 {
		rate = flattenRate
	}
	begun, done := time.Now(), int64(0)
	return func(ctx context.Context, n int64) error {
		done += n
		wait := time.Duration(float64(done)/float64(rate)*float64(time.Second)) - time.Since(begun)
		if wait < 10*time.Millisecond {
			return ctx.Err()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
			return nil
		}
	}
}
