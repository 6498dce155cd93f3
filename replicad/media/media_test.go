package media_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"

	"kvmreplica/internal/block"
	"kvmreplica/internal/block/blocktest"
	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/media"
)

const (
	mib   = 1 << 20
	piece = 8 << 10
	vm    = "5eed0000-0000-4000-8000-000000000001"
)

// memory is a disk of bytes.
type memory struct {
	block.Device
	b []byte
}

func (m memory) ReadAt(p []byte, off int64) (int, error) { return copy(p, m.b[off:]), nil }
func (m memory) Size() int64                             { return int64(len(m.b)) }

// content is random data with holes.
func content(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for off := 0; off < n; off += 8 << 10 {
		if off == 0 || r.IntN(3) > 0 {
			for i := off; i < min(off+1000, n); i++ {
				b[i] = byte(r.Uint32())
			}
		}
	}
	return b
}

func source() media.Source {
	return media.Source{VM: vm, Name: "carried", Disks: []media.SourceDisk{
		{Name: "vda", Device: memory{b: content(1, piece+4096)}}, {Name: "vdb", Device: memory{b: content(2, 512)}},
	}}
}

func options(k media.Key) media.Options {
	return media.Options{Key: k, Piece: piece, Now: func() time.Time { return time.Unix(1e9, 0) }}
}

// same compares the images with what was exported.
func same(to fsx.FS, s media.Source) error {
	for _, d := range s.Disks {
		got, err := fsx.ReadFile(to, d.Name+".raw", 64*mib)
		if err != nil {
			return err
		}
		if want := d.Device.(memory).b; !bytes.Equal(got, want) {
			return fmt.Errorf("image %s is not what was exported (%d bytes, %d wanted)", d.Name, len(got), len(want))
		}
	}
	return nil
}

func TestWhatIsExportedIsImportedWithEveryKindOfKey(t *testing.T) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ lock, open, wrong media.Key }{
		"none":       {wrong: media.Key{Passphrase: "x"}},
		"recipient":  {media.Key{Recipient: id.Recipient().String()}, media.Key{Identity: id.String()}, media.Key{Identity: other.String()}},
		"passphrase": {media.Key{Passphrase: "correct horse"}, media.Key{Passphrase: "correct horse"}, media.Key{Passphrase: "incorrect"}},
	} {
		t.Run(name, func(t *testing.T) {
			medium, to := fsxtest.NewMem(), fsxtest.NewMem()
			s := source()
			if _, err := media.Export(t.Context(), medium, s, options(c.lock)); err != nil {
				t.Fatal(err)
			}
			secret := s.Disks[0].Device.(memory).b[:64]
			names, _ := medium.List(".")
			for _, n := range names {
				b, err := fsx.ReadFile(medium, n, 64*mib)
				if err != nil {
					t.Fatal(err)
				}
				if name != "none" && bytes.Contains(b, secret) {
					t.Errorf("%s shows what it holds", n)
				}
			}
			if _, err := media.Import(t.Context(), medium, to, c.wrong, nil); !errors.Is(err, media.ErrKey) {
				t.Errorf("with a wrong key: %v", err)
			}
			if name != "none" {
				if _, err := media.Import(t.Context(), medium, to, media.Key{}, nil); !errors.Is(err, media.ErrKey) {
					t.Errorf("without a key: %v", err)
				}
			}
			// What an import of something else has left must not show through.
			if err := fsx.WriteAtomic(to, "vda.raw.part", bytes.Repeat([]byte{0xEE}, 3*piece)); err != nil {
				t.Fatal(err)
			}
			if _, err := media.Import(t.Context(), medium, to, c.open, nil); err != nil {
				t.Fatal(err)
			}
			if err := same(to, s); err != nil {
				t.Error(err)
			}
			if _, err := media.Import(t.Context(), medium, to, c.open, nil); !errors.Is(err, media.ErrExists) {
				t.Errorf("over images that are there: %v", err)
			}
		})
	}
}

// An export or import that is cut short at any call, by a crash or an error,
// goes on; the result is the same.
func TestExportAndImportGoOnAfterACrashAnywhere(t *testing.T) {
	s := source()
	work := func(fs fsx.FS) error {
		from, to := fsx.Sub(fs, "medium"), fsx.Sub(fs, "images")
		for _, d := range []string{"medium", "images"} {
			if err := fs.MkdirAll(d); err != nil {
				return err
			}
		}
		_, err := media.Export(context.Background(), from, s, options(media.Key{}))
		if err != nil && !errors.Is(err, media.ErrExists) {
			return err
		}
		_, err = media.Import(context.Background(), from, to, media.Key{}, nil)
		if errors.Is(err, media.ErrExists) {
			return nil
		}
		return err
	}
	again := func(h *blocktest.Host) error {
		if err := work(h.FS); err != nil {
			return fmt.Errorf("does not go on: %w", err)
		}
		return same(fsx.Sub(h.FS, "images"), s)
	}
	scenario := func(h *blocktest.Host) error { return work(h.FS) }
	t.Log(blocktest.SweepWith(t, blocktest.Options{MaxAll: 2, Random: 2}, scenario, again))
	t.Log(blocktest.FailSweepWith(t, blocktest.Options{Errnos: []syscall.Errno{syscall.ENOSPC}}, scenario, again))
}

// Whatever byte of the medium is changed, and whatever file is cut off, missing
// or of another export: it is refused, or the images are right.
func TestADamagedMediumIsRefused(t *testing.T) {
	s := source()
	fresh := func() *fsxtest.Mem {
		m := fsxtest.NewMem()
		if _, err := media.Export(t.Context(), m, s, options(media.Key{})); err != nil {
			t.Fatal(err)
		}
		return m
	}
	names, err := fresh().List(".")
	if err != nil || len(names) != 4 {
		t.Fatalf("%v %v", names, err)
	}
	for _, n := range names {
		whole, err := fsx.ReadFile(fresh(), n, 64*mib)
		if err != nil {
			t.Fatal(err)
		}
		step := max(1, len(whole)/120)
		for at := 0; at < len(whole); at += step {
			b, what := bytes.Clone(whole), fmt.Sprintf("byte %d", at)
			if b[at] ^= 0x41; at/step%4 == 3 {
				b, what = whole[:at], fmt.Sprintf("cut to %d bytes", at)
			}
			m, to := fresh(), fsxtest.NewMem()
			if err := fsx.WriteAtomic(m, n, b); err != nil {
				t.Fatal(err)
			}
			_, err := media.Import(t.Context(), m, to, media.Key{}, nil)
			switch {
			case err == nil:
				if err := same(to, s); err != nil {
					t.Errorf("%s, %s: taken, and %v", n, what, err)
				}
			case !errors.Is(err, media.ErrDamaged) && !errors.Is(err, media.ErrIncomplete) && !errors.Is(err, media.ErrForeign) && !errors.Is(err, media.ErrKey):
				t.Errorf("%s, %s: %v", n, what, err)
			case strings.HasSuffix(n, ".krs") && !strings.Contains(err.Error(), n):
				t.Errorf("%s, %s: the file is not named: %v", n, what, err)
			}
		}
	}
	m := fresh()
	whole, err := fsx.ReadFile(m, "vda-000001.krs", mib)
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole { // also where a frame ends
		if err := fsx.WriteAtomic(m, "vda-000001.krs", whole[:n]); err != nil {
			t.Fatal(err)
		}
		if _, err := media.Import(t.Context(), m, fsxtest.NewMem(), media.Key{}, nil); !errors.Is(err, media.ErrDamaged) {
			t.Fatalf("a piece cut to %d of %d bytes: %v", n, len(whole), err)
		}
	}
	if err := m.Remove("vda-000001.krs"); err != nil {
		t.Fatal(err)
	}
	to := fsxtest.NewMem()
	if _, err := media.Import(t.Context(), m, to, media.Key{}, nil); !errors.Is(err, media.ErrDamaged) {
		t.Errorf("a missing piece: %v", err)
	}
	// It is copied again, from the first export; the import goes on.
	if left, _ := to.List("."); len(left) != 2 {
		t.Errorf("left by the refused import: %v", left)
	}
	other := fresh()
	b, err := fsx.ReadFile(other, "vda-000001.krs", 64*mib)
	if err != nil {
		t.Fatal(err)
	}
	if err := fsx.WriteAtomic(m, "vda-000001.krs", b); err != nil {
		t.Fatal(err)
	}
	if _, err := media.Import(t.Context(), m, to, media.Key{}, nil); !errors.Is(err, media.ErrDamaged) {
		t.Errorf("a piece of another export: %v", err)
	}
}

func TestAnExportRefusesWhatItWouldMixUp(t *testing.T) {
	s := source()
	var ids []*age.X25519Identity
	for range 2 {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	one, two := media.Key{Recipient: ids[0].Recipient().String()}, media.Key{Recipient: ids[1].Recipient().String()}
	ctx, cancel := context.WithCancel(t.Context())
	m := fsxtest.NewMem()
	o := options(one)
	o.Progress = func(done, _ int64) {
		if done >= piece {
			cancel()
		}
	}
	if _, err := media.Export(ctx, m, s, o); !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted: %v", err)
	}
	if _, err := media.Import(t.Context(), m, fsxtest.NewMem(), media.Key{Identity: ids[0].String()}, nil); !errors.Is(err, media.ErrIncomplete) {
		t.Errorf("import of half an export: %v", err)
	}
	for _, k := range []media.Key{{}, two, {Passphrase: "x"}} {
		if _, err := media.Export(t.Context(), m, s, options(k)); !errors.Is(err, media.ErrKey) {
			t.Errorf("gone on with key %+v: %v", k, err)
		}
	}
	grown := source()
	grown.Disks[1].Device = memory{b: make([]byte, 4096)}
	other := source()
	other.VM = strings.Replace(vm, "5eed", "0bad", 1)
	for _, bad := range []media.Source{grown, other} {
		if _, err := media.Export(t.Context(), m, bad, options(one)); !errors.Is(err, media.ErrForeign) {
			t.Errorf("gone on with something else: %v", err)
		}
	}
	if _, err := media.Export(t.Context(), m, s, options(one)); err != nil {
		t.Fatal(err)
	}
	if _, err := media.Export(t.Context(), m, s, options(one)); !errors.Is(err, media.ErrExists) {
		t.Errorf("over a complete export: %v", err)
	}
	full := fsxtest.NewMem()
	f, err := full.Open("holiday.jpg", os.O_RDWR|os.O_CREATE)
	if err != nil || f.Close() != nil {
		t.Fatal(err)
	}
	if _, err := media.Export(t.Context(), full, s, options(media.Key{})); !errors.Is(err, media.ErrForeign) {
		t.Errorf("among other files: %v", err)
	}
}

// A medium that version 1 wrote is read by every later build.
func TestAMediumOfVersion1IsRead(t *testing.T) {
	const dir = "testdata/v1"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
			t.Fatal(err)
		}
		fs, err := fsx.OS(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := media.Export(t.Context(), fs, source(), options(media.Key{Passphrase: "golden"})); err != nil {
			t.Fatal(err)
		}
	}
	fs, err := fsx.OS(dir)
	if err != nil {
		t.Fatal(err)
	}
	to := fsxtest.NewMem()
	if _, err := media.Import(t.Context(), fs, to, media.Key{Passphrase: "golden"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := same(to, source()); err != nil {
		t.Error(err)
	}
}
