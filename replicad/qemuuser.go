package replicad

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os/user"
	"strconv"
	"sync"

	"kvmreplica/internal/fsx"
)

// qemuUserFile keeps what libvirt said: after a boot data planes start before
// libvirtd answers, and a socket of the wrong owner is one QEMU cannot open.
const qemuUserFile = "qemu-user.json"

// qemuUser is who owns the sockets and images that QEMU opens: the configured
// user, else whom libvirt names, else whom it named last.
type qemuUser struct {
	state fsx.FS
	log   *slog.Logger

	mu       sync.Mutex
	uid, gid *int // guarded by mu; nil = root
	fixed    bool // by the configuration
}

type qemuUserRecord struct {
	Version int `json:"version"`
	UID     int `json:"uid"`
	GID     int `json:"gid"`
}

func openQEMUUser(state fsx.FS, name string, log *slog.Logger) (*qemuUser, error) {
	q := &qemuUser{state: state, log: log, fixed: name != ""}
	if q.fixed {
		u, err := user.Lookup(name)
		if err != nil {
			return nil, fmt.Errorf("domain.qemu_user: %w", err)
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		q.uid, q.gid = &uid, &gid
		return q, errors.Join(err1, err2)
	}
	var r qemuUserRecord
	switch err := fsx.ReadJSON(state, qemuUserFile, 1<<10, &r); {
	case err == nil && r.Version == 1 && r.UID >= 0 && r.GID >= 0:
		q.uid, q.gid = &r.UID, &r.GID
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		log.Warn("whom QEMU ran as is not known until libvirt says it again", "err", err)
	}
	return q, nil
}

func (q *qemuUser) owner() (uid, gid *int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.uid, q.gid
}

// learn takes what libvirt says.
func (q *qemuUser) learn(uid, gid int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !ok || q.fixed || q.uid != nil && *q.uid == uid && *q.gid == gid {
		return
	}
	q.uid, q.gid = &uid, &gid
	if err := fsx.WriteJSON(q.state, qemuUserFile, qemuUserRecord{Version: 1, UID: uid, GID: gid}); err != nil {
		q.log.Warn("whom QEMU runs as is forgotten at the next start", "err", err)
	}
	q.log.Info("QEMU runs as", "uid", uid, "gid", gid)
}
