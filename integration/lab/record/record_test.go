package record

import (
	"bytes"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kvmreplica/internal/boundtest"
)

// logs builds what a guest with so many disks has written up to record n.
func logs(disks int, n uint64) [][]byte {
	out := make([][]byte, disks)
	for i := uint64(1); i <= n; i++ {
		d := Disk(i, disks)
		out[d] = append(out[d], Record{Number: i, Millis: int64(i), Boot: 7, Disks: uint32(disks)}.Encode()...)
	}
	return out
}

func verify(t *testing.T, l [][]byte) Verdict {
	t.Helper()
	var r []io.Reader
	for _, b := range l {
		r = append(r, bytes.NewReader(b))
	}
	v, err := Verify(r)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestWholeLogsAreGood(t *testing.T) {
	for disks := 1; disks <= 4; disks++ {
		for n := range uint64(10) {
			v := verify(t, logs(disks, n))
			if v.Highest != n || v.Bad != -1 {
				t.Errorf("%d disks, %d records: %v", disks, n, v)
			}
		}
	}
}

func TestTornLastRecordIsNotBad(t *testing.T) {
	l := logs(2, 6)
	l[1] = l[1][:len(l[1])-100]
	want := Verdict{Highest: 5, Bad: -1, Boots: 1, LastBoot: 7, Trailing: 412}
	if d := cmp.Diff(want, verify(t, l)); d != "" {
		t.Error("-want +got", d)
	}
}

func TestDisksCutAtDifferentMomentsAreBad(t *testing.T) {
	l := logs(2, 8)
	l[0] = l[0][:2*Size] // holds 1 and 3; 5 and 7 are missing, 4, 6 and 8 are there
	if v := verify(t, l); v.Highest != 4 || v.Bad != 5 {
		t.Errorf("got %v, want highest=4 bad=5", v)
	}
}

func TestDamageIsBadAtItsRecord(t *testing.T) {
	for _, at := range []int{0, 12, 40, 300, 511} {
		l := logs(1, 5)
		l[0][2*Size+at] ^= 1
		if v := verify(t, l); v.Highest != 2 || v.Bad != 3 {
			t.Errorf("byte %d flipped: %v, want highest=2 bad=3", at, v)
		}
	}
}

func TestLostRecordInTheMiddleIsBad(t *testing.T) {
	l := logs(1, 5)
	l[0] = append(l[0][:2*Size], l[0][3*Size:]...)
	if v := verify(t, l); v.Highest != 2 || v.Bad != 3 {
		t.Errorf("got %v, want highest=2 bad=3", v)
	}
}

func TestRecordsOfTwoBootsAreCounted(t *testing.T) {
	l := logs(1, 3)
	l[0] = append(l[0], Record{Number: 4, Boot: 8, Disks: 1}.Encode()...)
	if v := verify(t, l); v.Boots != 2 || v.LastBoot != 8 || v.Highest != 4 {
		t.Errorf("got %v", v)
	}
}

func FuzzVerifyNeverPanics(f *testing.F) {
	f.Add(bytes.Join(logs(2, 4), nil), 2)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		defer boundtest.Input(t)()
		cut = max(0, min(cut, len(b)))
		v, err := Verify([]io.Reader{bytes.NewReader(b[:cut]), bytes.NewReader(b[cut:])})
		if err != nil {
			t.Fatal(err)
		}
		if v.Highest > uint64(len(b)/Size) || v.Bad >= 0 && uint64(v.Bad) != v.Highest+1 {
			t.Errorf("%v from %d bytes", v, len(b))
		}
	})
}
