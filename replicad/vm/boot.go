package vm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// bootDecision starts a guest that ran before the host went down, after asking
// the peer. It acts once per boot and only for a guest that is off; it goes on
// until that is decided, so that nothing is held for ever by what has passed.
func (v *VM) bootDecision(ctx context.Context) {
	if _, err := os.Stat(v.bootNote()); err == nil {
		v.publishGate()
		return
	}
	begun, failures := v.deps.Now(), 0
	for pause := newPause(); !v.forgotten(); {
		done, err := v.decideBoot(ctx, begun)
		if err != nil {
			failures++
			v.log.Error("start the guest after the boot", "err", err)
			v.setTrouble(err.Error())
		}
		if done || failures >= bootTries {
			v.noteBoot()
			return
		}
		if !pause.wait(ctx) {
			return
		}
	}
}

// bootTries is how often a start that fails is tried after a boot.
const bootTries = 5

// decideBoot is one try. It holds the plan token only while it acts: the other
// host may be silent for long.
func (v *VM) decideBoot(ctx context.Context, begun time.Time) (done bool, err error) {
	r := v.record()
	if !r.Lineage.MayServe() || v.outOfHands() {
		v.publishGate()
		return true, nil
	}
	isOff, err := v.guestIsOff(ctx)
	if err != nil {
		v.hold(err.Error())
		return false, nil // libvirt comes back; that is no failed start
	}
	if !isOff {
		v.hold("")
		v.publishGate()
		return true, nil
	}
	why, answered := v.askPeer(ctx)
	silent := v.deps.Now().Sub(begun)
	switch {
	case why != "":
		v.hold(why)
		v.refuseExports(ctx, why)
		return false, nil
	case answered:
	case silent <= v.deps.SilentAfter:
		v.hold("the other host is being asked")
		return false, nil
	case r.Superseded != "":
		v.hold(r.Superseded)
		return false, nil
	case r.OnSilent == "hold":
		v.hold("the other host is silent and the policy is on-silent-peer=hold")
		return false, nil
	}
	unlock, err := v.lockOwn("start the guest after the boot")
	if err != nil {
		return false, nil // a plan decides now
	}
	defer unlock()
	if r = v.record(); !r.Lineage.MayServe() {
		return true, nil
	}
	why, err = v.withoutSnapshot(ctx)
	if err != nil {
		why = err.Error() // libvirt comes back; that is no failed start
	}
	if why != "" {
		v.hold(why)
		return false, nil
	}
	v.hold("")
	if !r.WantRunning && !r.Autostart {
		v.publishGate()
		return true, nil
	}
	if !answered {
		v.log.Error("the other host is silent; the VM is started by policy on-silent-peer=start")
	}
	if err := v.serveGuest(ctx); err != nil {
		return false, fmt.Errorf("after the boot: %w", err)
	}
	v.setTrouble("")
	return true, nil
}

// bootNote exists, until the host goes down, once what the boot asks for was
// decided.
func (v *VM) bootNote() string { return filepath.Join(v.deps.RunDir, "booted", string(v.id)) }

func (v *VM) noteBoot() {
	if err := writeFile(v.bootNote(), "decided\n"); err != nil {
		v.log.Error("remember that the boot was handled", "err", err)
	}
}
