package kvm_test

import (
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"kvmreplica/integration/estate"
	"kvmreplica/integration/lab/console"
	"kvmreplica/integration/lab/guest"
	"kvmreplica/replicad/status"
)

// killPlane ends a VM's data plane the hard way.
func (w *world) killPlane(host string, d guest.Domain) {
	w.t.Helper()
	h := w.Lab.Host(host)
	_, err := h.Exec(w.step(), "sh", "-c", "kill -9 $(cat /run/replicad/vm/"+d.UUID+"/dataplane.pid)")
	w.must(err)
}

// killKeeper ends the keeper and the data plane together: only replicad is left
// to bring them back.
func (w *world) killKeeper(host string, d guest.Domain) {
	w.t.Helper()
	h := w.Lab.Host(host)
	dir := "/run/replicad/vm/" + d.UUID
	_, err := h.Exec(w.step(), "sh", "-c", "kill -9 $(cat "+dir+"/keeper.pid) $(cat "+dir+"/dataplane.pid)")
	w.must(err)
}

// killDaemon ends a host's replicad the hard way and starts it again.
func (w *world) killDaemon(host string) {
	w.t.Helper()
	w.must(w.Daemon(host).Kill())
	w.must(w.StartDaemon(w.step(), host))
}

// rounds is how many kills a test does; KVMREPLICA_KILLS makes it a campaign.
func rounds(t *testing.T, usual int) int {
	t.Helper()
	if s := os.Getenv("KVMREPLICA_KILLS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	return usual
}

// seeded draws the order of kills, or replays the one of KVMREPLICA_SEED.
func seeded(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("KVMREPLICA_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = v
	}
	t.Logf("KVMREPLICA_SEED=%d replays the order of kills", seed)
	return seed
}

// Any of the three processes is killed at random moments while the guest
// writes, first with live-inserted nodes (QEMU reconnects), then after a cold
// start on the other host (libvirt drops the reconnect delay: the guest stops
// and is resumed). The guest sees no error, nothing is copied whole, and a
// planned failover afterwards misses no record.
func TestKillsUnderLoadCostNoErrorAndNoFullCopy(t *testing.T) {
	w := up(t, estate.Options{})
	rng := rand.New(rand.NewPCG(seeded(t), 1))
	d := w.guest("killed", 3, 1, "lab.load=512")
	c := w.start(d)
	w.protect(d, "1s")
	n := rounds(t, 6)
	w.kills(rng, "A", "B", d, c, n)
	w.killKeeper("A", d)
	at := c.Synced()
	_, err := c.WaitSynced(w.step(), at+10)
	w.must(err)
	w.replicating("A", d.Name)
	w.noErrors("A", d, false)

	b, err := w.Console("B", d, true)
	w.must(err)
	w.ctl("A", "failover", "planned", d.Name, "--yes")
	last, err := c.WaitWord(w.step(), "LAST")
	w.must(err)
	high := w.booted(b, last.Uint("n"))
	_, err = b.WaitSynced(w.step(), high+5)
	w.must(err)
	w.replicating("B", d.Name)
	w.kills(rng, "B", "A", d, b, n)
	w.noErrors("B", d, true)
	a, err := w.Console("A", d, false)
	w.must(err)
	w.ctl("B", "failover", "planned", d.Name, "--yes")
	last, err = b.WaitWord(w.step(), "LAST")
	w.must(err)
	w.booted(a, last.Uint("n"))
	w.noErrors("B", d, true)
}

func (w *world) kills(rng *rand.Rand, primary, replica string, d guest.Domain, c *console.Console, n int) {
	w.t.Helper()
	for i := range n {
		before, err := c.WaitSynced(w.step(), c.Synced()+uint64(1+rng.IntN(20)))
		w.must(err)
		victim := rng.IntN(3)
		what := [...]string{"the data plane", "the primary's replicad", "the replica's replicad"}[victim]
		begun := time.Now()
		switch victim {
		case 0:
			w.killPlane(primary, d)
		case 1:
			w.killDaemon(primary)
		case 2:
			w.killDaemon(replica)
		}
		if _, err := c.WaitSynced(w.step(), before+3); err != nil {
			w.t.Fatalf("kill %d (%s): the guest does not go on: %v", i, what, err)
		}
		waited := time.Since(begun)
		v, err := w.WaitStatus(w.step(), primary, d.Name, "replicating again", func(v status.VM) bool {
			return v.State == status.Replicating && v.RPO >= 0 && v.LastCommit.After(begun)
		})
		w.must(err)
		w.t.Logf("kill %d: %s; guest went on within %v, protected again within %v", i, what, waited.Round(time.Millisecond), time.Since(begun).Round(time.Millisecond))
		if full := v.Disks[0].Size; v.Stats.RawBytes > full/2 {
			w.t.Fatalf("kill %d (%s): %d bytes were shipped since, the disk has %d", i, what, v.Stats.RawBytes, full)
		}
	}
}

// Both hosts lose power while the VM runs, and come back with libvirtd first.
// The VM runs again, on one host only, with every durable record.
func TestBothHostsLosePowerAndTheVMRunsAgainOnce(t *testing.T) {
	w := up(t, estate.Options{})
	d := w.guest("dark", 4, 1, "")
	c := w.start(d)
	w.protect(d, "1s")
	safe, err := c.WaitSynced(w.step(), c.Synced()+20)
	w.must(err)
	for _, h := range []string{"A", "B"} {
		w.must(w.Lab.Host(h).Crash())
	}
	a, err := w.Console("A", d, false)
	w.must(err)
	for _, h := range []string{"A", "B"} {
		w.must(w.Lab.Host(h).Start(w.step()))
	}
	if out, err := w.Lab.Host("A").Virsh(w.step(), "start", d.Name); err == nil {
		t.Fatalf("the VM could be started before replicad had decided: %s", out)
	}
	for _, h := range []string{"B", "A"} {
		w.must(w.StartDaemon(w.step(), h))
	}
	high := w.booted(a, safe)
	_, err = a.WaitSynced(w.step(), high+10)
	w.must(err)
	v := w.replicating("A", d.Name)
	if full := v.Disks[0].Size; v.Stats.RawBytes > full/2 {
		t.Errorf("after the power loss %d bytes were shipped, the disk has %d", v.Stats.RawBytes, full)
	}
	if out := w.virsh("B", "domstate", d.Name); !strings.Contains(out, "shut off") {
		t.Fatalf("the VM also runs on B: %s", out)
	}
	w.noErrors("A", d, false)
}

// The same with a silent peer: by policy the VM is held, or started after the
// stated time.
func TestASilentPeerAfterAPowerLossFollowsThePolicy(t *testing.T) {
	w := up(t, estate.Options{Config: "silent_peer_after = \"3s\"\n"})
	for i, policy := range []string{"start", "hold"} {
		d := w.guest("silent-"+policy, 5+i, 1, "")
		w.start(d)
		w.ctl("A", "vm", "enable", d.Name, "--to", estate.Peer("B"), "--every", "1s", "--on-silent-peer", policy, "--yes")
		w.replicating("A", d.Name)
	}
	for _, h := range []string{"A", "B"} {
		w.must(w.Lab.Host(h).Crash())
	}
	w.restart("A")
	_, err := w.WaitStatus(w.step(), "A", "silent-start", "running by policy", func(v status.VM) bool { return v.Running })
	w.must(err)
	v, err := w.WaitStatus(w.step(), "A", "silent-hold", "held by policy", func(v status.VM) bool {
		return strings.Contains(fmtConditions(v), "on-silent-peer=hold")
	})
	w.must(err)
	if v.Running {
		t.Fatal("held and running")
	}
	if out, err := w.Ctl(w.step(), "A", "vm", "start", "silent-hold"); err == nil {
		t.Fatalf("started without --force: %s", out)
	}
	w.ctl("A", "vm", "start", "silent-hold", "--force")
}
