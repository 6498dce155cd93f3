package nbd

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"kvmreplica/internal/block"
)

// Errno is an error number of the protocol. The values are fixed by it and
// equal Linux's.
type Errno uint32

// The protocol's error numbers; it knows no others.
const (
	OK        Errno = 0
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Error names the number.
func (e Errno) Error() string {
	switch e {
	case OK:
		return "no error"
	case EPERM:
		return "operation not permitted (EPERM)"
	case EIO:
		return "input/output error (EIO)"
	case ENOMEM:
		return "server out of memory (ENOMEM)"
	case EINVAL:
		return "invalid request (EINVAL)"
	case ENOSPC:
		return "no space left (ENOSPC)"
	case EOVERFLOW:
		return "reply too long (EOVERFLOW)"
	case ENOTSUP:
		return "operation not supported (ENOTSUP)"
	case ESHUTDOWN:
		return "server is shutting down (ESHUTDOWN)"
	}
	return fmt.Sprintf("error number %d", uint32(e))
}

// Is makes the numbers comparable with the errors of package block and with
// syscall.Errno.
func (e Errno) Is(target error) bool {
	switch target {
	case block.ErrReadOnly:
		return e == EPERM
	case block.ErrClosed:
		return e == ESHUTDOWN
	}
	var sys syscall.Errno
	return errors.As(target, &sys) && uint32(sys) == uint32(e)
}

// known is e, or EIO when the protocol does not know the number.
func (e Errno) known() Errno {
	switch e {
	case OK, EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN:
		return e
	}
	return EIO
}

// errnoOf maps an error of a device to the number sent for command cmd.
func errnoOf(err error, cmd uint16) Errno {
	if err == nil {
		return OK // before the variables below, which live on the heap
	}
	return errnoOfError(err, cmd)
}

func errnoOfError(err error, cmd uint16) Errno {
	var own Errno
	var sys syscall.Errno
	switch {
	case errors.As(err, &own): // an upstream server's own answer
		return own.known()
	case errors.Is(err, block.ErrRange):
		return errnoRange(cmd)
	case errors.Is(err, block.ErrReadOnly):
		return EPERM
	case errors.Is(err, block.ErrClosed), errors.Is(err, context.Canceled):
		return ESHUTDOWN
	case errors.As(err, &sys):
		return errnoOfSyscall(sys)
	}
	return EIO
}

func errnoOfSyscall(sys syscall.Errno) Errno {
	switch sys {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return EPERM
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return ENOSPC
	case syscall.ENOMEM:
		return ENOMEM
	case syscall.EOPNOTSUPP:
		return ENOTSUP
	case syscall.ESHUTDOWN:
		return ESHUTDOWN
	}
	return EIO // including EINVAL: the request was valid, the device is not
}

// errnoRange: behind the end there is no space to write, and nothing to read.
func errnoRange(cmd uint16) Errno {
	if cmd == cmdWrite || cmd == cmdZeroes {
		return ENOSPC
	}
	return EINVAL
}
