package dataplane

import (
	"errors"
	"strings"

	"kvmreplica/internal/block"
	"kvmreplica/replicad/wire"
)

// A data plane may not look into other processes, so it cannot say who holds an
// image's lock. Whoever asked it may, and does.

// inUse is the refusal of an image that another program holds.
type inUse struct {
	shown *wire.Error
	cause error
}

func (e *inUse) Error() string   { return e.shown.Error() }
func (e *inUse) Unwrap() []error { return []error{e.shown, e.cause} }

// answer is an error on its way to who asked: the control socket's error body
// and the failure file.
type answer struct {
	*wire.Error
	// Locked is the image that is in use, when that is the reason.
	Locked *block.LockedError `json:",omitempty"`
}

func newAnswer(err error) answer {
	a := answer{Error: asWire(mapError(err))}
	errors.As(err, &a.Locked)
	return a
}

// named is the error with the name of the process that holds the image, when
// this process can see it; nil when there is no error in the answer.
func (a answer) named() error {
	if a.Error == nil || a.Text == "" {
		return nil
	}
	if l := a.Locked; l != nil && l.PID == 0 {
		e := *a.Error
		e.Text = strings.Replace(e.Text, l.Error(), l.Named().Error(), 1)
		return &e
	}
	return a.Error
}
