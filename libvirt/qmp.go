package libvirt

import (
	"context"
	"encoding/json"
	"fmt"

	lv "github.com/digitalocean/go-libvirt"
)

// QMPError is QEMU's refusal of a monitor command. libvirt returns it inside a
// successful answer.
type QMPError struct {
	Command, Class, Desc string
}

// Error is one line for a person.
func (e *QMPError) Error() string { return fmt.Sprintf("qemu refused %s: %s", e.Command, e.Desc) }

// qmpReply is the envelope of every answer.
type qmpReply struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// monitor runs QMP commands on one domain. The graph code needs no more of a
// host, and tests replace it.
type monitor interface {
	// qmp runs command with args (nil for none) and decodes the result into
	// out (nil to ignore it).
	qmp(ctx context.Context, command string, args, out any) error
}

// domainMonitor is the monitor of a running domain. Using it taints the domain
// in libvirt's eyes ("custom-monitor"), which has no effect but the mark.
type domainMonitor struct {
	h    *Host
	uuid string
}

var _ monitor = domainMonitor{}

func (m domainMonitor) qmp(ctx context.Context, command string, args, out any) error {
	doc, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return fmt.Errorf("encode %s: %w", command, err)
	}
	ans, err := onDomain(ctx, m.h, "run "+command, m.uuid, func(l *lv.Libvirt, d lv.Domain) (string, error) {
		return l.QEMUDomainMonitorCommand(d, string(doc), 0)
	})
	if err != nil {
		return err
	}
	return decodeReply(command, []byte(ans), out)
}

func decodeReply(command string, ans []byte, out any) error {
	var r qmpReply
	if err := json.Unmarshal(ans, &r); err != nil {
		return fmt.Errorf("read the answer to %s: %w", command, err)
	}
	if r.Error != nil {
		return &QMPError{Command: command, Class: r.Error.Class, Desc: r.Error.Desc}
	}
	if r.Return == nil {
		return fmt.Errorf("read the answer to %s: neither result nor error", command)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(r.Return, out); err != nil {
		return fmt.Errorf("read the answer to %s: %w", command, err)
	}
	return nil
}
