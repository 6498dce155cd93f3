package histories_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// What happens to hosts, daemons, the link and the guest.

func (h *history) killDaemon(k *host) error {
	if !k.Up() {
		return nil
	}
	h.count("kill replicad")
	h.note("%s: kill replicad", k.Name())
	return h.Daemon(k.Name()).Kill()
}

func (h *history) killPlane(ctx context.Context, k *host) {
	if !k.Up() {
		return
	}
	h.count("kill data plane")
	_, err := k.Exec(ctx, "sh", "-c", "kill -9 $(cat /run/replicad/vm/"+vmUUID(h.seed)+"/dataplane.pid)")
	h.note("%s: kill the data plane (%t)", k.Name(), err == nil)
}

func (h *history) crash(ctx context.Context, k *host, again bool) error {
	if !k.Up() {
		return nil
	}
	h.count("power cut")
	h.note("%s: power cut", k.Name())
	k.up.Store(false)
	if err := k.Crash(); err != nil {
		return err
	}
	h.look()
	if again {
		return h.reboot(ctx, k)
	}
	return nil
}

func (h *history) reboot(ctx context.Context, k *host) error {
	h.note("%s: boots", k.Name())
	err := h.boot(ctx, k)
	if err == nil && h.cut.Load() {
		err = h.hosts["A"].Link(false)
	}
	h.talked = time.Now()
	return err
}

func (h *history) link(up bool) error {
	h.count(map[bool]string{true: "link joined", false: "link cut"}[up])
	h.note("link up %t", up)
	h.cut.Store(!up)
	h.talked = time.Now()
	if !h.hosts["A"].Up() {
		return nil // it comes up with the cable as it is
	}
	return h.hosts["A"].Link(up)
}

// revive starts daemons that died.
func (h *history) revive(ctx context.Context) error {
	for _, n := range []string{"A", "B"} {
		k := h.hosts[n]
		if !k.Up() || !h.died(k) {
			continue
		}
		h.note("%s: replicad starts (was armed: %q)", n, k.armed)
		k.armed = ""
		if err := h.start(ctx, k); err != nil {
			return err
		}
	}
	return nil
}

// off ends the guest as its administrator, or its user, would.
func (h *history) off(ctx context.Context, k *host) {
	if !k.runs(h.name) {
		return
	}
	h.count("guest off")
	if h.r.IntN(2) == 0 {
		h.destroy(ctx, k)
		return
	}
	_, err := k.Virsh(ctx, "shutdown", h.name)
	h.note("%s: virsh shutdown (%v)", k.Name(), err)
	wait(ctx, 3*time.Second, func() bool { return !k.runs(h.name) })
}

// arm restarts a daemon so that it kills itself at a step of a plan.
func (h *history) arm(ctx context.Context, k *host) error {
	plans := map[string][]string{
		"planned":   {"shutdown", "demote", "final", "seal", "demoted", "promote", "follow"},
		"promote":   {"apply", "generation", "store", "tracker", "define", "firmware", "start", "reverse"},
		"unplanned": {"apply", "generation", "store", "tracker", "define", "start"},
		"commit":    {"role", "seal"},
		"cancel":    {"stop", "close", "role", "drop", "follow"},
		"reverse":   {"keep", "final", "release", "ship"},
	}
	kinds := []string{"planned", "promote", "unplanned", "commit", "cancel", "reverse"}
	kind := kinds[h.r.IntN(len(kinds))]
	steps := plans[kind]
	at := kind + "/" + steps[h.r.IntN(len(steps))] + "/" + []string{"begun", "acted"}[h.r.IntN(2)]
	h.count("armed")
	h.note("%s: replicad will kill itself at %s", k.Name(), at)
	if err := h.Daemon(k.Name()).Kill(); err != nil {
		return err
	}
	k.armed = at
	return h.start(ctx, k)
}

// kept are the directories that are put back together.
var kept = []string{"/var/lib/replicad", imagesDir, replicasDir, "/etc/libvirt/qemu"}

// putBack copies a host that is off, or puts it back to its copy.
func (h *history) putBack(ctx context.Context, k *host) error {
	if err := h.crash(ctx, k, false); err != nil {
		return err
	}
	restore := h.copies[k.Name()]
	for i, d := range kept {
		from, to := k.Path(d), filepath.Join(h.dir, fmt.Sprintf("kept-%s-%d", k.Name(), i))
		if restore {
			from, to = to, from
		}
		if out, err := exec.CommandContext(ctx, "sh", "-ec", `rm -rf "$2"; [ ! -e "$1" ] || cp -a --sparse=always "$1" "$2"`, "sh", from, to).CombinedOutput(); err != nil {
			return fmt.Errorf("copy %s: %w: %s", from, err, out)
		}
	}
	if restore {
		h.count("put back")
		h.note("%s: put back to its copy", k.Name())
		h.forced.Store(true)
		h.loses(k)
		delete(h.pins, k.Name())
		h.before[k.Name()] = &state{}
	} else {
		h.count("copied")
		h.note("%s: its files are copied", k.Name())
		h.copies[k.Name()] = true
	}
	return h.reboot(ctx, k)
}

// forget removes the kept copies.
func (h *history) forget() error {
	left, err := filepath.Glob(filepath.Join(h.dir, "kept-*"))
	for _, d := range left {
		err = errors.Join(err, os.RemoveAll(d))
	}
	return err
}
