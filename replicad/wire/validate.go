package wire

import (
	"fmt"
	"time"
	"unicode"
	"unicode/utf8"
)

// Bounds of what a request may carry. Transports refuse the rest before they
// call a Service.
const (
	MaxName     = 255
	MaxText     = 1024
	MaxSpec     = 256 << 10
	MaxDiskSize = 1 << 46 // 64 TiB
	MaxPoints   = 2000
	MaxRangeLen = 1 << 20
	MaxInterval = 7 * 24 * time.Hour
)

// Valid reports whether v is a UUID in lower-case canonical form.
func (v VMID) Valid() bool { return isUUID(string(v)) }

// Valid reports whether h is a UUID in lower-case canonical form.
func (h HostID) Valid() bool { return isUUID(string(h)) }

// Valid reports whether d is [a-z][a-z0-9]{0,15}.
func (d DiskName) Valid() bool {
	if len(d) < 1 || len(d) > 16 || d[0] < 'a' || d[0] > 'z' {
		return false
	}
	for i := 1; i < len(d); i++ {
		if (d[i] < 'a' || d[i] > 'z') && (d[i] < '0' || d[i] > '9') {
			return false
		}
	}
	return true
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch i {
		case 8, 13, 18, 23:
			if c != '-' {
				return false
			}
		default:
			if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
				return false
			}
		}
	}
	return true
}

// ValidText reports whether s is at most limit bytes of printable UTF-8: no control
// characters, no characters that reorder or hide text.
func ValidText(s string, limit int) bool {
	if len(s) > limit || !utf8.ValidString(s) {
		return false
	}
	for _, c := range s {
		if !unicode.IsPrint(c) {
			return false
		}
	}
	return true
}

// CleanText makes s safe for a terminal, a log and a page: invalid bytes and
// characters that are not printable become '?', and it is cut at limit bytes.
func CleanText(s string, limit int) string {
	out := make([]byte, 0, min(len(s), limit))
	for _, c := range s {
		if c == utf8.RuneError || !unicode.IsPrint(c) {
			c = '?'
		}
		if len(out)+utf8.RuneLen(c) > limit {
			break
		}
		out = utf8.AppendRune(out, c)
	}
	return string(out)
}

func invalid(format string, args ...any) error {
	return &Error{Kind: KindInvalid, Text: fmt.Sprintf(format, args...)}
}

func (v VMID) check() error {
	if !v.Valid() {
		return invalid("VM id %.48q is not a lower-case UUID", string(v))
	}
	return nil
}

func checkText(what, s string, limit int) error {
	if !ValidText(s, limit) {
		return invalid("%s is longer than %d bytes or not printable text", what, limit)
	}
	return nil
}

func checkDisks(disks []Disk) error {
	if len(disks) > MaxDisks {
		return invalid("%d disks, at most %d", len(disks), MaxDisks)
	}
	seen := make(map[DiskName]bool, len(disks))
	for _, d := range disks {
		switch {
		case !d.Name.Valid():
			return invalid("disk name %.32q is not of the form vda", string(d.Name))
		case seen[d.Name]:
			return invalid("disk %s is named twice", d.Name)
		case d.Size <= 0 || d.Size > MaxDiskSize || d.Size%512 != 0:
			return invalid("disk %s: size %d is not a multiple of 512 between 512 and %d", d.Name, d.Size, int64(MaxDiskSize))
		case d.Format != "raw":
			return invalid("disk %s: format %.16q, only raw travels", d.Name, d.Format)
		}
		seen[d.Name] = true
	}
	return nil
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// Validate refuses what no honest peer sends.
func (r HelloRequest) Validate() error {
	if r.Min < 0 || r.Max < r.Min {
		return invalid("protocol versions %d to %d", r.Min, r.Max)
	}
	return firstError(checkText("host id", string(r.Host), MaxName), checkText("host name", r.Name, MaxName), checkText("version", r.Version, MaxName))
}

// Validate refuses what no honest peer sends.
func (r CheckRequest) Validate() error {
	if r.VM != "" {
		if err := r.VM.check(); err != nil {
			return err
		}
	}
	if len(r.Spec) > MaxSpec || r.Need < 0 {
		return invalid("check: description of %d bytes, need of %d bytes", len(r.Spec), r.Need)
	}
	return checkText("check", r.For, 32)
}

// Validate refuses what no honest peer sends. Quotas are the receiver's.
func (r Offer) Validate() error {
	if err := firstError(r.VM.check(), checkText("VM name", r.Name, MaxName), checkText("request id", r.Request, MaxName), checkText("retention", r.Retention, MaxName), checkDisks(r.Disks)); err != nil {
		return err
	}
	switch {
	case r.Name == "":
		return invalid("the VM has no name")
	case len(r.Disks) == 0:
		return invalid("the VM has no disks")
	case len(r.Spec) > MaxSpec:
		return invalid("description of %d bytes, at most %d", len(r.Spec), MaxSpec)
	case r.Interval < 0 || r.Interval > MaxInterval:
		return invalid("interval %v", r.Interval)
	case r.OnSilent != "" && r.OnSilent != "hold":
		return invalid("on-silent-peer %.32q", r.OnSilent)
	case r.Shutdown < 0 || r.Shutdown > MaxInterval:
		return invalid("shutdown time %v", r.Shutdown)
	case r.AppEvery < 0 || r.AppEvery > MaxInterval:
		return invalid("interval of application-consistent points %v", r.AppEvery)
	case r.Points < 0 || r.Points > MaxPoints:
		return invalid("%d recovery points, at most %d", r.Points, MaxPoints)
	case r.Generation.IsZero():
		return invalid("the offer names no generation")
	}
	return nil
}

// Validate refuses what no honest peer sends.
func (r Withdraw) Validate() error {
	return firstError(r.VM.check(), checkText("request id", r.Request, MaxName))
}

// Validate refuses what no honest peer sends.
func (r HandshakeRequest) Validate() error {
	if err := firstError(r.VM.check(), checkDisks(r.Disks)); err != nil {
		return err
	}
	if len(r.Ancestors) > MaxAncestors || len(r.Known) > MaxKnown {
		return invalid("%d ancestors (at most %d), %d known positions (at most %d)", len(r.Ancestors), MaxAncestors, len(r.Known), MaxKnown)
	}
	return nil
}

// Validate refuses what no honest peer answers.
func (r HandshakeReply) Validate() error {
	if len(r.Ancestors) > MaxAncestors || len(r.Seeding) > MaxDisks || len(r.Disks) > MaxDisks || len(r.Sizes) > MaxDisks {
		return invalid("%d ancestors, %d cursors, %d disks, %d sizes", len(r.Ancestors), len(r.Seeding), len(r.Disks), len(r.Sizes))
	}
	for n, size := range r.Sizes {
		if !n.Valid() || size < 0 || size > MaxDiskSize || size%512 != 0 {
			return invalid("size %d of disk %.32q", size, string(n))
		}
	}
	for n, c := range r.Seeding {
		if !n.Valid() || c < 0 || c > MaxDiskSize {
			return invalid("seed cursor %d of disk %.32q", c, string(n))
		}
	}
	for _, n := range r.Disks {
		if !n.Valid() {
			return invalid("disk name %.32q", string(n))
		}
	}
	return firstError(checkText("role", r.Role, 32), checkText("reason", r.VerifyAll, MaxText))
}

// Validate refuses what no honest peer sends.
func (r SeedRequest) Validate() error {
	switch {
	case !r.Disk.Valid():
		return invalid("disk name %.32q is not of the form vda", string(r.Disk))
	case r.Offset < 0 || r.Offset > MaxDiskSize:
		return invalid("seed offset %d", r.Offset)
	case r.Generation.IsZero():
		return invalid("the seed names no generation")
	}
	return r.VM.check()
}

// Validate refuses what no honest peer sends.
func (k EpochKey) Validate() error {
	if k.Generation.IsZero() || k.Epoch == 0 {
		return invalid("epoch %d of generation %.8s", k.Epoch, k.Generation)
	}
	return k.VM.check()
}

// Validate refuses what no honest peer sends.
func (r Beat) Validate() error {
	if r.Pending < 0 || r.Interval < 0 || r.Interval > MaxInterval {
		return invalid("beat with %d pending bytes, interval %v", r.Pending, r.Interval)
	}
	return r.VM.check()
}

// Validate refuses what no honest peer sends.
func (r DigestRequest) Validate() error {
	if len(r.Ranges) > MaxDigestRanges || !r.Disk.Valid() {
		return invalid("digests of %d ranges (at most %d) of disk %.32q", len(r.Ranges), MaxDigestRanges, string(r.Disk))
	}
	for _, g := range r.Ranges {
		if g.Off < 0 || g.Len <= 0 || g.Len > MaxRangeLen || g.Off > MaxDiskSize-g.Len {
			return invalid("digest of %d bytes at %d", g.Len, g.Off)
		}
	}
	return r.VM.check()
}

// checkReleased bounds ranges by disk.
func checkReleased(by map[DiskName][]Range) error {
	n := 0
	for disk, rs := range by {
		if n += len(rs); n > MaxReleased || len(by) > MaxDisks || !disk.Valid() {
			return invalid("%d ranges of disk %.32q and others, at most %d", len(rs), string(disk), MaxReleased)
		}
		for _, g := range rs {
			if g.Off < 0 || g.Len <= 0 || g.Off > MaxDiskSize-g.Len {
				return invalid("%d bytes at %d", g.Len, g.Off)
			}
		}
	}
	return nil
}

// checkSizes bounds sizes by disk.
func checkSizes(by map[DiskName]int64) error {
	for disk, n := range by {
		if len(by) > MaxDisks || !disk.Valid() || n <= 0 || n > MaxDiskSize || n%512 != 0 {
			return invalid("disk %.32q of %d bytes", string(disk), n)
		}
	}
	return nil
}

// Validate refuses what no honest peer answers. How many ranges there may be is
// bounded by the size of an answer.
func (r FailoverReply) Validate() error {
	for disk, rs := range r.Dirty {
		for _, g := range rs {
			if g.Off < 0 || g.Len <= 0 || g.Off > MaxDiskSize-g.Len {
				return invalid("%d bytes at %d of disk %.32q", g.Len, g.Off, string(disk))
			}
		}
	}
	for disk, n := range r.Sizes {
		if n < 0 || n > MaxDiskSize {
			return invalid("disk %.32q of %d bytes", string(disk), n)
		}
	}
	return nil
}

// Validate refuses what no honest peer sends.
func (r FailoverRequest) Validate() error {
	if err := firstError(checkReleased(r.Also), checkSizes(r.Sizes)); err != nil {
		return err
	}
	if r.Timeout < 0 || r.Timeout > MaxInterval {
		return invalid("the guest may take %v to shut down", r.Timeout)
	}
	return firstError(r.VM.check(), checkText("step", r.Step, 32),
		checkText("request id", r.Request, MaxName), checkText("reason", r.Reason, MaxText))
}
