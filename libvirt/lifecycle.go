package libvirt

import (
	"context"
	"errors"
	"fmt"
	"time"

	lv "github.com/digitalocean/go-libvirt"
)

// Intervals of the waiting loops.
const (
	pollState   = 200 * time.Millisecond
	resumeEvery = 300 * time.Millisecond
	// graceAgent is how long an agent shutdown may take before ACPI is tried.
	graceAgent = 20 * time.Second
)

// StartOptions of Start.
type StartOptions struct {
	Paused bool // loaded, but the guest runs no instruction before Resume
	// DiscardSaved starts afresh although a managed save image exists.
	DiscardSaved bool
}

// Start boots a defined domain. Starting a running one is ErrState.
func (h *Host) Start(ctx context.Context, uuid string, o StartOptions) error {
	var flags lv.DomainCreateFlags
	if o.Paused {
		flags |= lv.DomainStartPaused
	}
	if o.DiscardSaved {
		flags |= lv.DomainStartForceBoot
	}
	return onDomainDo(ctx, h, "start", uuid, func(l *lv.Libvirt, d lv.Domain) error {
		_, err := l.DomainCreateWithFlags(d, uint32(flags))
		return err
	})
}

// ShutdownOptions of Shutdown.
type ShutdownOptions struct {
	// NoAgent goes straight to the ACPI power button.
	NoAgent bool
	// Within bounds the whole; 0 means the context's deadline alone.
	Within time.Duration
}

// Shutdown asks the guest to shut down, through its agent first and the ACPI
// power button then, and returns when it is off. It never kills: when the
// deadline passes the guest runs on and the error is ErrTimeout.
func (h *Host) Shutdown(ctx context.Context, uuid string, o ShutdownOptions) error {
	if o.Within > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.Within)
		defer cancel()
	}
	if st, _, err := h.DomainState(ctx, uuid); err != nil {
		return err
	} else if st == StateOff {
		return nil
	} else if st == StatePaused {
		return &Error{Op: "shut down " + uuid, Kind: KindState, Msg: "the guest is paused and cannot hear it; resume it first"}
	}
	if !o.NoAgent && h.AgentPing(ctx, uuid) == nil {
		err := h.askShutdown(ctx, uuid, lv.DomainShutdownGuestAgent)
		if err == nil {
			actx, cancel := context.WithTimeout(ctx, graceAgent)
			err = h.waitOff(actx, uuid)
			cancel()
		}
		if err == nil || errors.Is(err, ErrNotFound) {
			return ignoreNotFound(err)
		}
	}
	// A guest may overlook one press (no acpid yet): press again.
	for {
		if err := h.askShutdown(ctx, uuid, lv.DomainShutdownAcpiPowerBtn); err != nil {
			if st, _, e := h.DomainState(ctx, uuid); e == nil && st == StateOff {
				return nil
			}
			return ignoreNotFound(err)
		}
		actx, cancel := context.WithTimeout(ctx, graceAgent)
		err := h.waitOff(actx, uuid)
		cancel()
		if err == nil || ctx.Err() != nil || !errors.Is(err, ErrTimeout) {
			return ignoreNotFound(err)
		}
	}
}

// ignoreNotFound: a transient domain is gone once it is off.
func ignoreNotFound(err error) error {
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

func (h *Host) askShutdown(ctx context.Context, uuid string, how lv.DomainShutdownFlagValues) error {
	return onDomainDo(ctx, h, "ask for shutdown", uuid, func(l *lv.Libvirt, d lv.Domain) error {
		return l.DomainShutdownFlags(d, how)
	})
}

func (h *Host) waitOff(ctx context.Context, uuid string) error {
	return h.waitState(ctx, uuid, func(s State) bool { return s == StateOff || s == StateCrashed })
}

// waitState polls until want holds. It is for short waits after a request;
// Watch is the way to follow a domain.
func (h *Host) waitState(ctx context.Context, uuid string, want func(State) bool) error {
	t := time.NewTicker(pollState)
	defer t.Stop()
	last := StateUnknown
	for {
		st, _, err := h.DomainState(ctx, uuid)
		if err != nil {
			return err
		}
		if want(st) {
			return nil
		}
		last = st
		select {
		case <-ctx.Done():
			return &Error{Op: "wait for " + uuid, Kind: KindTimeout, Msg: fmt.Sprintf("still %s", last), Err: ctx.Err()}
		case <-t.C:
		}
	}
}

// Destroy ends a domain at once. graceful lets QEMU flush (SIGTERM) and never
// resorts to SIGKILL. Destroying what is off is no error.
func (h *Host) Destroy(ctx context.Context, uuid string, graceful bool) error {
	var flags lv.DomainDestroyFlagsValues
	if graceful {
		flags = lv.DomainDestroyGraceful
	}
	err := onDomainDo(ctx, h, "destroy", uuid, func(l *lv.Libvirt, d lv.Domain) error {
		return l.DomainDestroyFlags(d, flags)
	})
	if errors.Is(err, ErrState) {
		if st, _, e := h.DomainState(ctx, uuid); e == nil && st == StateOff {
			return nil
		}
	}
	return err
}

// Define makes or replaces a persistent definition and returns its UUID. The
// document is defined as it is: only our own host's XML or Render's.
func (h *Host) Define(ctx context.Context, doc []byte) (uuid string, err error) {
	if len(doc) > maxDocument {
		return "", &Error{Op: "define domain", Kind: KindInvalid, Msg: "the document is too large"}
	}
	return call(ctx, h, "define domain", func(l *lv.Libvirt) (string, error) {
		d, err := l.DomainDefineXMLFlags(string(doc), 0)
		return uuidString(d.UUID), err
	})
}

// UndefineOptions of Undefine. The zero value refuses when there is NVRAM, a
// managed save image or snapshot metadata.
type UndefineOptions struct {
	DropNVRAM, KeepNVRAM bool
	DropTPM, KeepTPM     bool
	DropSaved            bool
	DropSnapshots        bool // metadata of snapshots and checkpoints
}

// Undefine removes a persistent definition. A running domain runs on as a
// transient one. Undefining what is not there is no error.
func (h *Host) Undefine(ctx context.Context, uuid string, o UndefineOptions) error {
	var f lv.DomainUndefineFlagsValues
	add := func(on bool, flag lv.DomainUndefineFlagsValues) {
		if on {
			f |= flag
		}
	}
	add(o.DropNVRAM, lv.DomainUndefineNvram)
	add(o.KeepNVRAM, lv.DomainUndefineKeepNvram)
	add(o.DropTPM, lv.DomainUndefineTpm)
	add(o.KeepTPM, lv.DomainUndefineKeepTpm)
	add(o.DropSaved, lv.DomainUndefineManagedSave)
	add(o.DropSnapshots, lv.DomainUndefineSnapshotsMetadata|lv.DomainUndefineCheckpointsMetadata)
	return ignoreNotFound(onDomainDo(ctx, h, "undefine", uuid, func(l *lv.Libvirt, d lv.Domain) error {
		return l.DomainUndefineFlags(d, f)
	}))
}

// SetAutostart sets whether libvirt starts the domain with the host.
func (h *Host) SetAutostart(ctx context.Context, uuid string, on bool) error {
	var v int32
	if on {
		v = 1
	}
	return onDomainDo(ctx, h, "set autostart", uuid, func(l *lv.Libvirt, d lv.Domain) error {
		return l.DomainSetAutostart(d, v)
	})
}

// Autostart reads that flag.
func (h *Host) Autostart(ctx context.Context, uuid string) (bool, error) {
	return onDomain(ctx, h, "read autostart", uuid, func(l *lv.Libvirt, d lv.Domain) (bool, error) {
		a, err := l.DomainGetAutostart(d)
		return a == 1, err
	})
}

// Suspend stops the guest's CPUs. Never call it while our NBD end does not
// answer: QEMU drains first and hangs.
func (h *Host) Suspend(ctx context.Context, uuid string) error {
	return onDomainDo(ctx, h, "suspend", uuid, func(l *lv.Libvirt, d lv.Domain) error { return l.DomainSuspend(d) })
}

// Resume lets the guest's CPUs run.
func (h *Host) Resume(ctx context.Context, uuid string) error {
	return onDomainDo(ctx, h, "resume", uuid, func(l *lv.Libvirt, d lv.Domain) error { return l.DomainResume(d) })
}

// ResumeIOError resumes a domain paused by an I/O error until it stays
// running: right after a server's return one resume may fall back to paused.
// It returns the number of resumes. Any other state than paused by I/O error
// or running ends it with ErrState; a domain somebody paused stays paused.
func (h *Host) ResumeIOError(ctx context.Context, uuid string) (resumes int, err error) {
	t := time.NewTicker(resumeEvery)
	defer t.Stop()
	stayed := 0
	for {
		st, why, err := h.DomainState(ctx, uuid)
		if err != nil {
			return resumes, err
		}
		switch {
		case st == StateRunning:
			if stayed++; stayed >= 3 {
				return resumes, nil
			}
		case st == StatePaused && why == ReasonIOError:
			stayed = 0
			resumes++
			if err := h.Resume(ctx, uuid); err != nil && !errors.Is(err, ErrState) && !errors.Is(err, ErrBusy) {
				return resumes, err
			}
		default:
			return resumes, &Error{Op: "resume " + uuid, Kind: KindState, Msg: fmt.Sprintf("it is %s (%s), not paused by an I/O error", st, why)}
		}
		select {
		case <-ctx.Done():
			return resumes, &Error{Op: "resume " + uuid, Kind: KindTimeout, Msg: "it does not stay running", Err: ctx.Err()}
		case <-t.C:
		}
	}
}

// HasSaved reports whether a managed save image exists: the next start would
// restore it, with the disk sources written in it.
func (h *Host) HasSaved(ctx context.Context, uuid string) (bool, error) {
	return onDomain(ctx, h, "look for a saved image", uuid, func(l *lv.Libvirt, d lv.Domain) (bool, error) {
		n, err := l.DomainHasManagedSaveImage(d, 0)
		return n == 1, err
	})
}
