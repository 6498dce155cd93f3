package cbt

import (
	"kvmreplica/internal/block"
	"kvmreplica/internal/fsx"
)

// Inspect reads a tracker without changing anything, for status and
// replicafsck.
func Inspect(fsys fsx.FS) (Info, error) {
	sb, alarms, err := readSuper(fsys)
	if err != nil {
		return Info{Alarms: alarms}, err
	}
	in := Info{
		VMID: sb.vm, PeerID: sb.peer, Writer: sb.writer, BootID: sb.boot, State: sb.state.String(), Reason: sb.reason,
		Generation: sb.generation, Base: sb.base, Parent: sb.parent, Highest: sb.highest, Alarms: alarms,
	}
	for i := range sb.disks {
		e := &sb.disks[i]
		di := DiskInfo{Name: e.name, Size: e.size, Identity: e.ident}
		geo := geometry(e.size)
		di.Regions = int64(geo.regions)
		mr := mapRead{words: make([]uint64, geo.words())}
		if f, err := fsys.Open(mapName(e.mapID), 0); err != nil {
			setAll(mr.words, geo.regions)
			mr.alarms = []string{err.Error()}
		} else {
			mr = loadMap(f, e.mapID, geo)
			if err := f.Close(); err != nil {
				mr.alarms = append(mr.alarms, err.Error())
			}
		}
		di.MarkedRegions = popcount(mr.words)
		for _, a := range mr.alarms {
			in.Alarms = append(in.Alarms, "intent map of "+e.name+": "+a)
		}
		if sb.state == stateClean || sb.state == stateSealed {
			di.DirtyBytes = 0
		}
		in.Disks = append(in.Disks, di)
	}
	if sb.state == stateClean {
		err := readExact(fsys, sb, func(i int, s span) { in.Disks[i].DirtyBytes += int64(s.hi-s.lo) << granuleShift })
		if err != nil {
			in.Alarms = append(in.Alarms, "exact file: "+err.Error())
		}
	}
	return in, nil
}

// Info is what Inspect found.
type Info struct {
	VMID, PeerID, Writer, BootID string
	State, Reason                string
	Generation                   [16]byte
	Base, Parent                 Position
	Highest                      uint64
	Disks                        []DiskInfo
	Alarms                       []string
}

// DiskInfo is one disk of an Info. DirtyBytes is known after a clean stop only.
type DiskInfo struct {
	Name                   string
	Size                   int64
	Regions, MarkedRegions int64
	DirtyBytes             int64
	Identity               block.Identity
}
