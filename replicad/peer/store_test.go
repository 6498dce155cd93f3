package peer

import (
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/fsx"
	"kvmreplica/internal/fsx/fsxtest"
	"kvmreplica/replicad/wire"
)

func recordOf(h *host) Record {
	return Record{Host: h.id.Host(), Name: h.id.Name(), Address: "10.0.0.1:7878", Pin: h.id.Pin(), Anchor: h.id.Anchor(), Allow: all()}
}

func TestKeysAndRecordsAreReadableByTheirOwnerOnly(t *testing.T) {
	root := t.TempDir()
	dir, err := fsx.OS(root)
	errFatal(t, err)
	id, err := OpenIdentity(dir, "a", time.Now())
	errFatal(t, err)
	s, err := OpenStore(dir)
	errFatal(t, err)
	errFatal(t, s.Put(recordOf(newHost(t, "b"))))
	files := 0
	errFatal(t, filepath.Walk(root, func(p string, st os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		if st.Mode().Perm()&0o077 != 0 && p != root {
			t.Errorf("%s has mode %v", p, st.Mode())
		}
		if st.Mode().IsRegular() {
			files++
		}
		return nil
	}))
	if files != 4 {
		t.Errorf("%d files, want 4", files)
	}
	again, err := OpenIdentity(dir, "a", time.Now())
	if err != nil || again.Pin() != id.Pin() {
		t.Errorf("reopened: %v", err)
	}
	// Somebody else's authority beside our key.
	other := newHost(t, "x")
	errFatal(t, os.WriteFile(filepath.Join(root, caCertFile), encodeCerts(other.id.Anchor()), 0o600))
	if _, err := OpenIdentity(dir, "a", time.Now()); err == nil || !strings.Contains(err.Error(), caKeyFile) {
		t.Errorf("a foreign authority was accepted: %v", err)
	}
}

func TestDamagedOrForeignRecordsAreNotSilentlyDropped(t *testing.T) {
	good := recordOf(newHost(t, "b"))
	for name, content := range map[string]string{
		"empty":         "",
		"half":          `{"host":"`,
		"unknown field": `{"host":"` + string(good.Host) + `","root":true}`,
		"other name":    `{"host":"11111111-0000-4000-8000-000000000001","name":"x","pin":"` + good.Pin.String() + `","allow":{}}`,
		"no pin":        `{"host":"` + string(good.Host) + `","name":"x","allow":{}}`,
		"wrong pin":     `{"host":"` + string(good.Host) + `","name":"x","pin":"` + strings.Repeat("0", 63) + `1","anchor":"` + b64(good.Anchor) + `","allow":{}}`,
		"relative root": `{"host":"` + string(good.Host) + `","name":"x","pin":"` + good.Pin.String() + `","allow":{"may_send":true,"storage_root":"x"}}`,
	} {
		dir := fsxtest.NewMem()
		errFatal(t, dir.MkdirAll(peersRoot))
		errFatal(t, fsx.WriteAtomic(dir, recordFile(good.Host), []byte(content)))
		if _, err := OpenStore(dir); err == nil || !strings.Contains(err.Error(), recordFile(good.Host)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFindIsClearAboutNames(t *testing.T) {
	s, err := OpenStore(fsxtest.NewMem())
	errFatal(t, err)
	a, b := recordOf(newHost(t, "twin")), recordOf(newHost(t, "twin"))
	b.Address = "10.0.0.2:7878"
	errFatal(t, s.Put(a))
	if got, err := s.Find("twin"); err != nil || got.Host != a.Host {
		t.Errorf("by name: %v", err)
	}
	errFatal(t, s.Put(b))
	if _, err := s.Find("twin"); kindOf(err) != wire.KindConflict || !strings.Contains(err.Error(), string(a.Host)) {
		t.Errorf("two of a name: %v", err)
	}
	if got, err := s.Find("10.0.0.2:7878"); err != nil || got.Host != b.Host {
		t.Errorf("by address: %v", err)
	}
	if _, err := s.Find("nobody"); kindOf(err) != wire.KindNotFound {
		t.Errorf("unknown: %v", err)
	}
	errFatal(t, s.Remove(a.Host))
	if got, err := s.Find("twin"); err != nil || got.Host != b.Host {
		t.Errorf("after removal: %v", err)
	}
	if err := s.Remove(a.Host); kindOf(err) != wire.KindNotFound {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := s.trusted(a.Host); !errors.Is(err, ErrRemovedPeer) {
		t.Errorf("a removed host is %v", err)
	}
}

// TestAPowerCutLeavesTheOldOrTheNewTrust cuts at every persistence operation of
// a change of trust and looks at every state the disk may be left in.
func TestAPowerCutLeavesTheOldOrTheNewTrust(t *testing.T) {
	a := recordOf(newHost(t, "a"))
	changed := a.clone()
	changed.Allow = Authorisation{MaxVMs: 1}
	removed := a.clone()
	removed.Removed, removed.Allow = true, Authorisation{}
	total := 0
	for name, c := range map[string]struct {
		do   func(*Store) error
		want []Record
	}{
		"allow":  {func(s *Store) error { return s.Allow(a.Host, changed.Allow) }, []Record{a, changed}},
		"remove": {func(s *Store) error { return s.Remove(a.Host) }, []Record{a, removed}},
	} {
		for n := 1; ; n++ {
			dir := fsxtest.NewMem()
			var s *Store
			errFatal(t, dir.Power().Setup(func() (err error) {
				if s, err = OpenStore(dir); err != nil {
					return err
				}
				return s.Put(a)
			}))
			dir.Power().CrashAt(n)
			err := c.do(s)
			if !dir.Power().Lost() {
				errFatal(t, err)
				break
			}
			if err == nil {
				t.Errorf("%s: cut at %d, and success reported", name, n)
			}
			cases, _, bad, err := fsxtest.Survivors(200, 20, 1, func(choose fsxtest.Chooser) error {
				back, err := OpenStore(dir.CrashClone(choose))
				if err != nil {
					return err
				}
				got := back.records[a.Host]
				if !cmp.Equal(got, c.want[0]) && !cmp.Equal(got, c.want[1]) {
					return fmt.Errorf("record is %+v", got)
				}
				return nil
			})
			if err != nil {
				t.Errorf("%s: cut at %d, choices %v: %v", name, n, bad, err)
			}
			total += cases
		}
	}
	if total < 10 {
		t.Fatalf("only %d cases", total)
	}
	t.Logf("%d states after a cut", total)
}

// TestAPowerCutWhileTheIdentityIsMadeNeverLeavesHalfOfOne: afterwards the host
// has a whole identity, the old one if peers may have seen it.
func TestAPowerCutWhileTheIdentityIsMadeNeverLeavesHalfOfOne(t *testing.T) {
	total := 0
	for n := 1; ; n++ {
		dir := fsxtest.NewMem()
		dir.Power().CrashAt(n)
		_, err := OpenIdentity(dir, "a", time.Now())
		if !dir.Power().Lost() {
			errFatal(t, err)
			break
		}
		cases, _, bad, err := fsxtest.Survivors(20, 4, 1, func(choose fsxtest.Chooser) error {
			left := dir.CrashClone(choose)
			id, err := OpenIdentity(left, "a", time.Now())
			if err != nil {
				return err
			}
			again, err := OpenIdentity(left, "a", time.Now())
			if err != nil {
				return err
			}
			if again.Pin() != id.Pin() || again.Host() != id.Host() {
				return errors.New("the identity changed")
			}
			return verifyChain([]*x509.Certificate{again.Leaf()}, again.Pin(), again.anchor, x509.ExtKeyUsageServerAuth, time.Now())
		})
		if err != nil {
			t.Errorf("cut at %d, choices %v: %v", n, bad, err)
		}
		total += cases
	}
	t.Logf("%d states after a cut", total)
}

func TestAFullDiskKeepsTheOldTrust(t *testing.T) {
	dir := fsxtest.NewMem()
	s, err := OpenStore(dir)
	errFatal(t, err)
	a := recordOf(newHost(t, "a"))
	errFatal(t, s.Put(a))
	broken := errors.New("no space left")
	dir.Power().SetHook(func(op fsxtest.Op) error { return broken })
	if err := s.Allow(a.Host, Authorisation{}); !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
	if got, _ := s.Get(a.Host); !got.Allow.MaySend {
		t.Fatal("a change that was not recorded counts")
	}
	// Distrust is the exception: it counts at once, and the error says it may not last.
	if err := s.Remove(a.Host); !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
	if _, ok := s.Get(a.Host); ok {
		t.Fatal("the host is still trusted")
	}
}

func TestImpossibleEntriesAreRefused(t *testing.T) {
	ok := all()
	for name, change := range map[string]func(*Authorisation){
		"no root":         func(a *Authorisation) { a.StorageRoot = "" },
		"relative root":   func(a *Authorisation) { a.StorageRoot = "replicas" },
		"root with dots":  func(a *Authorisation) { a.StorageRoot = "/srv/../etc" },
		"root with NUL":   func(a *Authorisation) { a.StorageRoot = "/srv/\x00" },
		"negative number": func(a *Authorisation) { a.MaxVMs = -1 },
		"negative bytes":  func(a *Authorisation) { a.MaxBytes = -1 },
		"no number":       func(a *Authorisation) { a.MaxVMs = 0 },
		"bad VM id":       func(a *Authorisation) { a.VMs = []wire.VMID{"../x"} },
		"group with tab":  func(a *Authorisation) { a.Group = "a\tb" },
	} {
		a := ok
		change(&a)
		if a.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if (Authorisation{}).Validate() != nil || ok.Validate() != nil {
		t.Error("good entries are refused")
	}
}
