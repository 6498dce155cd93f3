package replicad

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"kvmreplica/replicad/api"
	"kvmreplica/replicad/config"
	"kvmreplica/replicad/wire"
)

// ReloadFrom says where Reload reads the configuration, and which level the log
// follows (nil: none). It must be called before Run.
func (d *Daemon) ReloadFrom(path string, level *slog.LevelVar) {
	d.file, d.level = path, level
}

// conf is the configuration in force: what it was at the start, and what was
// taken over since.
func (d *Daemon) conf() config.Config {
	if c := d.live.Load(); c != nil {
		return *c
	}
	return d.cfg
}

// Reload reads the configuration again and takes over what a running daemon can,
// whose keys it returns. Keys that changed and take a restart are an error, which
// names them; the others count all the same. A file that cannot be read or has a
// complaint changes nothing. It may be repeated, and called concurrently.
func (d *Daemon) Reload() ([]string, error) {
	d.reloading.Lock()
	defer d.reloading.Unlock()
	if d.file == "" {
		return nil, &wire.Error{Kind: wire.KindRefused, Text: "the daemon was started without a configuration file", Hint: "systemctl restart replicad"}
	}
	next, err := config.Load(d.file)
	if err != nil {
		return nil, &wire.Error{Kind: wire.KindInvalid, Text: "nothing was changed: " + err.Error(), Hint: "replicad --check --config " + d.file}
	}
	old := d.conf()
	var taken, left []string
	for _, c := range old.Changes(next) {
		if c.Live {
			taken = append(taken, c.Key)
		} else {
			left = append(left, c.Key)
		}
	}
	now := old.WithLive(next)
	d.live.Store(&now)
	if d.level != nil {
		d.level.Set(now.LogLevel)
	}
	d.setBandwidth(time.Now())
	if slices.Contains(taken, "access") {
		if err := d.openSocket(); err != nil {
			return taken, err
		}
	}
	d.log.Info("the configuration was read again", "file", d.file, "taken over", strings.Join(taken, " "), "wait for a restart", strings.Join(left, " "))
	if len(left) > 0 {
		text := fmt.Sprintf("changed in %s, and only a restart takes it over: %s", d.file, strings.Join(left, ", "))
		return taken, &wire.Error{Kind: wire.KindRefused, Text: text, Hint: "systemctl restart replicad (guests keep their disks), or take the change back"}
	}
	return taken, nil
}

// reload is Reload for a person.
func (d *Daemon) reload(emit func(api.Event)) error {
	taken, err := d.Reload()
	switch {
	case len(taken) > 0:
		note(emit, "Taken over: %s.", strings.Join(taken, ", "))
	case err == nil:
		note(emit, "Nothing has changed in %s.", d.file)
	}
	return err
}
