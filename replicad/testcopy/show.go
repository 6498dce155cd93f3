package testcopy

import (
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// Show is everything that is shown of a VM's tests on this host.
func (m *Manager) Show(id wire.VMID) (tests []status.Test, last *status.TestEnd) {
	for _, c := range m.of(id) {
		tests = append(tests, m.show(c))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := len(m.ended) - 1; i >= 0; i-- {
		e := m.ended[i]
		if e.VM != id {
			continue
		}
		return tests, &status.TestEnd{
			Name: e.Name, Purpose: e.Purpose, Point: e.Point, Cut: e.Cut, Started: e.Started, Ended: e.Ended, Ran: e.Ran, Reason: e.Reason,
		}
	}
	return tests, nil
}

func (m *Manager) show(c *copied) status.Test {
	rec := c.record()
	c.mu.Lock()
	defer c.mu.Unlock()
	t := status.Test{
		ID: rec.ID, Name: rec.Name, UUID: rec.UUID, Purpose: rec.Purpose, Point: rec.At.String(), Ordinal: rec.Ordinal, Cut: rec.Cut,
		Started: rec.Started, Phase: string(rec.Phase), Guest: c.state, Isolated: rec.Isolated(), Quota: rec.Quota, Trouble: c.trouble,
	}
	if rec.Isolated() {
		t.Proven = c.proven
	}
	for _, n := range rec.NICs {
		t.Networks = append(t.Networks, status.TestNetwork{
			Logical: n.Logical, MAC: n.MAC, Network: n.Network, Bridge: n.Bridge + n.HostBridge, Isolated: n.Isolated, IP: n.IP,
		})
	}
	if rec.Serial {
		t.Console = m.console(rec)
	}
	if c.served != nil {
		t.Written = c.served.used()
	}
	return t
}
