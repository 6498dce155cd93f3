package cbt

import "golang.org/x/sys/unix"

// Kill gives up a Group the way SIGKILL does: nothing more becomes durable,
// shared memory stays.
func Kill(g *Group) {
	g.gate.Lock()
	g.refuse = errKilled
	g.gate.Unlock()
	var maps []*mapping
	for _, d := range g.disks {
		if st := d.st.Load(); st.shm != nil {
			maps = append(maps, st.shm.mapping)
		}
	}
	if g.share != nil {
		maps = append(maps, g.share.mapping)
	}
	_ = g.drop()
	for _, m := range maps {
		_ = unix.Munmap(m.mem)
	}
}

type killed struct{}

func (killed) Error() string { return "killed" }

var errKilled = killed{}
