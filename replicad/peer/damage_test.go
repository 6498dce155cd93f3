package peer

import (
	"bytes"
	"crypto/x509"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
)

// A paired host's record that lies would trust another key, or allow what
// nobody granted.
func TestEveryDamageOfAPeersRecordIsDetectedOrHarmless(t *testing.T) {
	dir := fsxtest.NewMem()
	s, err := OpenStore(dir)
	errFatal(t, err)
	rec := recordOf(newHost(t, "b"))
	errFatal(t, s.Put(rec))
	file := recordFile(rec.Host)
	whole, err := dir.Content(file)
	errFatal(t, err)
	want, ok := s.Get(rec.Host)
	if !ok {
		t.Fatal("the record is not there")
	}
	refused, harmless := 0, 0
	for what, damaged := range fsxtest.Damages(whole) {
		errFatal(t, dir.Damage(file, func([]byte) []byte { return damaged }))
		s, err := OpenStore(dir)
		if err != nil {
			refused++
			continue
		}
		harmless++
		got, _ := s.Get(rec.Host)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s is believed: %s", what, d)
		}
	}
	t.Logf("%d bytes: %d damages refused, %d harmless", len(whole), refused, harmless)
}

// An identity that lies would make this host another one, or one that nobody
// can verify.
func TestEveryDamageOfTheIdentityIsDetectedOrHarmless(t *testing.T) {
	now := time.Now()
	whole := fsxtest.NewMem()
	id, err := OpenIdentity(whole, "a", now)
	errFatal(t, err)
	for _, file := range []string{caCertFile, caKeyFile, leafFile} {
		content, err := whole.Content(file)
		errFatal(t, err)
		share := fsxtest.Share(7)
		i, refused, mended, harmless := 0, 0, 0, 0
		for what, damaged := range fsxtest.Damages(content) {
			if i++; !share(i) {
				continue
			}
			dir := fsxtest.NewMem()
			errFatal(t, dir.MkdirAll(identityRoot))
			for _, f := range []string{caCertFile, caKeyFile, leafFile} {
				c, err := whole.Content(f)
				errFatal(t, err)
				if f == file {
					c = damaged
				}
				errFatal(t, fsx.WriteAtomic(dir, f, c))
			}
			got, err := OpenIdentity(dir, "a", now)
			if err != nil {
				refused++
				continue
			}
			if now, err := dir.Content(file); err == nil && !bytes.Equal(now, damaged) {
				mended++
			} else {
				harmless++
			}
			if got.Host() != id.Host() || got.Pin() != id.Pin() || !bytes.Equal(got.Anchor(), id.Anchor()) {
				t.Errorf("%s %s makes another host: %v", filepath.Base(file), what, got.Host())
			}
			chain, err := x509.ParseCertificates(bytes.Join(got.leaf.Load().Certificate, nil))
			if err == nil {
				err = verifyChain(chain, id.Pin(), id.anchor, x509.ExtKeyUsageServerAuth, now)
			}
			if err != nil {
				t.Errorf("%s %s: a peer refuses what is shown: %v", filepath.Base(file), what, err)
			}
		}
		t.Logf("%s, %d bytes: %d damages refused, %d mended, %d harmless", file, len(content), refused, mended, harmless)
	}
}
