package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lv "github.com/digitalocean/go-libvirt"
)

// Deadlines of the guest agent.
const (
	agentPingWithin = 3 * time.Second
	thawWithin      = 10 * time.Second
	thawAgainEvery  = 2 * time.Second
	thawAtMost      = 2 * time.Minute
)

// AgentPing asks the guest agent for a sign of life.
func (h *Host) AgentPing(ctx context.Context, uuid string) error {
	ctx, cancel := context.WithTimeout(ctx, agentPingWithin+2*time.Second)
	defer cancel()
	_, err := h.agent(ctx, uuid, "guest-ping", agentPingWithin)
	return err
}

func (h *Host) agent(ctx context.Context, uuid, command string, within time.Duration) (json.RawMessage, error) {
	return onDomain(ctx, h, "ask the guest agent for "+command, uuid, func(l *lv.Libvirt, d lv.Domain) (json.RawMessage, error) {
		res, err := l.QEMUDomainAgentCommand(d, `{"execute":"`+command+`"}`, int32(within/time.Second), 0)
		if err != nil {
			return nil, err
		}
		return json.RawMessage(strings.Join(res, "")), nil
	})
}

// GuestInfo is what the agent tells about the guest, name → value as libvirt
// names them ("os.pretty-name", "hostname", "fs.count", "if.0.addr.0.addr").
// Everything in it was said by the guest: display it, decide nothing on it.
func (h *Host) GuestInfo(ctx context.Context, uuid string) (map[string]string, error) {
	return onDomain(ctx, h, "read guest information", uuid, func(l *lv.Libvirt, d lv.Domain) (map[string]string, error) {
		ps, err := l.DomainGetGuestInfo(d, 0, 0)
		if err != nil {
			return nil, err
		}
		out := make(map[string]string, len(ps))
		for _, p := range ps {
			out[p.Field] = fmt.Sprint(p.Value.I)
		}
		return out, nil
	})
}

// Quiesce freezes the guest's file systems through its agent and returns how
// many, and a function that thaws them. The thaw is guaranteed: it runs at the
// latest holdFor after the freeze, has its own deadline, and is repeated until
// the guest answers. It reports held when the guest was frozen until the call:
// neither the watchdog nor the guest itself had thawed before. Calling it again
// returns the first result. When the freeze itself fails or times out the guest
// is thawed as well before Quiesce returns or soon after.
func (h *Host) Quiesce(ctx context.Context, uuid string, holdFor time.Duration) (filesystems int, thaw func() (held bool, err error), err error) {
	n, err := onDomain(ctx, h, "freeze the guest's file systems", uuid, func(l *lv.Libvirt, d lv.Domain) (int32, error) {
		return l.DomainFsfreeze(d, nil, 0)
	})
	once := sync.OnceValues(func() (int, error) { return h.thaw(uuid) })
	if err != nil {
		// The freeze may have happened, or may still happen, although we saw
		// an error; a thaw of a guest that is not frozen does nothing.
		var e *Error
		if errors.As(err, &e) && e.Unknown {
			go func() { _, _ = once() }()
		} else if !errors.Is(err, ErrState) && !errors.Is(err, ErrNotFound) {
			_ = h.Thaw(context.Background(), uuid)
		}
		return 0, nil, err
	}
	var late atomic.Bool
	w := time.AfterFunc(holdFor, func() {
		late.Store(true)
		_, _ = once()
	})
	return int(n), func() (bool, error) {
		w.Stop()
		thawed, err := once()
		return err == nil && thawed > 0 && !late.Load(), err
	}, nil
}

// thaw repeats until the guest has thawed, is gone, or thawAtMost is over. It
// takes no context: a cancelled caller must not leave a guest frozen.
func (h *Host) thaw(uuid string) (int, error) {
	until := time.Now().Add(thawAtMost)
	for {
		n, err := h.thawOnce(context.Background(), uuid)
		if err == nil || errors.Is(err, ErrNotFound) || errors.Is(err, ErrState) || time.Now().After(until) {
			return n, ignoreNotFound(err)
		}
		time.Sleep(thawAgainEvery)
	}
}

// Thaw thaws the guest's file systems, once. A guest that is not frozen, does
// not run or does not exist is no error.
func (h *Host) Thaw(ctx context.Context, uuid string) error {
	_, err := h.thawOnce(ctx, uuid)
	if errors.Is(err, ErrState) {
		return nil
	}
	return ignoreNotFound(err)
}

func (h *Host) thawOnce(ctx context.Context, uuid string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, thawWithin)
	defer cancel()
	n, err := onDomain(ctx, h, "thaw the guest's file systems", uuid, func(l *lv.Libvirt, d lv.Domain) (int32, error) {
		return l.DomainFsthaw(d, nil, 0)
	})
	return int(n), err
}
