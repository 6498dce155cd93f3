package kernel_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"kvmreplica/nbd"
	"kvmreplica/replicad/dataplane"
)

// TestTheKernelsClientLosesNothingWhenDataPlanesDie: /dev/nbd0 on our export,
// over two connections; the data plane is killed again and again, first under a
// load on the device that checks what it reads, then under one of files on ext4. The
// kernel resends, connections are given back by NBD_CMD_RECONFIGURE. Nobody
// sees an error, the file system is clean, and so is the orderly disconnect.
func TestTheKernelsClientLosesNothingWhenDataPlanesDie(t *testing.T) {
	long(t)
	m := boot(t, nil)
	const size = 48 << 20
	m.sh(fmt.Sprintf("truncate -s %d /data/vda.raw", size))
	m.serve(dataplane.DiskConfig{Name: "vda", Kind: dataplane.Raw, Path: "/data/vda.raw"})
	m.start("hold", "/bin/knbd hold 0 "+m.cfg.NBDSocket()+" vda 2", "attached")

	m.killed("/bin/knbd load /dev/nbd0 4 500 1", "load")
	said := m.sh("cat /run/load.log")
	if sum := strings.Fields(m.sh("sha256sum </data/vda.raw"))[0]; !strings.Contains(said, sum) {
		t.Fatalf("the image is %s, the load read in the end: %s", sum, said)
	}

	m.sh("/sbin/mke2fs -q -t ext4 -F /dev/nbd0 && mkdir -p /mnt/n && mount -t ext4 /dev/nbd0 /mnt/n")
	m.killed("/bin/knbd files /mnt/n 3 600 2", "files")
	m.sh("umount /mnt/n && /sbin/e2fsck -fn /dev/nbd0")
	if bad := m.sh("dmesg | grep -iE 'I/O error|EXT4-fs error|EXT4-fs warning|Aborting journal' || true"); bad != "" {
		t.Fatalf("the kernel saw errors: %s", bad)
	}

	m.sh("kill $(cat /run/hold.pid)")
	m.until("/run/hold.log", "given back")
	t.Log(m.sh("tail -n 1 /run/hold.log"))
	if size := m.sh("cat /sys/block/nbd0/size"); size != "0" {
		t.Errorf("after the disconnect the device has %s sectors", size)
	}
	if st := m.answers(); st.Disks[0].Errors != 0 {
		t.Errorf("%d requests were answered with errors", st.Disks[0].Errors)
	}
	// The export is free for somebody else again.
	m.content("vda")
}

// kills is how often one load loses its data plane.
const kills = 5

// killed runs a program that uses the device while data planes are killed, and
// expects it to end well. Each data plane answers some requests first.
func (m *machine) killed(line, name string) {
	m.t.Helper()
	log := "/run/" + name + ".log"
	// Its end is in its log: process 1 of this guest waits for nobody's
	// children, so a process that ended would still be there.
	m.sh("(" + line + "; echo ended with $?) >" + log + " 2>&1 &")
	n := 0
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for ; n < kills && m.sh("grep -c 'ended with' "+log+" || true") == "0"; <-tick.C {
		if st := m.answers(); st.Disks[0].Requests >= 40 {
			m.sh(fmt.Sprintf("kill -9 %d", st.PID))
			n++
		}
	}
	m.until(log, "ended with")
	if said := m.sh("cat " + log); !strings.Contains(said, "ended with 0") || n < kills {
		m.t.Fatalf("%d kills; %s says: %s", n, name, said)
	}
	m.t.Logf("%s: %d kills", name, n)
}

// content reads a whole export from outside, as soon as it is free.
func (m *machine) content(disk string) []byte {
	m.t.Helper()
	for {
		c, err := m.Dial(m.ctx, m.cfg.NBDSocket())
		must(m.t, err)
		d, err := nbd.NewClient(m.ctx, c, nbd.ClientOptions{Export: disk, Timeout: patience})
		if err != nil && m.ctx.Err() == nil && strings.Contains(err.Error(), "in use") {
			continue
		}
		must(m.t, err)
		b := make([]byte, d.Size())
		_, err = d.ReadAt(b, 0)
		must(m.t, err)
		must(m.t, d.Close())
		return b
	}
}

// TestNbdServerHoldsAProtectedDisk: the image of a data plane is on Debian's
// nbd-server; the kernel's client writes through us, and what it wrote is in
// nbd-server's file.
func TestNbdServerHoldsAProtectedDisk(t *testing.T) {
	long(t)
	m := boot(t, map[string]string{"/bin/nbd-server": "nbd-server"})
	m.sh("truncate -s 16777216 /data/up.raw && touch /etc/passwd")
	must(t, m.Put(m.ctx, "/etc/nbd.conf", []byte("[generic]\nunixsock = /run/up\n[disk]\nexportname = /data/up.raw\nflush = true\nfua = true\n"), 0o644))
	m.sh("/bin/nbd-server -C /etc/nbd.conf -p /run/up.pid >/run/up.log 2>&1; i=0; until [ -S /run/up ]; do usleep 50000; i=$((i+1)); [ $i -lt 200 ] || { cat /run/up.log; exit 1; }; done")
	m.serve(dataplane.DiskConfig{Name: "vda", Kind: dataplane.NBD, URI: "nbd+unix:///disk?socket=/run/up"})
	m.start("hold", "/bin/knbd hold 0 "+m.cfg.NBDSocket()+" vda 1", "attached")
	said := m.sh("/bin/knbd load /dev/nbd0 2 200 5")
	t.Log(said)
	m.sh("kill $(cat /run/hold.pid)")
	m.until("/run/hold.log", "given back")
	must(t, m.plane.Sync(m.ctx))
	if sum := m.sh("sha256sum </data/up.raw"); !strings.Contains(said, strings.Fields(sum)[0]) {
		t.Fatalf("nbd-server's file is %s, the load read: %s", sum, said)
	}
}
