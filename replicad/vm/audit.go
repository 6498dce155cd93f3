package vm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/failover"
	"kvmreplica/replicad/wire"
)

// The audit log says who changed which role, when, with what result: one JSON
// object a line, in the state directory, only ever appended to. The same
// correlation id stands in both hosts' logs.

const (
	auditFile = "audit.jsonl"
	auditOld  = "audit.jsonl.1"
	maxAudit  = 8 << 20 // then a new file is begun; one old one is kept
)

// AuditEntry is one line.
type AuditEntry struct {
	At      time.Time `json:"at"`
	VM      wire.VMID `json:"vm"`
	Name    string    `json:"name"`
	Request string    `json:"request,omitempty"` // correlation id
	Who     string    `json:"who"`               // "operator", "timer", "daemon", or the other host
	What    string    `json:"what"`              // a plan that began or ended, a role that changed, a request that was answered
	Result  string    `json:"result"`
}

// audit appends a line, durably. A log that cannot be written stops nothing:
// the change itself is durable elsewhere.
func (v *VM) audit(request, who, what, result string) {
	r := v.record()
	e := AuditEntry{At: v.deps.Now().UTC(), VM: v.id, Name: r.Name, Request: request, Who: who, What: what, Result: oneLine(result)}
	if err := v.mgr.appendAudit(e); err != nil {
		v.log.Error("write the audit log", "err", err, "what", what, "request", request)
	}
}

func (m *Manager) appendAudit(e AuditEntry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	m.auditMu.Lock()
	defer m.auditMu.Unlock()
	f, err := m.fsys.Open(auditFile, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return err
	}
	defer f.Close()
	end, err := f.Size()
	if err != nil {
		return err
	}
	if end > maxAudit {
		if err := m.fsys.Rename(auditFile, auditOld); err != nil {
			return err
		}
		g, err := m.fsys.Open(auditFile, os.O_RDWR|os.O_CREATE)
		if err != nil {
			return err
		}
		defer g.Close()
		f, end = g, 0
	}
	// A line that a crash tore stays alone on its line.
	var last [1]byte
	if end > 0 {
		if _, err := f.ReadAt(last[:], end-1); err == nil && last[0] != '\n' {
			line = append([]byte{'\n'}, line...)
		}
	}
	if _, err := f.WriteAt(append(line, '\n'), end); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return m.fsys.SyncDir(".")
}

// Asked records who asked this host for what, and why: the plan and the roles
// that follow stand under the same id, here and on the other host.
func (v *VM) Asked(request, who, what, reason string) {
	v.audit(request, who, what, reason)
}

// who stands behind a plan.
func (v *VM) who(j failover.Journal, continued bool) string {
	switch {
	case continued:
		return "daemon"
	case j.Kind == failover.Promote:
		return "host " + v.mgr.peerName(v.record().Peer)
	case strings.HasPrefix(j.Request, "timer-"):
		return "timer"
	}
	return "operator"
}

// Audit returns the newest entries of this VM, oldest first, at most n.
func (v *VM) Audit(n int) ([]AuditEntry, error) {
	var out []AuditEntry
	for _, name := range []string{auditOld, auditFile} {
		b, err := fsx.ReadFile(v.mgr.fsys, name, 2*maxAudit)
		if absent(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the audit log: %w", err)
		}
		lines := bufio.NewScanner(bytes.NewReader(b))
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var e AuditEntry
			if json.Unmarshal(lines.Bytes(), &e) == nil && e.VM == v.id { // a torn line is nobody's
				out = append(out, e)
			}
		}
		if err := lines.Err(); err != nil {
			return nil, fmt.Errorf("read the audit log: %w", err)
		}
	}
	return out[max(0, len(out)-n):], nil
}
