package kernel_test

import (
	"strings"
	"testing"

	"kvmreplica/replicad/dataplane"
)

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
