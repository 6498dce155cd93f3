package overlay

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Room looks at the free bytes of the file system of Dir, at most so often: an
// overlay may grow while Reserve stays free. The zero Reserve asks for nothing.
type Room struct {
	Dir     string
	Reserve int64

	last  atomic.Int64 // when it was looked at, unix nanoseconds
	short atomic.Bool
}

const roomEvery = 200 * time.Millisecond

// Enough says whether there is room.
func (r *Room) Enough() bool {
	if r.Reserve <= 0 {
		return true
	}
	now := time.Now().UnixNano()
	if last := r.last.Load(); now-last > int64(roomEvery) && r.last.CompareAndSwap(last, now) {
		free, err := FreeBytes(r.Dir)
		r.short.Store(err == nil && free < r.Reserve)
	}
	return !r.short.Load()
}

// Check is an error that is syscall.ENOSPC when there is no room.
func (r *Room) Check() error {
	if r.Enough() {
		return nil
	}
	return fmt.Errorf("less than %d bytes are free in %s: %w", r.Reserve, r.Dir, syscall.ENOSPC)
}

// FreeBytes of the file system of dir.
func FreeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("look at the free space of %s: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}
