package media

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/delta"
)

// Disk is one disk on a medium.
type Disk struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
}

// Medium is what medium.json says.
type Medium struct {
	Version int       `json:"version"`
	ID      string    `json:"id"` // random, repeated in every piece
	VM      string    `json:"vm"` // UUID
	Name    string    `json:"name"`
	Disks   []Disk    `json:"disks"`
	Piece   int64     `json:"piece"` // bytes of a disk per file
	Begun   time.Time `json:"begun"`
	// Complete is missing while the export is not done.
	Complete time.Time `json:"complete,omitzero"`
	// Recipient is the age key the pieces are encrypted for; empty = they are
	// not. Identity is its other half, encrypted with a passphrase; empty = it
	// is somewhere else.
	Recipient string `json:"recipient,omitempty"`
	Identity  []byte `json:"identity,omitempty"`
}

// Key opens or closes a medium. The zero value is for one that is not encrypted.
type Key struct {
	Recipient  string // export: an age recipient (age1…)
	Identity   string // import: an age identity file's content
	Passphrase string // both
}

const (
	mediumFile   = "medium.json"
	maxMedium    = 1 << 20
	version      = 1
	pieceSize    = 256 << 20
	pieceSuffix  = ".krs"
	maxPieces    = 1 << 20
	scryptFactor = 18 // a second of one processor
)

// Errors to test for with errors.Is.
var (
	// ErrForeign: the medium holds something else than what was asked for.
	ErrForeign = errors.New("the medium holds something else")
	// ErrIncomplete: the export did not come to its end.
	ErrIncomplete = errors.New("the export was not completed")
	// ErrDamaged: the medium is not what was written.
	ErrDamaged = errors.New("the medium is damaged")
	// ErrKey: the medium needs another key.
	ErrKey = errors.New("the key does not fit")
	// ErrExists: an image would have been overwritten, or an export is complete
	// already.
	ErrExists = errors.New("it exists")
)

// Load reads a medium's description; absence is fs.ErrNotExist.
func Load(f fsx.FS) (Medium, error) {
	var m Medium
	err := fsx.ReadJSON(f, mediumFile, maxMedium, &m)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return m, err
	case err != nil:
		return m, fmt.Errorf("%w: %w", ErrDamaged, err)
	case m.Version != version:
		return m, fmt.Errorf("%w: %s has version %d, this build knows %d", ErrForeign, mediumFile, m.Version, version)
	}
	if _, err := m.header(); err != nil {
		return m, fmt.Errorf("%w: %s: %w", ErrDamaged, mediumFile, err)
	}
	if m.Piece <= 0 || m.Piece%delta.Granule != 0 {
		return m, fmt.Errorf("%w: %s: pieces of %d bytes", ErrDamaged, mediumFile, m.Piece)
	}
	for _, d := range m.Disks {
		if d.Size/m.Piece >= maxPieces {
			return m, fmt.Errorf("%w: %s: disk %s of %d bytes", ErrDamaged, mediumFile, d.Name, d.Size)
		}
	}
	return m, nil
}

// header opens every piece of the medium.
func (m *Medium) header() (delta.Header, error) {
	h := delta.Header{Seed: true}
	id, err := hex.DecodeString(m.ID)
	if err != nil || len(id) != len(h.Generation) {
		return h, fmt.Errorf("%q is no id", m.ID)
	}
	copy(h.Generation[:], id)
	if h.VM, err = delta.ParseVM(m.VM); err != nil {
		return h, err
	}
	for _, d := range m.Disks {
		h.Disks = append(h.Disks, delta.Disk{Name: d.Name, Size: d.Size})
	}
	return h, h.Validate()
}

// Bytes are those of all disks.
func (m *Medium) Bytes() (n int64) {
	for _, d := range m.Disks {
		n += d.Size
	}
	return n
}

func (m *Medium) pieces(d Disk) int64 { return (d.Size + m.Piece - 1) / m.Piece }

func pieceName(disk string, i int64) string { return fmt.Sprintf("%s-%06d%s", disk, i, pieceSuffix) }

func newID() (string, error) {
	var b [16]byte
	if _, err := io.ReadFull(rand.Reader, b[:]); err != nil {
		return "", err
	}
	return hex.EncodeToString(b[:]), nil
}

// same refuses to go on with an export of something else.
func (m *Medium) same(s Source) error {
	switch {
	case m.VM != s.VM:
		return fmt.Errorf("%w: an export of %s (%s)", ErrForeign, m.Name, m.VM)
	case !slices.Equal(m.Disks, s.disks()):
		return fmt.Errorf("%w: an export of %s with other disks or sizes", ErrForeign, m.Name)
	case !m.Complete.IsZero():
		return fmt.Errorf("%w: a complete export of %s, made %s", ErrExists, m.Name, m.Complete.Format(time.DateTime))
	}
	return nil
}

// protect decides how the pieces of a new medium are encrypted.
func (m *Medium) protect(k Key) error {
	switch {
	case k.Recipient != "" && k.Passphrase != "":
		return fmt.Errorf("%w: a recipient or a passphrase, not both", ErrKey)
	case k.Recipient != "":
		if _, err := age.ParseX25519Recipient(strings.TrimSpace(k.Recipient)); err != nil {
			return fmt.Errorf("%w: %w", ErrKey, err)
		}
		m.Recipient = strings.TrimSpace(k.Recipient)
	case k.Passphrase != "":
		id, err := age.GenerateX25519Identity()
		if err != nil {
			return err
		}
		r, err := age.NewScryptRecipient(k.Passphrase)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrKey, err)
		}
		r.SetWorkFactor(scryptFactor)
		var b bytes.Buffer
		w, err := age.Encrypt(&b, r)
		if err == nil {
			_, err = io.WriteString(w, id.String())
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			return err
		}
		m.Recipient, m.Identity = id.Recipient().String(), b.Bytes()
	}
	return nil
}

// fits checks the key with which an export is gone on with.
func (m *Medium) fits(k Key) error {
	switch {
	case k.Passphrase != "" && len(m.Identity) > 0:
		_, err := m.unlock(k)
		return err
	case k.Passphrase != "" || strings.TrimSpace(k.Recipient) != m.Recipient || len(m.Identity) > 0:
		return fmt.Errorf("%w: the export was begun with another one", ErrKey)
	}
	return nil
}

// unlock returns what decrypts the pieces, nil when they are not encrypted.
func (m *Medium) unlock(k Key) ([]age.Identity, error) {
	switch {
	case m.Recipient == "" && (k.Identity != "" || k.Passphrase != ""):
		return nil, fmt.Errorf("%w: the medium is not encrypted", ErrKey)
	case m.Recipient == "":
		return nil, nil
	case k.Identity != "":
		ids, err := age.ParseIdentities(strings.NewReader(k.Identity))
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrKey, err)
		}
		return ids, nil
	case k.Passphrase == "":
		return nil, fmt.Errorf("%w: the medium is encrypted", ErrKey)
	case len(m.Identity) == 0:
		return nil, fmt.Errorf("%w: the medium was encrypted for %s, not with a passphrase", ErrKey, m.Recipient)
	}
	s, err := age.NewScryptIdentity(k.Passphrase)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	r, err := age.Decrypt(bytes.NewReader(m.Identity), s)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	b, err := io.ReadAll(io.LimitReader(r, 4096))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	id, err := age.ParseX25519Identity(string(b))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return []age.Identity{id}, nil
}
