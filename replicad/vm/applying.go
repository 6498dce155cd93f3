package vm

import (
	"context"
	"errors"
	"fmt"

	"kvmreplica/replicad/points"
)

// apply writes what is committed into the images until ctx ends. What fails is
// tried again: a full or an absent file system comes back by itself, and
// nothing of what was committed is lost meanwhile.
func (v *VM) apply(ctx context.Context, k *keeping) {
	for pause := newPause(); ; {
		v.mu.Lock()
		st := k.store
		v.mu.Unlock()
		err := st.ApplyAll(ctx)
		if err == nil {
			v.setApplyError(nil)
			pause = newPause()
			err = st.Run(ctx)
		}
		if ctx.Err() != nil || errors.Is(err, points.ErrPromoted) {
			return
		}
		v.setApplyError(err)
		if !pause.wait(ctx) {
			return
		}
		if errors.Is(err, points.ErrFailed) {
			v.reopen(ctx, k, pause)
		}
	}
}

// reopen replaces a store that has failed by what its files say.
func (v *VM) reopen(ctx context.Context, k *keeping, pause *pause) {
	v.endMounts("the replica store failed and is opened again")
	if err := k.store.Close(); err != nil {
		v.log.Warn("close the failed replica store", "err", err)
	}
	for {
		st, err := points.Open(v.storeConfig())
		if err == nil {
			v.mu.Lock()
			k.store = st
			v.mu.Unlock()
			v.endMounts("the replica store was opened again") // begun meanwhile
			return
		}
		v.setApplyError(fmt.Errorf("open the replica store: %w", err))
		if !pause.wait(ctx) {
			return
		}
	}
}

func (v *VM) setApplyError(err error) {
	v.mu.Lock()
	was := v.applying
	v.applying = err
	v.mu.Unlock()
	if err != nil && (was == nil || was.Error() != err.Error()) {
		v.log.Error("apply what was received", "err", err)
	}
}
