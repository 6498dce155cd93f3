package replicad

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"time"
)

// hostStops asks systemd whether this host is going down. Guests are ended
// then, before the daemon is, and what it sees must not look like a person's
// shutdown. On a host without systemd nobody can be asked: false.
func hostStops(ctx context.Context) (bool, error) {
	if _, err := os.Stat("/run/systemd/system"); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", "is-system-running").Output()
	if errors.Is(err, exec.ErrNotFound) {
		return false, nil
	}
	// The exit code is that of a state other than running; the word tells.
	switch word := strings.TrimSpace(string(out)); word {
	case "stopping":
		return true, nil
	case "":
		return false, fmt.Errorf("ask systemd whether the host goes down: %w", err)
	}
	return false, nil
}
