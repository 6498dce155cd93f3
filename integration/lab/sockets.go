package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Listen listens on an address of the host, which must be an IP and a port; the
// caller's own process accepts. It stays bound to the host's network until the
// host goes down.
func (h *Host) Listen(network, addr string) (net.Listener, error) {
	var ln net.Listener
	err := h.onNetwork(func() (err error) {
		ln, err = net.Listen(network, addr)
		return err
	})
	return ln, err
}

// Dial connects from the host to an address, which must be an IP and a port.
func (h *Host) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var c net.Conn
	err := h.onNetwork(func() (err error) {
		var d net.Dialer
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// onNetwork runs fn on a thread that is in the host's network namespace. A
// socket belongs to the namespace in which it was made, whoever uses it later.
func (h *Host) onNetwork(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		back, err := h.joinNetwork()
		if err != nil {
			runtime.UnlockOSThread() // still where it was
			done <- err
			return
		}
		err = fn()
		if backErr := back(); backErr != nil {
			// The thread stays locked, and ends with this goroutine.
			done <- errors.Join(err, backErr)
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("on the network of host %s: %w", h.name, err)
	}
	return nil
}

// joinNetwork moves the calling thread; back returns it.
func (h *Host) joinNetwork() (back func() error, err error) {
	own, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	if err != nil {
		return nil, err
	}
	its, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", h.Pid()))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("the host is not running: %w", err), own.Close())
	}
	defer its.Close()
	if err := unix.Setns(int(its.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, errors.Join(err, own.Close())
	}
	return func() error {
		return errors.Join(unix.Setns(int(own.Fd()), unix.CLONE_NEWNET), own.Close())
	}, nil
}
