package block

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// QEMU's image lock protocol: a user of an image holds a shared lock on byte
// qemuUses+i for each permission i it uses and on qemuUnshared+i for each
// permission it does not grant to others, and then looks whether somebody
// else's locks contradict.
const (
	qemuUses     = 100
	qemuUnshared = 200
)

type qemuPerm uint

const (
	permConsistentRead qemuPerm = iota
	permWrite
	permWriteUnchanged
	permResize
	permCount
)

func (p qemuPerm) String() string {
	return [...]string{"consistent read", "write", "write unchanged", "resize"}[p]
}

// lockPatience is how long our own lock is tried on a block device: udev takes
// it for a moment whenever a device is closed after writing.
const (
	lockPatience = time.Second
	lockRetry    = 50 * time.Millisecond
)

// LockedError: another program uses the image.
type LockedError struct {
	Path   string
	What   string // which lock
	PID    int    // holder, 0 when unknown
	Holder string // its command name, "" when unknown
	// Class and At say where the lock is: FLOCK, or OFDLCK and its byte.
	Class string
	At    int64
}

// Named looks for the holder once more, for a process that may see more than the
// one that met the lock. What it does not find stays unknown.
func (e *LockedError) Named() *LockedError {
	n := *e
	var st unix.Stat_t
	if n.PID == 0 && unix.Stat(n.Path, &st) == nil {
		n.find(&st, "")
	}
	return &n
}

func (e *LockedError) find(image *unix.Stat_t, own string) {
	if pid := lockHolder(image, own, e.Class, e.At); pid != 0 {
		e.PID, e.Holder = pid, processName(pid)
	}
}

// Error names the holder when it is known, and what to do.
func (e *LockedError) Error() string {
	if e.PID == 0 {
		return fmt.Sprintf("image %s is in use by another program (%s); find it with: fuser -v %s", e.Path, e.What, e.Path)
	}
	return fmt.Sprintf("image %s is in use by process %d (%s) (%s); stop it first, or look at it with: ps -fp %d",
		e.Path, e.PID, e.Holder, e.What, e.PID)
}

// Is makes errors.Is(err, ErrLocked) work.
func (e *LockedError) Is(target error) bool { return target == ErrLocked }

// ErrLocked: the image is in use by another program.
var ErrLocked = errors.New("image is locked")

// lockOwn takes our own lock: exclusive when writable, shared otherwise.
func (f *File) lockOwn() error {
	how, what := unix.LOCK_EX|unix.LOCK_NB, "exclusive lock"
	if f.readOnly {
		how, what = unix.LOCK_SH|unix.LOCK_NB, "shared lock"
	}
	for deadline := time.Now().Add(lockPatience); ; {
		err := unix.Flock(f.fd, how)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case !errors.Is(err, unix.EWOULDBLOCK):
			return &os.PathError{Op: "lock image", Path: f.path, Err: err}
		case !f.blockDev || time.Now().After(deadline):
			return f.lockedError(what, "FLOCK", 0)
		default:
			time.Sleep(lockRetry)
		}
	}
}

// unlock gives all locks back. Closing the descriptor would not do: a child
// that was forked and has not yet come to exec has a duplicate of it, and with
// it the locks, so whoever opens the image next would find it in use.
func (f *File) unlock() {
	_ = f.unlockQEMU() // fails only for descriptors that hold no lock
	_ = unix.Flock(f.fd, unix.LOCK_UN)
}

// LockQEMU takes QEMU's image lock, so that qemu, qemu-img and libvirt refuse
// the image: as a writer nobody else may write or resize, as a reader nobody
// may change it. It fails with a *LockedError when they hold it. Twice is
// harmless. The lock ends with UnlockQEMU or Close.
func (f *File) LockQEMU() error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.leave()
	err := f.lockQEMU(f.qemuPerms())
	if err != nil {
		_ = f.unlockQEMU()
	}
	return err
}

// qemuPerms is what we use of an image and what we do not share.
func (f *File) qemuPerms() (uses, unshared []qemuPerm) {
	uses = []qemuPerm{permConsistentRead}
	if !f.readOnly {
		uses = append(uses, permWrite)
	}
	return uses, []qemuPerm{permWrite, permResize}
}

// lockQEMU takes first and looks afterwards, as QEMU does: of two that start at
// once at least one sees the other.
func (f *File) lockQEMU(uses, unshared []qemuPerm) error {
	for _, p := range uses {
		if err := f.ofd(unix.F_OFD_SETLK, unix.F_RDLCK, qemuUses+int64(p)); err != nil {
			return err
		}
	}
	for _, p := range unshared {
		if err := f.ofd(unix.F_OFD_SETLK, unix.F_RDLCK, qemuUnshared+int64(p)); err != nil {
			return err
		}
	}
	for _, p := range uses {
		if err := f.checkQEMU(qemuUnshared+int64(p), "does not share "+p.String()); err != nil {
			return err
		}
	}
	for _, p := range unshared {
		if err := f.checkQEMU(qemuUses+int64(p), "uses "+p.String()); err != nil {
			return err
		}
	}
	return nil
}

// UnlockQEMU gives QEMU's image lock back. Without a lock it does nothing.
func (f *File) UnlockQEMU() error {
	if err := f.enter(); err != nil {
		return err
	}
	defer f.leave()
	return f.unlockQEMU()
}

func (f *File) unlockQEMU() error {
	for _, base := range []int64{qemuUses, qemuUnshared} {
		for p := range permCount {
			if err := f.ofd(unix.F_OFD_SETLK, unix.F_UNLCK, base+int64(p)); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkQEMU fails when another open file description holds a lock on the byte.
func (f *File) checkQEMU(at int64, what string) error {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: at, Len: 1}
	if err := f.fcntl(unix.F_OFD_GETLK, &lk); err != nil {
		return &os.PathError{Op: "query image lock", Path: f.path, Err: err}
	}
	if lk.Type == unix.F_UNLCK {
		return nil
	}
	return f.lockedError("QEMU image lock: it "+what, "OFDLCK", at)
}

func (f *File) ofd(cmd int, typ int16, at int64) error {
	lk := unix.Flock_t{Type: typ, Whence: 0, Start: at, Len: 1}
	err := f.fcntl(cmd, &lk)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return f.lockedError("QEMU image lock", "OFDLCK", at)
	}
	return &os.PathError{Op: "take image lock", Path: f.path, Err: err}
}

func (f *File) fcntl(cmd int, lk *unix.Flock_t) error {
	for {
		if err := unix.FcntlFlock(uintptr(f.fd), cmd, lk); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (f *File) lockedError(what, class string, at int64) error {
	e := &LockedError{Path: f.path, What: what, Class: class, At: at}
	var st unix.Stat_t
	if unix.Fstat(f.fd, &st) == nil {
		e.find(&st, filepath.Join("/proc", strconv.Itoa(os.Getpid()), "fd", strconv.Itoa(f.fd)))
	}
	return e
}

func processName(pid int) string {
	name, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "comm"))
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(name))
}

// lockHolder looks through the descriptors we may see for one on the same
// inode that holds a lock of class (FLOCK, OFDLCK) covering byte at. Open file
// description locks carry no pid, so this is the only way. 0 when not found.
func lockHolder(image *unix.Stat_t, own, class string, at int64) int {
	dirs, err := filepath.Glob("/proc/[0-9]*/fd")
	if err != nil {
		return 0
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, e := range entries {
			name := filepath.Join(dir, e.Name())
			if name == own || !sameInode(name, image) || !holdsLock(dir, e, class, at) {
				continue
			}
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
			if err == nil {
				return pid
			}
		}
	}
	return 0
}

func sameInode(name string, want *unix.Stat_t) bool {
	var st unix.Stat_t
	return unix.Stat(name, &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino
}

// holdsLock reads fdinfo, whose lock lines read
// "lock: 1: OFDLCK  ADVISORY  READ -1 fe:01:2097 100 101".
func holdsLock(fdDir string, e fs.DirEntry, class string, at int64) bool {
	info, err := os.Open(filepath.Join(filepath.Dir(fdDir), "fdinfo", e.Name()))
	if err != nil {
		return false
	}
	defer info.Close()
	for sc := bufio.NewScanner(info); sc.Scan(); {
		w := strings.Fields(sc.Text())
		if len(w) < 9 || w[0] != "lock:" || w[2] != class {
			continue
		}
		if class == "FLOCK" {
			return true
		}
		first, err1 := strconv.ParseInt(w[7], 10, 64)
		last, err2 := strconv.ParseInt(w[8], 10, 64)
		if w[8] == "EOF" {
			last, err2 = 1<<62, nil
		}
		if err1 == nil && err2 == nil && first <= at && at <= last {
			return true
		}
	}
	return false
}
