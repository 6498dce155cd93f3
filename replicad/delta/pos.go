package delta

import (
	"encoding/hex"
	"fmt"
)

// Generation names one unbroken run of a VM as primary: 128 random bits, made
// when a side is promoted. The zero value means "none".
type Generation [16]byte

// String is the lower-case hexadecimal form.
func (g Generation) String() string { return hex.EncodeToString(g[:]) }

// IsZero reports whether g is "none".
func (g Generation) IsZero() bool { return g == Generation{} }

// MarshalText is the hexadecimal form, so that state files are readable.
func (g Generation) MarshalText() ([]byte, error) { return []byte(g.String()), nil }

// UnmarshalText reads the form MarshalText writes; anything else is an error.
func (g *Generation) UnmarshalText(b []byte) error { return unhex(g[:], b) }

// Digest is the BLAKE3-256 manifest digest of an epoch; it covers the parent's
// digest, so one value names a whole history.
type Digest [32]byte

// String is the lower-case hexadecimal form.
func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether d is "none".
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText is the hexadecimal form.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads the form MarshalText writes; anything else is an error.
func (d *Digest) UnmarshalText(b []byte) error { return unhex(d[:], b) }

// Pos is a place in a VM's history: the content of all its disks after Epoch
// of Generation was committed. (Generation, Epoch) is never reused for other
// bytes; Digest proves it.
type Pos struct {
	Generation Generation `json:"generation"`
	Epoch      uint64     `json:"epoch"`
	Digest     Digest     `json:"digest"`
}

// IsZero reports whether p is "nothing committed yet".
func (p Pos) IsZero() bool { return p == Pos{} }

// String is short: the first 8 digits of the generation, the epoch, the first
// 8 digits of the digest.
func (p Pos) String() string {
	return fmt.Sprintf("%s/%d/%s", p.Generation.String()[:8], p.Epoch, p.Digest.String()[:8])
}

// PosMismatchError is a receiver's refusal: the delta starts at Want, the
// receiver stands at Have. Nothing was changed.
type PosMismatchError struct {
	Have, Want Pos
}

func (e *PosMismatchError) Error() string {
	return fmt.Sprintf("delta starts at %v but the replica stands at %v", e.Want, e.Have)
}

func unhex(dst, src []byte) error {
	if hex.DecodedLen(len(src)) != len(dst) || len(src)%2 != 0 {
		return fmt.Errorf("want %d hexadecimal digits, have %d", 2*len(dst), len(src))
	}
	_, err := hex.Decode(dst, src)
	return err
}
