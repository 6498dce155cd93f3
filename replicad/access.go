package replicad

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/wire"
)

// openSocket gives the control socket the mode that [access] asks for: the first
// barrier. The second is the role of each caller.
func (d *Daemon) openSocket() error {
	mode := os.FileMode(0o600)
	if d.conf().Access.Any() {
		mode = 0o666
	}
	if err := os.Chmod(filepath.Join(d.cfg.RunDir, controlSocket), mode); err != nil {
		return fmt.Errorf("open the control socket to whom [access] names: %w", err)
	}
	return nil
}

// roleOf is what a caller of the control socket may do.
func (d *Daemon) roleOf(c api.Caller) api.Role {
	a := d.conf().Access
	member := func(groups []string) bool {
		return slices.ContainsFunc(groups, func(g string) bool {
			n, err := groupID(g)
			return err == nil && slices.Contains(c.Groups, n)
		})
	}
	switch {
	case c.UID == 0:
		return api.Admin
	case c.UID < 0:
		return api.Nobody
	case member(a.Operators):
		return api.Operator
	case member(a.Monitors):
		return api.Monitor
	}
	return api.Nobody
}

// groupID is a group's number, looked up anew: groups come and go.
func groupID(name string) (int, error) {
	if n, err := strconv.Atoi(name); err == nil && n >= 0 {
		return n, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(g.Gid)
}

// accessChecks names groups of [access] that this host does not have.
func (d *Daemon) accessChecks() (out []wire.Check) {
	a := d.conf().Access
	for _, g := range slices.Concat(a.Operators, a.Monitors) {
		if _, err := groupID(g); err != nil {
			out = append(out, wire.Check{
				Name: "Access", Result: wire.Warning, Detail: "group " + g + " of [access]: " + err.Error(),
				Remedy: "groupadd " + g + ", or its number if it comes from a directory service",
			})
		}
	}
	return out
}
