package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	lv "github.com/digitalocean/go-libvirt"
)

// Kind is a class of failure; the list is closed.
type Kind int

// The kinds of failure.
const (
	// KindInternal: libvirt failed in a way we have no better word for.
	KindInternal Kind = iota
	// KindNotFound: no such domain, network or metadata.
	KindNotFound
	// KindExists: the name or UUID is taken.
	KindExists
	// KindInvalid: libvirt refused the document or an argument.
	KindInvalid
	// KindState: not possible in the domain's present state.
	KindState
	// KindBusy: another job holds the domain; try again.
	KindBusy
	// KindDenied: no permission, or a hook script refused.
	KindDenied
	// KindUnsupported: this libvirt or QEMU cannot do it.
	KindUnsupported
	// KindAgent: the guest agent is absent, silent or refused.
	KindAgent
	// KindTimeout: our deadline passed; the call may still take effect.
	KindTimeout
	// KindUnavailable: libvirtd is not reachable or went away.
	KindUnavailable
)

var kindNames = [...]string{
	"internal", "not found", "exists", "invalid", "wrong state", "busy", "denied",
	"unsupported", "guest agent", "timeout", "unavailable",
}

// String is the kind in words.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", int(k))
}

// Sentinels for errors.Is, one per kind that callers branch on.
var (
	ErrNotFound    = errors.New("not found in libvirt")
	ErrExists      = errors.New("exists already in libvirt")
	ErrInvalid     = errors.New("refused by libvirt as invalid")
	ErrState       = errors.New("not possible in the domain's state")
	ErrBusy        = errors.New("the domain is busy with another job")
	ErrDenied      = errors.New("denied by libvirt or a hook")
	ErrUnsupported = errors.New("not supported by this libvirt or QEMU")
	ErrAgent       = errors.New("the guest agent does not answer")
	ErrTimeout     = errors.New("libvirt did not answer in time")
	ErrUnavailable = errors.New("libvirtd is not reachable")
)

// Error is a failed libvirt call.
type Error struct {
	Op   string // what we were doing
	Kind Kind
	Code int    // libvirt's error number, 0 when it came from elsewhere
	Msg  string // libvirt's text
	// Unknown is true when the call may have taken effect although it failed.
	Unknown bool
	Err     error // underlying error, may be nil
}

// Error is one line for a person.
func (e *Error) Error() string {
	s := e.Op + ": " + e.Msg
	if e.Unknown {
		s += " (it may have taken effect; look again)"
	}
	return s
}

// Unwrap gives the underlying error.
func (e *Error) Unwrap() error { return e.Err }

// Is matches the sentinel of e's kind.
func (e *Error) Is(target error) bool {
	s := e.Kind.sentinel()
	return s != nil && s == target
}

func (k Kind) sentinel() error {
	switch k {
	case KindNotFound:
		return ErrNotFound
	case KindExists:
		return ErrExists
	case KindInvalid:
		return ErrInvalid
	case KindState:
		return ErrState
	case KindBusy:
		return ErrBusy
	case KindDenied:
		return ErrDenied
	case KindUnsupported:
		return ErrUnsupported
	case KindAgent:
		return ErrAgent
	case KindTimeout:
		return ErrTimeout
	case KindUnavailable:
		return ErrUnavailable
	}
	return nil
}

// KindOf is the kind of a failure, KindInternal when err is none of ours.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return KindInternal
}

// kindOfCode maps libvirt's error numbers. Everything else is internal.
func kindOfCode(code lv.ErrorNumber) Kind {
	switch code {
	case lv.ErrNoDomain, lv.ErrNoNetwork, lv.ErrNoDomainMetadata, lv.ErrNoDomainSnapshot, lv.ErrNoDomainCheckpoint:
		return KindNotFound
	case lv.ErrDomExist, lv.ErrNetworkExist:
		return KindExists
	case lv.ErrXMLError, lv.ErrXMLDetail, lv.ErrXMLInvalidSchema, lv.ErrInvalidArg, lv.ErrParseFailed:
		return KindInvalid
	case lv.ErrOperationInvalid, lv.ErrInvalidDomain:
		return KindState
	case lv.ErrOperationTimeout, lv.ErrResourceBusy, lv.ErrBlockCopyActive:
		return KindBusy
	case lv.ErrOperationDenied, lv.ErrAuthFailed, lv.ErrAuthCancelled, lv.ErrAccessDenied, lv.ErrHookScriptFailed:
		return KindDenied
	case lv.ErrNoSupport, lv.ErrConfigUnsupported, lv.ErrArgumentUnsupported, lv.ErrOperationUnsupported:
		return KindUnsupported
	case lv.ErrAgentUnresponsive, lv.ErrAgentUnsynced, lv.ErrAgentCommandTimeout, lv.ErrAgentCommandFailed:
		return KindAgent
	case lv.ErrNoConnect, lv.ErrInvalidConn, lv.ErrRPC:
		return KindUnavailable
	}
	return KindInternal
}

// wrapErr turns what go-libvirt returned into an *Error. sent says that the
// request may have reached libvirtd.
func wrapErr(op string, err error, sent bool) error {
	if err == nil {
		return nil
	}
	var ours *Error
	if errors.As(err, &ours) {
		return err
	}
	var le lv.Error
	var ne net.Error
	switch {
	case errors.As(err, &le):
		return &Error{Op: op, Kind: kindOfCode(lv.ErrorNumber(le.Code)), Code: int(le.Code), Msg: le.Message, Err: err}
	case errors.Is(err, lv.ErrUnsupported):
		return &Error{Op: op, Kind: KindUnsupported, Msg: "this libvirtd does not know the call", Err: err}
	case errors.Is(err, lv.ErrInterrupted):
		return &Error{Op: op, Kind: KindUnavailable, Msg: "the connection to libvirtd broke during the call", Unknown: sent, Err: err}
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return &Error{Op: op, Kind: KindTimeout, Msg: "libvirtd did not answer in time", Unknown: sent, Err: err}
	case errors.As(err, &ne), errors.Is(err, io.EOF), errors.Is(err, syscall.EINVAL), errors.Is(err, net.ErrClosed):
		return &Error{Op: op, Kind: KindUnavailable, Msg: "libvirtd is not reachable: " + err.Error(), Unknown: sent, Err: err}
	}
	return &Error{Op: op, Kind: KindInternal, Msg: err.Error(), Err: err}
}
