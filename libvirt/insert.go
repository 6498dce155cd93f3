package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	lv "github.com/digitalocean/go-libvirt"
)

// Deadlines of the insertion.
const (
	stepWithin     = 20 * time.Second
	takeBackWithin = 2 * time.Minute
	greetWithin    = 2 * time.Second
)

// Probe reads from QEMU how far a disk is on its way. The request's Disk and
// Source must be the ones of the insertion.
func (h *Host) Probe(ctx context.Context, uuid string, req InsertRequest) (InsertState, error) {
	p, _, err := h.plug(ctx, uuid, req)
	if err != nil {
		return 0, err
	}
	return p.state, nil
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

// InsertStep makes one step of the way in and returns the state reached. At
// InsertIn it does nothing.
func (h *Host) InsertStep(ctx context.Context, uuid string, req InsertRequest) (InsertState, error) {
	return h.step(ctx, uuid, req, (*plug).forward)
}

// RemoveStep makes one step of the way out and returns the state reached. At
// InsertOut it does nothing.
func (h *Host) RemoveStep(ctx context.Context, uuid string, req InsertRequest) (InsertState, error) {
	return h.step(ctx, uuid, req, (*plug).backward)
}

func (h *Host) step(ctx context.Context, uuid string, req InsertRequest, move func(*plug, context.Context) error) (InsertState, error) {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	p, alias, err := h.plug(ctx, uuid, req)
	if err != nil {
		return 0, err
	}
	from := p.state
	if err := move(p, ctx); err != nil {
		return from, fmt.Errorf("disk %s, from state %s: %w", req.Disk.Target, from, h.explain(uuid, req.Source, err))
	}
	if err := p.probe(ctx, alias); err != nil {
		return from, err
	}
	return p.state, nil
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
	walk := func(until InsertState) error {
		for _, r := range reqs {
			if err := h.walk(ctx, uuid, r, until, h.InsertStep); err != nil {
				return err
			}
		}
		return nil
	}
	err := walk(InsertAdded)
	if err == nil {
		err = walk(InsertIn)
	}
	if err == nil {
		return nil
	}
	if e := h.takeBack(ctx, uuid, reqs); e != nil {
		return fmt.Errorf("put %s on exports: %w; and taking it back failed: %w", uuid, err, e)
	}
	return fmt.Errorf("put %s on exports: %w; everything was taken back", uuid, err)
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
	for _, r := range reqs {
		if err := h.walk(ctx, uuid, r, InsertOut, h.RemoveStep); err != nil {
			return fmt.Errorf("take %s off its exports: %w", uuid, err)
		}
	}
	return nil
}

// walk repeats one step until a state is reached or passed.
func (h *Host) walk(ctx context.Context, uuid string, r InsertRequest, until InsertState, step func(context.Context, string, InsertRequest) (InsertState, error)) error {
	st, err := h.Probe(ctx, uuid, r)
	for n := 0; err == nil && st != until; n++ {
		if until == InsertAdded && st > InsertAdded {
			return nil // a continued run is already further
		}
		if n > int(InsertIn) {
			return fmt.Errorf("disk %s does not get from %s to %s", r.Disk.Target, st, until)
		}
		st, err = step(ctx, uuid, r)
	}
	return err
}

// takeBack walks all disks out again. It has its own deadline: a cancelled
// caller must not leave half an insertion behind.
func (h *Host) takeBack(ctx context.Context, uuid string, reqs []InsertRequest) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), takeBackWithin)
	defer cancel()
	var errs []error
	for i := len(reqs) - 1; i >= 0; i-- {
		errs = append(errs, h.walk(ctx, uuid, reqs[i], InsertOut, h.RemoveStep))
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

// ConnectError says that QEMU cannot reach an export, as whom, and what to do.
type ConnectError struct {
	Socket string
	Desc   string   // QEMU's words
	Labels []string // "dac +64055:+108", "apparmor libvirt-<uuid>"
	Remedy string
}

// Error is one line for a person.
func (e *ConnectError) Error() string {
	return fmt.Sprintf("qemu (%s) cannot connect to %s: %s; %s", strings.Join(e.Labels, ", "), e.Socket, e.Desc, e.Remedy)
}

// explain turns QEMU's refusal to connect into an error that names the rule to
// add. Other errors come back as they are.
func (h *Host) explain(uuid string, src NBDSource, err error) error {
	var q *QMPError
	if !errors.As(err, &q) || q.Command != "blockdev-add" || !strings.Contains(q.Desc, "connect") {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), stepWithin)
	defer cancel()
	c := &ConnectError{Socket: src.Socket, Desc: q.Desc}
	labels, lerr := h.securityLabels(ctx, uuid)
	if lerr != nil {
		c.Labels = []string{"its security labels could not be read"}
	}
	c.Labels = append(c.Labels, labels...)
	c.Remedy = remedyFor(src.Socket, labels)
	return errors.Join(c, err)
}

// securityLabels are "model label" for every driver in force.
func (h *Host) securityLabels(ctx context.Context, uuid string) ([]string, error) {
	info, err := h.Info(ctx)
	if err != nil {
		return nil, err
	}
	return onDomain(ctx, h, "read security labels", uuid, func(l *lv.Libvirt, d lv.Domain) ([]string, error) {
		ls, _, err := l.DomainGetSecurityLabelList(d)
		if err != nil {
			return nil, err
		}
		var out []string
		for i, x := range ls {
			model := "label"
			if i < len(info.SecurityModels) {
				model = info.SecurityModels[i]
			}
			out = append(out, strings.TrimSpace(model+" "+cString(x.Label)))
		}
		return out, nil
	})
}

func cString(b []int8) string {
	var s strings.Builder
	for _, c := range b {
		if c == 0 {
			break
		}
		s.WriteByte(byte(c))
	}
	return s.String()
}

// remedyFor names the exact rule for the labels seen.
func remedyFor(socket string, labels []string) string {
	var out []string
	for _, l := range labels {
		model, label, _ := strings.Cut(l, " ")
		switch model {
		case "dac":
			user, group, _ := strings.Cut(strings.ReplaceAll(label, "+", ""), ":")
			out = append(out, fmt.Sprintf("let uid %s reach it: chgrp %s %s; chmod 0660 %s (and search permission on its directories)", user, group, socket, socket))
		case "apparmor":
			out = append(out, fmt.Sprintf("allow it in AppArmor: add the line \"%s rw,\" to /etc/apparmor.d/local/abstractions/libvirt-qemu and reload the guest's profile", socket))
		case "selinux":
			out = append(out, fmt.Sprintf("allow it in SELinux: chcon -t svirt_image_t %s, and let svirt_t connectto the daemon's domain", socket))
		}
	}
	if len(out) == 0 {
		return "check owner and mode of the socket and its directories, and AppArmor or SELinux"
	}
	return strings.Join(out, "; or ")
}
