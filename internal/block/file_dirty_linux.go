package block

import (
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// dirtyState bounds the dirty page cache of one file. Bytes are counted as
// they are written; at half the limit a goroutine starts writeback of the
// whole file and takes off what it covered; at the limit writers wait. The
// count is an upper bound: a page written twice counts twice.
type dirtyState struct {
	limit int64 // <= 0: no bound
	bytes atomic.Int64

	kick chan struct{} // capacity 1
	busy chan struct{} // capacity 1; full while writeback runs or may not
	quit chan struct{}
	done chan struct{}
	once sync.Once

	mu      sync.Mutex
	changed *sync.Cond // bytes fell, or stopped
	stopped bool       // guarded by mu
}

// startWriteback starts the writeback goroutine when there is a bound.
func (f *File) startWriteback(limit int64) {
	d := &f.dirty
	if limit == 0 {
		limit = DefaultDirtyLimit
	}
	if f.readOnly || limit < 0 {
		return
	}
	d.limit = limit
	d.changed = sync.NewCond(&d.mu)
	d.kick = make(chan struct{}, 1)
	d.busy = make(chan struct{}, 1)
	d.quit = make(chan struct{})
	d.done = make(chan struct{})
	go d.run(f.writeback)
}

// run calls writeback whenever it was kicked, until stop.
func (d *dirtyState) run(writeback func()) {
	defer close(d.done)
	for {
		select {
		case <-d.quit:
			return
		case <-d.kick:
		}
		select {
		case <-d.quit:
			return
		case d.busy <- struct{}{}:
		}
		covered := d.bytes.Load()
		writeback()
		<-d.busy
		d.mu.Lock()
		d.bytes.Add(-covered)
		d.changed.Broadcast()
		d.mu.Unlock()
	}
}

// writeback pushes the dirty pages out and waits for them. An error here has
// taken the kernel's record of the failure, so it counts as a failed Sync.
func (f *File) writeback() {
	const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	for {
		err := unix.SyncFileRange(f.fd, 0, 0, flags)
		switch {
		case err == nil, errors.Is(err, unix.ENOSYS), errors.Is(err, unix.ESPIPE):
			return
		case errors.Is(err, unix.EINTR):
			continue
		}
		f.failSync(err)
		return
	}
}

func (d *dirtyState) full() bool { return d.limit > 0 && d.bytes.Load() >= d.limit }

func (d *dirtyState) add(n int64) {
	if d.limit > 0 && d.bytes.Add(n) >= d.limit/2 {
		select {
		case d.kick <- struct{}{}:
		default:
		}
	}
}

// wait returns once there is room, or the file is being closed.
func (d *dirtyState) wait() {
	if !d.full() {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.full() && !d.stopped {
		d.changed.Wait()
	}
}

// stop ends the goroutine and releases every waiter. Twice is harmless.
func (d *dirtyState) stop() {
	if d.limit <= 0 {
		return
	}
	d.once.Do(func() {
		d.mu.Lock()
		d.stopped = true
		d.changed.Broadcast()
		d.mu.Unlock()
		close(d.quit)
	})
	<-d.done
}

// DirtyBytes is an upper bound of what was written and not yet written back.
func (f *File) DirtyBytes() int64 { return f.dirty.bytes.Load() }
