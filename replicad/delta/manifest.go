package delta

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/zeebo/blake3"
)

// BlobKind says which firmware state a blob is.
type BlobKind uint8

// The kinds of firmware state.
const (
	BlobNVRAM BlobKind = 1
	BlobTPM   BlobKind = 2
)

func (k BlobKind) String() string {
	switch k {
	case BlobNVRAM:
		return "nvram"
	case BlobTPM:
		return "tpm"
	}
	return fmt.Sprintf("blob kind %d", uint8(k))
}

// limit is the cap of a kind, 0 for unknown kinds.
func (k BlobKind) limit() int {
	switch k {
	case BlobNVRAM:
		return MaxNVRAM
	case BlobTPM:
		return MaxTPM
	}
	return 0
}

// Blob is opaque firmware state; it travels only when it changed.
type Blob struct {
	Kind BlobKind
	Data []byte
}

// Digest is the BLAKE3-256 of the blob's content.
func (b Blob) Digest() Digest { return blake3.Sum256(b.Data) }

// Manifest ends an epoch. It binds the header, all chunks and the firmware
// state to one position; in the spool it is the commit record.
type Manifest struct {
	VM         VM
	Generation Generation
	Epoch      uint64
	Nonce      uint64
	Parent     Pos
	Header     Digest // Header.Digest
	Chunks     uint32
	App        bool   // cut while the guest's file systems were frozen
	Covered    uint64 // bytes the chunks cover
	Total      Digest // over the chunks' digests, in order
	Config     Digest // of the VM's description; zero = none
	Cut        time.Time
	Sizes      []int64 // of the disks, in the header's order
	Firmware   []Blob
}

const (
	manifestFixed = 16 + 16 + 8 + 8 + posLen + 32 + 4 + 4 + 8 + 32 + 32 + 8 + 2 + 2 + 4
	manifestBlob  = 1 + 3 + 4 + 32

	flagApp = 1 << 0 // of a manifest
)

// Pos is the position this manifest commits: its digest covers everything but
// the firmware's bytes, which it covers by their digests.
func (m *Manifest) Pos() Pos {
	x := blake3.NewDeriveKey("kvmreplica delta v1 manifest")
	_, _ = x.Write(m.plain(nil)) // a hash never fails
	p := Pos{Generation: m.Generation, Epoch: m.Epoch}
	x.Sum(p.Digest[:0])
	return p
}

// plain is the encoded manifest without the firmware's bytes.
func (m *Manifest) plain(b []byte) []byte {
	b = append(b, m.VM[:]...)
	b = append(b, m.Generation[:]...)
	b = binary.LittleEndian.AppendUint64(b, m.Epoch)
	b = binary.LittleEndian.AppendUint64(b, m.Nonce)
	b = AppendPos(b, m.Parent)
	b = append(b, m.Header[:]...)
	b = binary.LittleEndian.AppendUint32(b, m.Chunks)
	var flags uint32
	if m.App {
		flags |= flagApp
	}
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = binary.LittleEndian.AppendUint64(b, m.Covered)
	b = append(b, m.Total[:]...)
	b = append(b, m.Config[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.Cut.UnixNano()))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(m.Sizes)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(m.Firmware)))
	b = append(b, 0, 0, 0, 0)
	for _, s := range m.Sizes {
		b = binary.LittleEndian.AppendUint64(b, uint64(s))
	}
	for _, f := range m.Firmware {
		d := f.Digest()
		b = append(b, byte(f.Kind), 0, 0, 0)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(f.Data)))
		b = append(b, d[:]...)
	}
	return b
}

// Validate checks every field and the relations between them.
func (m *Manifest) Validate() error {
	if m.VM.IsZero() || m.Generation.IsZero() || m.Epoch == 0 {
		return malformed("manifest without vm, generation or epoch")
	}
	if len(m.Sizes) == 0 || len(m.Sizes) > MaxDisks {
		return malformed("manifest for %d disks", len(m.Sizes))
	}
	for _, s := range m.Sizes {
		if s <= 0 || s > MaxDiskSize || s%512 != 0 {
			return malformed("manifest: disk of %d bytes", s)
		}
	}
	seen := BlobKind(0)
	for _, f := range m.Firmware {
		if f.Kind.limit() == 0 || f.Kind <= seen {
			return malformed("manifest: %v out of order", f.Kind)
		}
		seen = f.Kind
		if len(f.Data) > f.Kind.limit() {
			return malformed("manifest: %v of %d bytes (at most %d)", f.Kind, len(f.Data), f.Kind.limit())
		}
	}
	return nil
}

// Matches reports an error unless the manifest belongs to the stream h opened.
func (m *Manifest) Matches(h *Header) error {
	if m.VM != h.VM || m.Generation != h.Generation || m.Epoch != h.Epoch || m.Nonce != h.Nonce ||
		m.Parent != h.Parent || m.Header != h.Digest() || len(m.Sizes) != len(h.Disks) {
		return malformed("manifest of another epoch than the header's")
	}
	for i, d := range h.Disks {
		if m.Sizes[i] != d.Size {
			return malformed("manifest: disk %s has %d bytes, the header says %d", d.Name, m.Sizes[i], d.Size)
		}
	}
	return nil
}

// AppendFrame appends the manifest frame to b. An invalid manifest is refused.
func (m *Manifest) AppendFrame(b []byte) ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	f := m.plain(startFrame(nil, FrameManifest, 0))
	for _, blob := range m.Firmware {
		f = append(f, blob.Data...)
	}
	return append(b, endFrame(f)...), nil
}

// ParseManifest reads and validates a whole manifest frame. Blobs share the
// frame's memory.
func ParseManifest(frame []byte) (Manifest, error) {
	var m Manifest
	b, _, err := openFrame(frame, FrameManifest)
	if err != nil {
		return m, err
	}
	if len(b) < manifestFixed {
		return m, malformed("manifest of %d bytes", len(b))
	}
	copy(m.VM[:], b)
	copy(m.Generation[:], b[16:])
	m.Epoch = binary.LittleEndian.Uint64(b[32:])
	m.Nonce = binary.LittleEndian.Uint64(b[40:])
	m.Parent = ParsePos(b[48:])
	copy(m.Header[:], b[104:])
	m.Chunks = binary.LittleEndian.Uint32(b[136:])
	m.Covered = binary.LittleEndian.Uint64(b[144:])
	copy(m.Total[:], b[152:])
	copy(m.Config[:], b[184:])
	m.Cut = time.Unix(0, int64(binary.LittleEndian.Uint64(b[216:]))).UTC()
	disks := int(binary.LittleEndian.Uint16(b[224:]))
	blobs := int(binary.LittleEndian.Uint16(b[226:]))
	flags := binary.LittleEndian.Uint32(b[140:])
	if flags&^flagApp|binary.LittleEndian.Uint32(b[228:]) != 0 {
		return m, malformed("manifest: unknown flags %#x or reserved bytes", flags)
	}
	m.App = flags&flagApp != 0
	rest := b[manifestFixed:]
	if disks > MaxDisks || blobs > 2 || len(rest) < disks*8+blobs*manifestBlob {
		return m, malformed("manifest of %d bytes for %d disks and %d blobs", len(b), disks, blobs)
	}
	for ; disks > 0; disks-- {
		m.Sizes = append(m.Sizes, int64(binary.LittleEndian.Uint64(rest)))
		rest = rest[8:]
	}
	if err := m.parseBlobs(rest, blobs); err != nil {
		return m, err
	}
	return m, m.Validate()
}

func (m *Manifest) parseBlobs(rest []byte, n int) error {
	table, data := rest[:n*manifestBlob], rest[n*manifestBlob:]
	for ; len(table) > 0; table = table[manifestBlob:] {
		size := int64(binary.LittleEndian.Uint32(table[4:]))
		if table[1]|table[2]|table[3] != 0 || size > int64(len(data)) {
			return malformed("manifest: blob of %d bytes", size)
		}
		blob := Blob{Kind: BlobKind(table[0]), Data: data[:size:size]}
		data = data[size:]
		if d := blob.Digest(); string(d[:]) != string(table[8:manifestBlob]) {
			return fmt.Errorf("manifest: %v: %w", blob.Kind, ErrChecksum)
		}
		m.Firmware = append(m.Firmware, blob)
	}
	if len(data) != 0 {
		return malformed("manifest: %d bytes after the blobs", len(data))
	}
	return nil
}
