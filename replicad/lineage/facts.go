package lineage

import (
	"slices"

	"kvmreplica/replicad/delta"
	"kvmreplica/replicad/wire"
)

// kin is how two generations are related.
type kin int

const (
	kinNone     kin = iota // no generation in common
	kinSame                // the same generation
	kinPNewer              // R's generation is an ancestor of P's
	kinRNewer              // P's generation is an ancestor of R's
	kinFork                // neither, but they share an ancestor
	kinUnstated            // one side names no generation
)

// facts is what the rows look at, worked out once from the two halves.
type facts struct {
	p   wire.HandshakeRequest
	r   wire.HandshakeReply
	kin kin
	// parent is where P's generation began; zero for a first generation.
	parent delta.Pos
	// clash holds two positions with one name and two digests, if any.
	clash [2]delta.Pos
	// disks is empty when the disk sets agree or R did not tell.
	disks string
}

func gather(p wire.HandshakeRequest, r wire.HandshakeReply) facts {
	f := facts{p: p, r: r, kin: kinship(p, r)}
	if len(p.Ancestors) > 0 {
		f.parent = p.Ancestors[0]
	}
	f.clash = clash(p, r)
	f.disks = disksDiffer(p.Disks, r.Disks)
	return f
}

func kinship(p wire.HandshakeRequest, r wire.HandshakeReply) kin {
	switch {
	case p.Generation.IsZero() || r.Generation.IsZero():
		return kinUnstated
	case p.Generation == r.Generation:
		return kinSame
	case has(p.Ancestors, r.Generation):
		return kinPNewer
	case has(r.Ancestors, p.Generation):
		return kinRNewer
	}
	for _, a := range p.Ancestors {
		if has(r.Ancestors, a.Generation) {
			return kinFork
		}
	}
	return kinNone
}

func has(chain []delta.Pos, g delta.Generation) bool {
	return slices.ContainsFunc(chain, func(a delta.Pos) bool { return a.Generation == g })
}

// clash finds a (generation, epoch) that carries one digest at P and another
// at R. Positions without a digest are not known well enough to accuse anyone.
func clash(p wire.HandshakeRequest, r wire.HandshakeReply) [2]delta.Pos {
	ours := slices.Concat(p.Ancestors, p.Known, []delta.Pos{p.Base, p.Acked, p.Before})
	theirs := slices.Concat(r.Ancestors, []delta.Pos{r.Committed, r.Base})
	for _, a := range ours {
		for _, b := range theirs {
			named := !a.Generation.IsZero() && a.Digest != delta.Digest{} && b.Digest != delta.Digest{}
			if named && a.Generation == b.Generation && a.Epoch == b.Epoch && a.Digest != b.Digest {
				return [2]delta.Pos{a, b}
			}
		}
	}
	return [2]delta.Pos{}
}

// disksDiffer names a disk only one side has; sizes travel with each epoch and
// are not compared here.
func disksDiffer(p []wire.Disk, r []wire.DiskName) string {
	if len(r) == 0 {
		return ""
	}
	for _, d := range p {
		if !slices.Contains(r, d.Name) {
			return string(d.Name)
		}
	}
	for _, n := range r {
		if !slices.ContainsFunc(p, func(d wire.Disk) bool { return d.Name == n }) {
			return string(n)
		}
	}
	return ""
}

// follows reports whether R merely follows: a replica that never wrote by
// itself since its committed position.
func (f facts) follows() bool { return f.r.Role == RoleReplica }

// seeding reports whether R has no committed position yet.
func (f facts) seeding() bool { return f.follows() && f.r.Committed.IsZero() }

// consent reports whether an operator agreed that R gives up its own writes.
func (f facts) consent() bool {
	return !f.r.Discard.IsZero() && f.r.Discard == f.r.Generation
}
