package libvirt

import (
	"context"
	"errors"
	"fmt"
	"strings"

	lv "github.com/digitalocean/go-libvirt"
)

// ConnectError says that QEMU cannot reach an export, as whom, and what to do.
type ConnectError struct {
	Socket string
	Desc   string   // QEMU's words
	Labels []string // "dac +64055:+108", "apparmor libvirt-<uuid>"
	Remedy string
}

// Error is one line for a person.
func (e *ConnectError) Error() string {
	return fmt.Sprintf("qemu (%s) cannot connect to %s: %s; %s", strings.Join(e.Labels, ", "), e.Socket, e.Desc, e.Remedy)
}

// explain turns QEMU's refusal to connect into an error that names the rule to
// add. Other errors come back as they are.
func (h *Host) explain(uuid string, src NBDSource, err error) error {
	var q *QMPError
	if !errors.As(err, &q) || q.Command != "blockdev-add" || !strings.Contains(q.Desc, "connect") {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), stepWithin)
	defer cancel()
	c := &ConnectError{Socket: src.Socket, Desc: q.Desc}
	labels, lerr := h.securityLabels(ctx, uuid)
	if lerr != nil {
		c.Labels = []string{"its security labels could not be read"}
	}
	c.Labels = append(c.Labels, labels...)
	c.Remedy = remedyFor(src.Socket, labels)
	return errors.Join(c, err)
}

// securityLabels are "model label" for every driver in force.
func (h *Host) securityLabels(ctx context.Context, uuid string) ([]string, error) {
	info, err := h.Info(ctx)
	if err != nil {
		return nil, err
	}
	return onDomain(ctx, h, "read security labels", uuid, func(l *lv.Libvirt, d lv.Domain) ([]string, error) {
		ls, _, err := l.DomainGetSecurityLabelList(d)
		if err != nil {
			return nil, err
		}
		var out []string
		for i, x := range ls {
			model := "label"
			if i < len(info.SecurityModels) {
				model = info.SecurityModels[i]
			}
			out = append(out, strings.TrimSpace(model+" "+cString(x.Label)))
		}
		return out, nil
	})
}

func cString(b []int8) string {
	var s strings.Builder
	for _, c := range b {
		if c == 0 {
			break
		}
		s.WriteByte(byte(c))
	}
	return s.String()
}

// remedyFor names the exact rule for the labels seen.
func remedyFor(socket string, labels []string) string {
	var out []string
	for _, l := range labels {
		model, label, _ := strings.Cut(l, " ")
		switch model {
		case "dac":
			user, _, _ := strings.Cut(strings.ReplaceAll(label, "+", ""), ":")
			out = append(out, fmt.Sprintf("let uid %s reach it: name that user as qemu_user in the table [domain] of replicad.toml, restart replicad; and it must be able to pass through the directories of the socket", user))
		case "apparmor":
			out = append(out, fmt.Sprintf("allow it in AppArmor: add the line \"%s rw,\" to /etc/apparmor.d/local/abstractions/libvirt-qemu and reload the guest's profile", socket))
		case "selinux":
			out = append(out, fmt.Sprintf("allow it in SELinux: chcon -t svirt_image_t %s, and let svirt_t connectto the daemon's domain", socket))
		}
	}
	if len(out) == 0 {
		return "check owner and mode of the socket and its directories, and AppArmor or SELinux"
	}
	return strings.Join(out, "; or ")
}
