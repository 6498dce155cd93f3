package delta

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/zeebo/blake3"
)

// VM is a domain's UUID in binary.
type VM [16]byte

// ParseVM reads the canonical lower- or upper-case form of a UUID.
func ParseVM(s string) (VM, error) {
	var v VM
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return v, fmt.Errorf("vm id %q is not a UUID", s)
	}
	if err := unhex(v[:], []byte(strings.ReplaceAll(s, "-", ""))); err != nil {
		return v, fmt.Errorf("vm id %q: %w", s, err)
	}
	return v, nil
}

// String is the canonical lower-case form.
func (v VM) String() string {
	h := hex.EncodeToString(v[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// IsZero reports whether v is unset.
func (v VM) IsZero() bool { return v == VM{} }

// Disk is one disk of the VM as of the cut.
type Disk struct {
	Name string // target device name: [a-z][a-z0-9]{0,15}
	Size int64  // bytes, a positive multiple of 512
}

// Header opens a stream. All disks of the VM are listed; chunks refer to them
// by index.
type Header struct {
	VM         VM
	Generation Generation
	Epoch      uint64 // 0 for a seed stream
	Nonce      uint64 // random per frozen epoch; a resend has the same
	Parent     Pos    // what the delta is relative to; zero = the seed
	Disks      []Disk
	Seed       bool // chunks of a fuzzy initial copy; no manifest follows
}

const (
	flagSeed    = 1 << 0
	posLen      = 16 + 8 + 32
	headerFixed = 16 + 16 + 8 + 8 + posLen + 4 + 2 + 2
	headerDisk  = MaxDiskName + 8
)

// Validate checks every field and the relations between them.
func (h *Header) Validate() error {
	switch {
	case h.VM.IsZero():
		return malformed("header: no vm id")
	case h.Generation.IsZero():
		return malformed("header: no generation")
	case h.Seed && (h.Epoch != 0 || !h.Parent.IsZero()):
		return malformed("header: a seed has neither epoch nor parent")
	case !h.Seed && h.Epoch == 0:
		return malformed("header: epoch 0")
	case !h.Parent.IsZero() && (h.Parent.Generation.IsZero() || h.Parent.Digest == Digest{}):
		return malformed("header: incomplete parent position")
	case h.Parent.Generation == h.Generation && h.Parent.Epoch >= h.Epoch:
		return malformed("header: epoch %d on parent epoch %d", h.Epoch, h.Parent.Epoch)
	}
	return ValidateDisks(h.Disks)
}

// ValidateDisks checks count, names, sizes and uniqueness.
func ValidateDisks(disks []Disk) error {
	if len(disks) == 0 || len(disks) > MaxDisks {
		return malformed("%d disks (1 to %d are possible)", len(disks), MaxDisks)
	}
	seen := make(map[string]bool, len(disks))
	for _, d := range disks {
		if !validDiskName(d.Name) {
			return malformed("disk name %.64q", d.Name)
		}
		if seen[d.Name] {
			return malformed("disk %s is listed twice", d.Name)
		}
		seen[d.Name] = true
		if d.Size <= 0 || d.Size > MaxDiskSize || d.Size%512 != 0 {
			return malformed("disk %s: size %d", d.Name, d.Size)
		}
	}
	return nil
}

func validDiskName(s string) bool {
	if len(s) == 0 || len(s) > MaxDiskName || s[0] < 'a' || s[0] > 'z' {
		return false
	}
	for i := range len(s) {
		if (s[i] < 'a' || s[i] > 'z') && (s[i] < '0' || s[i] > '9') {
			return false
		}
	}
	return true
}

// AppendPos appends the 56-byte binary form of p.
func AppendPos(b []byte, p Pos) []byte {
	b = append(b, p.Generation[:]...)
	b = binary.LittleEndian.AppendUint64(b, p.Epoch)
	return append(b, p.Digest[:]...)
}

// PosLen is the length of the binary form of a position.
const PosLen = posLen

// ParsePos reads the first 56 bytes of b, which must have them.
func ParsePos(b []byte) Pos {
	var p Pos
	copy(p.Generation[:], b)
	p.Epoch = binary.LittleEndian.Uint64(b[16:])
	copy(p.Digest[:], b[24:posLen])
	return p
}

// body is the encoded header without frame start and CRC.
func (h *Header) body(b []byte) []byte {
	b = append(b, h.VM[:]...)
	b = append(b, h.Generation[:]...)
	b = binary.LittleEndian.AppendUint64(b, h.Epoch)
	b = binary.LittleEndian.AppendUint64(b, h.Nonce)
	b = AppendPos(b, h.Parent)
	var flags uint32
	if h.Seed {
		flags |= flagSeed
	}
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(h.Disks)))
	b = append(b, 0, 0)
	for _, d := range h.Disks {
		var name [MaxDiskName]byte
		copy(name[:], d.Name)
		b = append(b, name[:]...)
		b = binary.LittleEndian.AppendUint64(b, uint64(d.Size))
	}
	return b
}

// AppendFrame appends the header frame to nothing else than an empty b.
// Invalid headers are refused.
func (h *Header) AppendFrame(b []byte) ([]byte, error) {
	if err := h.Validate(); err != nil {
		return nil, err
	}
	return append(b, endFrame(h.body(startFrame(nil, FrameHeader, 0)))...), nil
}

// Digest is the BLAKE3-256 of the encoded header; the manifest repeats it.
func (h *Header) Digest() Digest {
	x := blake3.NewDeriveKey("kvmreplica delta v1 header")
	_, _ = x.Write(h.body(nil)) // a hash never fails
	var d Digest
	x.Sum(d[:0])
	return d
}

// ParseHeader reads and validates a whole header frame.
func ParseHeader(frame []byte) (Header, error) {
	var h Header
	b, _, err := openFrame(frame, FrameHeader)
	if err != nil {
		return h, err
	}
	if len(b) < headerFixed {
		return h, malformed("header of %d bytes", len(b))
	}
	copy(h.VM[:], b)
	copy(h.Generation[:], b[16:])
	h.Epoch = binary.LittleEndian.Uint64(b[32:])
	h.Nonce = binary.LittleEndian.Uint64(b[40:])
	h.Parent = ParsePos(b[48:])
	flags := binary.LittleEndian.Uint32(b[104:])
	n := int(binary.LittleEndian.Uint16(b[108:]))
	if flags&^flagSeed != 0 || b[110] != 0 || b[111] != 0 {
		return h, malformed("header: unknown flags %#x", flags)
	}
	h.Seed = flags&flagSeed != 0
	if n > MaxDisks || len(b) != headerFixed+n*headerDisk {
		return h, malformed("header of %d bytes for %d disks", len(b), n)
	}
	for i := range n {
		d := b[headerFixed+i*headerDisk:]
		name := strings.TrimRight(string(d[:MaxDiskName]), "\x00")
		h.Disks = append(h.Disks, Disk{Name: name, Size: int64(binary.LittleEndian.Uint64(d[MaxDiskName:]))})
	}
	return h, h.Validate()
}
