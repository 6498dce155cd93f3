package peer

import (
	"fmt"
	"slices"

	"kvmreplica/internal/count"
	"kvmreplica/replicad/wire"
)

func refused(hint, format string, args ...any) error {
	return &wire.Error{Kind: wire.KindRefused, Text: fmt.Sprintf(format, args...), Hint: hint}
}

// mayTouch: the VM's relationship is the caller's. A foreign VM and an unknown
// one get the same answer: a peer learns nothing about others.
func (s *Server) mayTouch(rec Record, vm wire.VMID) error {
	rel, ok := s.cfg.Ownership.Relation(vm)
	if !ok || rel.Peer != rec.Host {
		return &wire.Error{Kind: wire.KindNotFound, Text: fmt.Sprintf("no VM %s is shared with this host", vm), Hint: "replicactl vm enable NAME"}
	}
	return nil
}

// mayReceive: this host takes replicas at all, and from this peer.
func (s *Server) mayReceive(rec Record) error {
	switch {
	case !s.cfg.Receiving():
		return refused("set receiving = true in replicad.toml there", "the host does not receive replicas")
	case !rec.Allow.MaySend:
		return refused("replicactl peer allow on the receiving host", "this host may not send replicas there")
	}
	return nil
}

// maySend: the caller may send data of this VM, whose replica is here.
func (s *Server) maySend(rec Record, vm wire.VMID) error {
	if err := s.mayTouch(rec, vm); err != nil {
		return err
	}
	if rel, _ := s.cfg.Ownership.Relation(vm); !rel.Receives {
		return refused("", "VM %s has no replica on this host", vm)
	}
	return s.mayReceive(rec)
}

func (s *Server) mayCheck(rec Record, q wire.CheckRequest) error {
	if q.VM == "" || q.For == "enable" {
		return nil // nothing about an existing VM is told
	}
	return s.mayTouch(rec, q.VM)
}

func (s *Server) mayWithdraw(rec Record, q wire.Withdraw) error {
	if err := s.mayTouch(rec, q.VM); err != nil {
		return err
	}
	if rel, _ := s.cfg.Ownership.Relation(q.VM); q.Delete && !rel.Receives {
		return refused("", "VM %s has no replica on this host", q.VM)
	}
	return nil
}

// mayFailover: a caller may only ask for a VM, or for the release of what an
// old primary has, where the entry says so.
func (s *Server) mayFailover(rec Record, q wire.FailoverRequest) error {
	if err := s.mayTouch(rec, q.VM); err != nil {
		return err
	}
	rel, _ := s.cfg.Ownership.Relation(q.VM)
	if rel.Receives || rec.Allow.MayRequestReverse {
		return nil
	}
	switch q.Step {
	case "request-planned":
		return refused("start the planned failover on the primary, or allow it there: replicactl peer allow "+rec.Name+" --may-send --may-ask",
			"this host may not ask for the VM")
	case "release":
		return refused("allow it on the old primary: replicactl peer allow "+rec.Name+" --may-send --may-ask",
			"this host may not ask the old primary, so that does not give up what it has")
	}
	return nil
}

// mayOffer applies the entry's quotas to a new or changed VM. The caller holds
// the one place in s.offers.
func (s *Server) mayOffer(rec Record, q wire.Offer) error {
	if err := s.mayReceive(rec); err != nil {
		return err
	}
	a := rec.Allow
	if rel, ok := s.cfg.Ownership.Relation(q.VM); ok {
		if err := s.mayTakeOver(rec, rel); err != nil {
			return err
		}
	}
	if len(a.VMs) > 0 && !slices.Contains(a.VMs, q.VM) {
		return refused("replicactl peer allow on the receiving host", "VM %s is not on the list this host may send", q.VM)
	}
	use := s.cfg.Ownership.Usage(rec.Host, q.VM)
	if a.MaxVMs > 0 && use.VMs >= a.MaxVMs {
		return quota("%s allowed, all used", count.Of(a.MaxVMs, "VM"))
	}
	if a.MaxDisks > 0 && len(q.Disks) > a.MaxDisks {
		return quota("%s per VM allowed, this one has %d", count.Of(a.MaxDisks, "disk"), len(q.Disks))
	}
	if a.MaxPoints > 0 && q.Points > a.MaxPoints {
		return quota("%s allowed, %d asked for", count.Of(a.MaxPoints, "recovery point"), q.Points)
	}
	if a.MaxBytes > 0 {
		left := a.MaxBytes - use.Bytes
		for _, d := range q.Disks {
			if left -= d.Size; left < 0 {
				return quota("%d bytes of disks are allowed, %d are used by other VMs, this VM does not fit", a.MaxBytes, use.Bytes)
			}
		}
	}
	return nil
}

// mayTakeOver: an existing VM stays with its host, or moves within one group,
// or is this host's own and not offered here at all.
func (s *Server) mayTakeOver(rec Record, rel Relation) error {
	if rel.Peer == rec.Host {
		if !rel.Receives {
			return &wire.Error{Kind: wire.KindConflict, Text: "the receiving host is itself the primary of this VM"}
		}
		return nil
	}
	other, ok := s.cfg.Store.Get(rel.Peer)
	if ok && rel.Receives && rec.Allow.Group != "" && other.Allow.Group == rec.Allow.Group {
		return nil
	}
	return &wire.Error{Kind: wire.KindConflict, Text: "a VM with this id is protected by another host", Hint: "end that protection first, or put both hosts into one group on the receiving host"}
}

func quota(format string, args ...any) error {
	return &wire.Error{
		Kind: wire.KindNoSpace, Text: "quota: " + fmt.Sprintf(format, args...),
		Hint: "replicactl peer allow on the receiving host",
	}
}
