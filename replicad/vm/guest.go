package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kvmreplica/libvirt"
	"kvmreplica/replicad/dataplane"
	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/lineage"
	"kvmreplica/replicad/wire"
)

// guestFacts is what was seen of the guest and of the peer.
type guestFacts struct {
	unanswered time.Time // the last question before an unplanned failover went unanswered then

	running  bool
	ended    bool   // it was shut down; not remembered yet
	growth   string // what the log was told of an image that became longer and is not taken up
	state    libvirt.State
	bypass   string // exports missing from the block graph, until everything is marked; as the record's
	passing  bool   // they are missing now
	overlay  string // snapshots above the exports, seen in the block graph
	stranded bool   // the guest is off, and its definition does not name them
	resuming bool
	// Digests of firmware state: what the replica committed, what is on its way.
	firmware, sending map[delta.BlobKind][32]byte

	peerGeneration delta.Generation
	// asked names the wish to have everything compared that the replica's store
	// has; a restart or another reason for it makes it another one.
	asked         uint64
	peerAncestors []delta.Pos
	peerRunning   bool
	allowed       delta.Generation // may write into the store
	heard         time.Time        // last word of the peer
	beat          time.Time        // last empty cut, for beatAt
	beatAt        delta.Pos
	decision      lineage.Decision
	told          string // why the last handshake held the guest
	hands         hands  // whether the VM was released
	unread        int    // times in a row that this could not be read
}

// The gate is what the libvirt hook looks at before any start. The protected
// file is durable; the allowing one is boot-scoped, so that after a reboot
// nothing starts before this daemon has decided.
func (v *VM) gateFiles() (protected, allow string) {
	return filepath.Join(v.deps.StateDir, "hook", string(v.id)), filepath.Join(v.deps.RunDir, "hook", string(v.id))
}

// publishGate writes what the hook decides from.
func (v *VM) publishGate() {
	v.gate.Lock() // what was read last is written last
	defer v.gate.Unlock()
	protected, allow := v.gateFiles()
	r := v.record()
	v.mu.Lock()
	held := v.held
	v.mu.Unlock()
	if held == "" && v.outOfHands() {
		v.removeGate() // its start is not ours to decide
		return
	}
	why := held
	if why == "" {
		why = r.Superseded
	}
	if !r.Lineage.MayServe() && why == "" {
		why = fmt.Sprintf("this host is %s for this VM; it runs on the other host", r.Lineage.State)
		if r.Lineage.Diverged != nil {
			why = "the two copies have diverged: " + r.Lineage.Diverged.Reason
		}
	}
	var err error
	if why != "" {
		err = writeFile(protected, "refuse "+oneLine(why)+"\n")
		if rerr := os.Remove(allow); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	} else {
		err = errors.Join(writeFile(protected, "ask replicad has not decided since the boot; it starts the VM itself\n"), writeFile(allow, "allow\n"))
	}
	if err != nil {
		v.log.Error("publish whether the guest may start", "err", err)
	}
}

func (v *VM) clearGate() {
	v.gate.Lock()
	defer v.gate.Unlock()
	v.removeGate()
}

// removeGate leaves the start to libvirt; the gate is locked.
func (v *VM) removeGate() {
	protected, allow := v.gateFiles()
	for _, f := range []string{allow, protected} {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			v.log.Error("remove the start gate", "err", err)
		}
	}
}

func writeFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// hold keeps the guest from being started; a running one is left alone.
func (v *VM) hold(why string) {
	v.mu.Lock()
	changed := v.held != why
	v.held = why
	v.mu.Unlock()
	if changed && why != "" {
		v.log.Error("the guest is held back", "reason", why)
	}
	if changed {
		v.publishGate()
	}
}

func (v *VM) setTrouble(s string) {
	v.mu.Lock()
	v.trouble = s
	v.mu.Unlock()
}

// openExports lets clients in.
func (v *VM) openExports(ctx context.Context) error {
	c, err := v.plane()
	if err != nil {
		return err
	}
	return c.Export(ctx, dataplane.ExportRequest{On: true})
}

// startGuest starts the domain; a running one is fine. The caller holds the
// plan token.
func (v *VM) startGuest(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if l := v.record().Lineage; !l.MayServe() {
		return fmt.Errorf("start the guest: this host is %s for it", l.State)
	}
	err := v.update(func(r *Record) error { r.WantRunning, r.Superseded = true, ""; return nil })
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.facts.ended = false
	v.mu.Unlock()
	v.hold("")
	v.publishGate()
	st, _, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil {
		return fmt.Errorf("start the guest: %w", err)
	}
	if !off(st) {
		return nil
	}
	err = v.deps.Hyper.Start(ctx, string(v.id), libvirt.StartOptions{})
	if errors.Is(err, libvirt.ErrState) {
		return nil // somebody was quicker
	}
	if err != nil {
		return fmt.Errorf("start the guest: %w", err)
	}
	return nil
}

// serveGuest opens the exports and starts the guest on them.
func (v *VM) serveGuest(ctx context.Context) error {
	c, err := v.plane()
	if err != nil {
		return err
	}
	if err := c.Refuse(ctx, ""); err != nil {
		return err
	}
	if err := v.openExports(ctx); err != nil {
		return err
	}
	return v.startGuest(ctx)
}

// StartOptions are what a person insists on.
type StartOptions struct {
	Force           bool // although the other host cannot be asked
	WithoutSnapshot bool // what the guest wrote into a snapshot is given up
}

// StartGuest is the person's start: the peer is asked first.
func (v *VM) StartGuest(ctx context.Context, o StartOptions) error {
	unlock, err := v.lockAsked(ctx, "start the guest")
	if err != nil {
		return err
	}
	defer unlock()
	if !v.record().Lineage.MayServe() {
		return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf("this host is %s for the VM", v.record().Lineage.State), Hint: "replicactl failover planned " + v.record().Name + "; when the primary is dead: failover unplanned"}
	}
	if why, answered := v.askPeer(ctx); why != "" && !o.Force {
		return &wire.Error{Kind: wire.KindRefused, Text: why, Hint: "replicactl vm start --force only when the other copy is certainly stopped"}
	} else if !answered && !o.Force {
		return &wire.Error{Kind: wire.KindRefused, Text: "the other host does not answer, so it is not known whether the VM runs there", Hint: "replicactl vm start --force when it is certainly stopped there"}
	}
	switch {
	case v.guestRuns(): // on whatever it runs
	case o.WithoutSnapshot:
		err = v.dropSnapshot()
	default:
		err = v.refuseStranded(ctx)
	}
	if err != nil {
		return err
	}
	return v.serveGuest(ctx)
}

// askPeer asks the other host whether the VM may run here: why not, and
// whether it answered at all.
func (v *VM) askPeer(ctx context.Context) (why string, answered bool) {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	p, err := v.peer()
	if err != nil {
		return "", false
	}
	s, err := p.Status(ctx, v.id)
	var w *wire.Error
	switch {
	case errors.As(err, &w) && w.Kind == wire.KindNotFound:
		return "", true // it knows no such VM: nothing runs there
	case err != nil:
		return "", false
	case s.Running:
		return "the VM runs on the other host", true
	case s.Role == lineage.RolePrimary && !v.knows(s.Generation):
		return "the other host was promoted and owns the VM now", true
	case s.Role == lineage.RoleReplica && !s.Committed.IsZero() && !v.knows(s.Committed.Generation):
		return "the other host holds a newer generation than this one knows: this host's state was put back to an earlier time", true
	}
	return "", true
}

func (v *VM) refuseExports(ctx context.Context, why string) {
	c, err := v.plane()
	if err == nil {
		err = c.Refuse(ctx, why)
	}
	if err != nil {
		v.log.Error("close the exports", "err", err)
	}
}

// Exports are where the VM's disks stand, for comparing block graphs.
func (v *VM) exports() map[string]libvirt.NBDSource {
	out := map[string]libvirt.NBDSource{}
	r := v.record()
	for _, d := range r.placed() {
		out[string(d.Name)] = libvirt.NBDSource{Socket: v.socket(), Export: string(d.Name)}
	}
	return out
}

// watch looks at the guest until ctx ends or the relationship does.
func (v *VM) watch(ctx context.Context) {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		v.mu.Lock()
		gone := v.gone
		v.mu.Unlock()
		if gone {
			return
		}
		v.look(ctx)
		v.tendTrial(ctx)
	}
}

// look is one observation: what the guest does, whether its writes pass us,
// and whether it waits for a disk that is back.
func (v *VM) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	if !v.noticeRelease() {
		v.tendPlane(ctx)
	}
	v.startDue()
	st, reason, err := v.deps.Hyper.DomainState(ctx, string(v.id))
	if err != nil {
		return // libvirtd is away; nothing can be said
	}
	isOff := off(st)
	v.mu.Lock()
	was := v.facts.running
	v.facts.state, v.facts.running = st, !isOff
	if was && isOff && v.running == nil && (reason == libvirt.ReasonShutdown || reason == libvirt.ReasonDestroyed) {
		v.facts.ended = true
	}
	v.facts.ended = v.facts.ended && isOff
	v.mu.Unlock()
	v.tendGone(ctx)
	r := v.record()
	if v.noticeRelease() || !r.Lineage.MayServe() || !r.Placed {
		return
	}
	v.tendSizes(ctx, isOff)
	switch {
	case isOff:
		v.tendStranded(ctx)
		v.passes(ctx, "")
		v.tendEnd(ctx)
	case st == libvirt.StatePaused && reason == libvirt.ReasonIOError:
		v.resumeLater()
	default:
		v.want(true)
		v.lookAtGraph(ctx)
	}
}

// tendEnd remembers that a guest was shut down, so that it stays off after the
// next boot. One that ends because its host goes down is started then.
func (v *VM) tendEnd(ctx context.Context) {
	v.mu.Lock()
	ended := v.facts.ended
	v.mu.Unlock()
	if !ended {
		return
	}
	if stops := v.deps.HostStops; stops != nil {
		if down, err := stops(ctx); err != nil || down {
			return // it is asked again
		}
	}
	v.want(false)
	v.mu.Lock()
	v.facts.ended = false
	v.mu.Unlock()
}

func (v *VM) want(running bool) {
	v.mu.Lock()
	same, busy := v.rec.WantRunning == running, v.running != nil
	v.mu.Unlock()
	if same || busy {
		return
	}
	if err := v.update(func(r *Record) error { r.WantRunning = running; return nil }); err != nil {
		v.log.Error("remember whether the guest runs", "err", err)
	}
}

// tendPlane starts the keeper again when it and the data plane died together;
// a keeper that lives restarts the data plane by itself.
func (v *VM) tendPlane(ctx context.Context) {
	c, err := v.plane()
	if err != nil {
		return
	}
	if _, err := c.Status(ctx); err == nil || v.busy() || v.noticeRelease() {
		return
	}
	v.revive(ctx, c)
}

// revive makes sure that a data plane which did not answer runs, unless the
// role gave it up meanwhile: one that came back then would hold the images of
// a role that has ended.
func (v *VM) revive(ctx context.Context, silent *dataplane.Client) {
	v.machine.Lock()
	defer v.machine.Unlock()
	v.mu.Lock()
	given := v.ship == nil || v.ship.plane != silent
	cfg := dataplane.Config{}
	if !given {
		cfg = v.ship.cfg
	}
	v.mu.Unlock()
	if given {
		return
	}
	again, err := dataplane.Ensure(ctx, cfg)
	if err != nil {
		v.log.Error("bring the data plane back", "err", err)
		return
	}
	again.Close()
}

// busy reports that a plan is under way.
func (v *VM) busy() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.running != nil
}

// distrust marks everything: what was written past us is found by digest.
func (v *VM) distrust(ctx context.Context, why string) error {
	c, err := v.plane()
	if err == nil {
		err = c.Mark(ctx, dataplane.MarkRequest{Reason: why})
	}
	if err != nil {
		return err
	}
	if s := v.session(); s != nil {
		s.Retry()
	}
	return nil
}

// resumeLater lets a guest go on that QEMU stopped because its disk was away.
func (v *VM) resumeLater() {
	v.mu.Lock()
	busy := v.facts.resuming
	v.facts.resuming = true
	v.mu.Unlock()
	if busy {
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), swapTimeout)
		defer cancel()
		defer func() {
			v.mu.Lock()
			v.facts.resuming = false
			v.mu.Unlock()
		}()
		c, err := v.plane()
		if err == nil {
			_, err = c.Status(ctx) // never poke QEMU while our own end is away
		}
		n := 0
		if err == nil {
			n, err = v.deps.Hyper.ResumeIOError(ctx, string(v.id))
		}
		if err != nil {
			v.log.Warn("resume the guest after its disk came back", "err", err)
			return
		}
		v.log.Info("guest resumed after its disk came back", "resumes", n)
	}()
}

// off reports that no guest runs: nothing of it can write.
func off(st libvirt.State) bool { return st == libvirt.StateOff || st == libvirt.StateCrashed }
