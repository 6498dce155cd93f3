package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// Deadlines of the insertion.
const (
	stepWithin     = 20 * time.Second
	takeBackWithin = 2 * time.Minute
	greetWithin    = 2 * time.Second
)

// inserter walks disks in and out of one domain. It is apart from Host so that
// the walk can be tested against a QEMU that fails at every single command.
type inserter struct {
	uuid string
	// open finds a disk in the running domain and probes it.
	open func(ctx context.Context, req InsertRequest) (p *plug, alias string, err error)
	// explain makes QEMU's refusal more useful.
	explain func(req InsertRequest, err error) error
}

func (h *Host) inserter(uuid string) *inserter {
	return &inserter{
		uuid:    uuid,
		open:    func(ctx context.Context, r InsertRequest) (*plug, string, error) { return h.plug(ctx, uuid, r) },
		explain: func(r InsertRequest, err error) error { return h.explain(uuid, r.Source, err) },
	}
}

// plug finds a disk in a running domain and probes it.
func (h *Host) plug(ctx context.Context, uuid string, req InsertRequest) (*plug, string, error) {
	t := req.Disk.Target
	d, err := h.Domain(ctx, uuid)
	if err != nil {
		return nil, "", err
	}
	live, ok := d.Disk(t)
	if !ok {
		return nil, "", &Error{Op: "probe disk " + t + " of " + uuid, Kind: KindNotFound, Msg: "the domain has no such disk"}
	}
	if d.State != StateRunning && d.State != StatePaused {
		return nil, "", &Error{Op: "probe disk " + t + " of " + uuid, Kind: KindState, Msg: "the domain is " + string(d.State)}
	}
	p := &plug{m: domainMonitor{h, uuid}, req: req}
	if err := p.probe(ctx, live.Alias); err != nil {
		return nil, "", fmt.Errorf("probe disk %s of %s: %w", t, uuid, err)
	}
	return p, live.Alias, nil
}

// Probe reads from QEMU how far a disk is on its way. The request's Disk and
// Source must be the ones of the insertion.
func (h *Host) Probe(ctx context.Context, uuid string, req InsertRequest) (InsertState, error) {
	return h.inserter(uuid).probe(ctx, req)
}

// InsertStep makes one step of the way in and returns the state reached. At
// InsertIn it does nothing.
func (h *Host) InsertStep(ctx context.Context, uuid string, req InsertRequest) (InsertState, error) {
	return h.inserter(uuid).in(ctx, req)
}

// RemoveStep makes one step of the way out and returns the state reached. At
// InsertOut it does nothing.
func (h *Host) RemoveStep(ctx context.Context, uuid string, req InsertRequest) (InsertState, error) {
	return h.inserter(uuid).out(ctx, req)
}

// InsertDisks puts exports under the disks of a running guest without
// stopping it: all of them or none. First every export is proven to be
// reachable by this QEMU (nothing of the guest is touched before that), then
// each disk is moved. On any failure everything is taken back to where it was;
// when even that fails the error says so and Probe tells the state.
func (h *Host) InsertDisks(ctx context.Context, uuid string, reqs []InsertRequest) error {
	if err := h.admit(ctx, uuid, reqs); err != nil {
		return err
	}
	return h.inserter(uuid).insertAll(ctx, reqs)
}

// RemoveDisks takes exports away from under a running guest, disk by disk.
// After a failure disks not yet done stay on their exports; call it again to
// continue, or InsertDisks to go back in.
func (h *Host) RemoveDisks(ctx context.Context, uuid string, reqs []InsertRequest) error {
	for _, r := range reqs {
		if err := greet(ctx, r.Source.Socket); err != nil {
			return &Error{Op: "take " + uuid + " off its exports", Kind: KindUnavailable, Msg: err.Error() + "; QEMU would hang draining, so nothing was changed"}
		}
	}
	return h.inserter(uuid).removeAll(ctx, reqs)
}

func (i *inserter) probe(ctx context.Context, req InsertRequest) (InsertState, error) {
	p, _, err := i.open(ctx, req)
	if err != nil {
		return 0, err
	}
	return p.state, nil
}

func (i *inserter) in(ctx context.Context, req InsertRequest) (InsertState, error) {
	return i.step(ctx, req, (*plug).forward)
}

func (i *inserter) out(ctx context.Context, req InsertRequest) (InsertState, error) {
	return i.step(ctx, req, (*plug).backward)
}

func (i *inserter) step(ctx context.Context, req InsertRequest, move func(*plug, context.Context) error) (InsertState, error) {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	p, alias, err := i.open(ctx, req)
	if err != nil {
		return 0, err
	}
	from := p.state
	if err := move(p, ctx); err != nil {
		return from, fmt.Errorf("disk %s, from state %s: %w", req.Disk.Target, from, i.explain(req, err))
	}
	if err := p.probe(ctx, alias); err != nil {
		return from, err
	}
	return p.state, nil
}

func (i *inserter) insertAll(ctx context.Context, reqs []InsertRequest) error {
	err := i.proveAll(ctx, reqs)
	for n := 0; err == nil && n < len(reqs); n++ {
		err = i.walk(ctx, reqs[n], InsertIn, i.in)
	}
	if err == nil {
		return nil
	}
	if e := i.takeBack(ctx, reqs); e != nil {
		return fmt.Errorf("put %s on exports: %w; and taking it back failed: %w", i.uuid, err, e)
	}
	return fmt.Errorf("put %s on exports: %w; everything was taken back", i.uuid, err)
}

// proveAll connects QEMU to every export that it is not connected to yet.
func (i *inserter) proveAll(ctx context.Context, reqs []InsertRequest) error {
	for _, r := range reqs {
		st, err := i.probe(ctx, r)
		if err == nil && st == InsertOut {
			err = i.walk(ctx, r, InsertAdded, i.in)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (i *inserter) removeAll(ctx context.Context, reqs []InsertRequest) error {
	for _, r := range reqs {
		if err := i.walk(ctx, r, InsertOut, i.out); err != nil {
			return fmt.Errorf("take %s off its exports: %w", i.uuid, err)
		}
	}
	return nil
}

// walk repeats one step until a state is reached.
func (i *inserter) walk(ctx context.Context, r InsertRequest, until InsertState, step func(context.Context, InsertRequest) (InsertState, error)) error {
	st, err := i.probe(ctx, r)
	for n := 0; err == nil && st != until; n++ {
		if n > int(InsertIn) {
			return fmt.Errorf("disk %s does not get from %s to %s", r.Disk.Target, st, until)
		}
		st, err = step(ctx, r)
	}
	return err
}

// takeBack walks all disks out again. It has its own deadline: a cancelled
// caller must not leave half an insertion behind.
func (i *inserter) takeBack(ctx context.Context, reqs []InsertRequest) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), takeBackWithin)
	defer cancel()
	var errs []error
	for n := len(reqs) - 1; n >= 0; n-- {
		errs = append(errs, i.walk(ctx, reqs[n], InsertOut, i.out))
	}
	return errors.Join(errs...)
}

// admit checks everything that can be checked without touching QEMU.
func (h *Host) admit(ctx context.Context, uuid string, reqs []InsertRequest) error {
	d, err := h.Domain(ctx, uuid)
	if err != nil {
		return err
	}
	var targets []string
	for _, r := range reqs {
		st, err := h.Probe(ctx, uuid, r)
		if err == nil && st > InsertOut {
			continue // continuing: it was admitted then
		}
		targets = append(targets, r.Disk.Target)
		if err := r.Source.validate(); err != nil {
			return &Error{Op: "put " + uuid + " on exports", Kind: KindInvalid, Msg: err.Error()}
		}
	}
	if why := Refuse(d, targets...); len(why) > 0 {
		return &RefusedError{Reasons: why}
	}
	for _, r := range reqs {
		if err := greet(ctx, r.Source.Socket); err != nil {
			return &Error{Op: "put " + uuid + " on exports", Kind: KindUnavailable, Msg: err.Error() + "; nothing was changed"}
		}
	}
	return nil
}

// greet checks that an NBD server answers on a socket. QEMU connects inside
// its main loop: a server that accepts and says nothing would stop the guest.
func greet(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, greetWithin)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("no export answers on %s: %w", socket, err)
	}
	defer c.Close()
	if t, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(t); err != nil {
			return err
		}
	}
	var magic [8]byte
	if _, err := io.ReadFull(c, magic[:]); err != nil {
		return fmt.Errorf("the server on %s does not greet: %w", socket, err)
	}
	if string(magic[:]) != "NBDMAGIC" {
		return fmt.Errorf("the server on %s speaks something else than NBD", socket)
	}
	return nil
}
