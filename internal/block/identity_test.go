package block

import (
	"os"
	"path/filepath"
	"testing"
)

func TestANumberOfADeviceSaysNothingBetweenTwoBoots(t *testing.T) {
	t.Parallel()
	file := Identity{Kind: KindFile, Size: 1 << 30, Device: 45, Inode: 12, BirthTime: 13, MtimeNS: 14, CtimeNS: 15}
	disk := Identity{Kind: KindBlockDevice, Size: 1 << 30, Device: 45, Inode: 99}
	edit := func(id Identity, f func(*Identity)) Identity { f(&id); return id }
	for name, c := range map[string]struct {
		a, b             Identity
		same, renumbered bool
	}{
		"nothing":                  {file, file, true, false},
		"file system":              {file, edit(file, func(i *Identity) { i.Device = 46 }), false, true},
		"written to as well":       {file, edit(file, func(i *Identity) { i.Device, i.MtimeNS, i.CtimeNS = 46, 5, 5 }), false, true},
		"another file":             {file, edit(file, func(i *Identity) { i.Device, i.Inode = 46, 5 }), false, false},
		"a copy":                   {file, edit(file, func(i *Identity) { i.Device, i.BirthTime = 46, 5 }), false, false},
		"another size":             {file, edit(file, func(i *Identity) { i.Device, i.Size = 46, 5 }), false, false},
		"no time of birth":         {edit(file, func(i *Identity) { i.BirthTime = 0 }), edit(file, func(i *Identity) { i.Device, i.BirthTime = 46, 0 }), false, false},
		"the device":               {disk, edit(disk, func(i *Identity) { i.Device = 46 }), false, true},
		"another device":           {disk, edit(disk, func(i *Identity) { i.Device, i.Inode = 46, 5 }), false, false},
		"devices changed places":   {disk, edit(disk, func(i *Identity) { i.Inode = 5 }), false, false},
		"a device without a name":  {edit(disk, func(i *Identity) { i.Inode = 0 }), edit(disk, func(i *Identity) { i.Device, i.Inode = 46, 0 }), false, false},
		"a name that is known now": {edit(disk, func(i *Identity) { i.Inode = 0 }), disk, true, false},
	} {
		if got := c.a.SameImage(c.b); got != c.same {
			t.Errorf("%s: the same image: %v", name, got)
		}
		if got := c.a.Renumbered(c.b); got != c.renumbered {
			t.Errorf("%s: renumbered: %v", name, got)
		}
	}
}

func TestANameForLifeIsTheDevicesOwn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	device := func(path string, files map[string]string) {
		t.Helper()
		for name, text := range files {
			f := filepath.Join(dir, path, name)
			if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	device("sda", map[string]string{"device/wwid": "naa.5000c500\n"})
	device("sda/sda1", map[string]string{"partition": "1\n"})
	device("sda/sda2", map[string]string{"partition": "2\n"})
	device("sdb", map[string]string{"device/wwid": "naa.5000c501\n"})
	device("dm-0", map[string]string{"dm/uuid": "LVM-abc\n"})
	device("loop0", map[string]string{"size": "8\n"})
	device("empty", map[string]string{"wwid": "\n"})
	seen := map[uint64]string{}
	for _, d := range []string{"sda", "sda/sda1", "sda/sda2", "sdb", "dm-0"} {
		link := filepath.Join(dir, filepath.Base(d)+".link") // as in /sys/dev/block
		if err := os.Symlink(filepath.Join(dir, d), link); err != nil {
			t.Fatal(err)
		}
		n := deviceName(link)
		if other, double := seen[n]; n == 0 || double {
			t.Errorf("%s has the name %d, as has %q", d, n, other)
		}
		seen[n] = d
	}
	for _, d := range []string{"loop0", "empty", "absent"} {
		if n := deviceName(filepath.Join(dir, d)); n != 0 {
			t.Errorf("%s has the name %d", d, n)
		}
	}
}
