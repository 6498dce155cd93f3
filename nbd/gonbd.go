package nbd

import (
	"fmt"

	"github.com/pojntfx/go-nbd/pkg/backend"

	"kvmreplica/internal/block"
)

// backendAdapter shows a Device to go-nbd's server.
type backendAdapter struct{ dev block.Device }

var _ backend.Backend = backendAdapter{}

// ReadOnlyBackend shows dev as a go-nbd back end that refuses writes. That
// server has no flush, answers one request at a time and hangs up on errors, so
// it is good for local, trusted readers only; a guest's disk belongs on Server.
func ReadOnlyBackend(dev block.Device) backend.Backend { return backendAdapter{dev: dev} }

// ReadAt implements backend.Backend.
func (b backendAdapter) ReadAt(p []byte, off int64) (int, error) { return b.dev.ReadAt(p, off) }

// WriteAt implements backend.Backend; it always fails.
func (b backendAdapter) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// Size implements backend.Backend.
func (b backendAdapter) Size() (int64, error) { return b.dev.Size(), nil }

// Sync implements backend.Backend.
func (b backendAdapter) Sync() error { return nil }

// BackendDevice makes a read-only Device of a go-nbd back end.
func BackendDevice(b backend.Backend) (block.Device, error) {
	size, err := b.Size()
	if err != nil {
		return nil, fmt.Errorf("size of the back end: %w", err)
	}
	return &backendDevice{b: b, size: size}, nil
}

type backendDevice struct {
	b    backend.Backend
	size int64
}

var _ block.Device = (*backendDevice)(nil)

// ReadAt checks the range first: some back ends hang or panic behind the end.
func (d *backendDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := block.Check(off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	return d.b.ReadAt(p, off)
}

// WriteAt implements block.Device; it always fails.
func (d *backendDevice) WriteAt([]byte, int64) (int, error) { return 0, block.ErrReadOnly }

// ZeroAt implements block.Device; it always fails.
func (d *backendDevice) ZeroAt(_, _ int64, _ bool) error { return block.ErrReadOnly }

// Sync implements block.Device.
func (d *backendDevice) Sync() error { return nil }

// Size implements block.Device.
func (d *backendDevice) Size() int64 { return d.size }

// Close implements block.Device; the back end belongs to the caller.
func (d *backendDevice) Close() error { return nil }
