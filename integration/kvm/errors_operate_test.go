package kvm_test

import (
	"kvmreplica/integration/estate"
)

// stopped ends a host's daemon for a case.
func stopped(host string) func(w *errorWorld) func() {
	return func(w *errorWorld) func() {
		w.must(w.Daemon(host).Stop(w.step()))
		return func() { w.must(w.StartDaemon(w.step(), host)) }
	}
}

// pausedAtStart has the protected VM running, at its first instruction.
func pausedAtStart(w *errorWorld) func() {
	w.virsh("A", "start", "--paused", keptVM)
	return func() { w.virsh("A", "destroy", keptVM) }
}

func operateErrors() []errorCase {
	planned := func(more ...string) []string {
		return append([]string{"failover", "planned", keptVM, "--yes"}, more...)
	}
	addr := func(code string) []string { return []string{"peer", "join", "10.77.0.1:7878", code} }
	return []errorCase{
		{id: "daemon-not-running", args: []string{"vm", "list"}, code: 5, words: []string{"the daemon does not answer", "systemctl status replicad"}, setup: stopped("A")},
		{id: "vm-unknown", args: []string{"vm", "status", freeVM}, code: 1, words: []string{"is not protected here", "replicactl vm enable " + freeVM}},
		{id: "interval", args: []string{"vm", "enable", freeVM, "--to", estate.Peer("B"), "--every", "25h", "--yes"}, code: 2, words: []string{"--every takes", "1s to 24h"}},
		{id: "on-silent-peer", args: enable(freeVM, "--on-silent-peer", "maybe"), code: 2, words: []string{`"maybe"`, "start or hold"}},
		{id: "set-nothing", args: []string{"vm", "set", keptVM}, code: 2, words: []string{"say what to set", "replicactl vm set --help"}},
		{id: "set-shutdown-time", args: []string{"vm", "set", keptVM, "--shutdown-time", "90ms"}, code: 2, words: []string{"--shutdown-time takes whole seconds from 1s to 24h"}},
		{id: "set-app-every", args: []string{"vm", "set", keptVM, "--app-every", "5s"}, code: 2, words: []string{"application-consistent points every 5s", "from 1m to 168h"}},
		{id: "set-on-replica", host: "B", args: []string{"vm", "set", keptVM, "--every", "5s"}, code: 6, words: []string{"the settings of kept are its primary's, which is kvm-a", "on kvm-a: replicactl vm set kept"}},
		{id: "set-state-disk-full", args: []string{"vm", "set", keptVM, "--every", "7s"}, code: 1, words: []string{"no space left on device", "df -h /var/lib/replicad"}, setup: full("A", stateDir)},
		{id: "enable-no-policy", args: []string{"vm", "enable", freeVM, "--yes"}, code: 2, words: []string{"no policy of this host fits free, and --to PEER is missing", "replicactl vm enable free --to PEER (replicactl peer list), or: replicactl policy list"}},
		{id: "enable-no-policy-domain-missing", args: []string{"vm", "enable", "nosuch", "--yes"}, code: 1, words: []string{`libvirt has no domain "nosuch"`, "virsh list --all"}},
		{id: "policy-apply-no-policy", args: []string{"policy", "apply", freeVM}, code: 6, words: []string{"no policy of this host fits free", "replicactl policy list; or: replicactl vm enable free --to PEER"}},
		{id: "policy-apply-domain-missing", args: []string{"policy", "apply", "nosuch"}, code: 1, words: []string{`libvirt has no domain "nosuch"`, "virsh list --all"}},
		{id: "policy-libvirt-down", args: []string{"policy", "list"}, code: 1, words: []string{"list domains: libvirtd is not reachable", "systemctl status libvirtd virtqemud"}, setup: libvirtDown("A")},
		{id: "pairing-code-wrong", host: "B", args: addr("AAAA-AAAA-AAAA-AAAA"), code: 6, words: []string{"pairing code is wrong", "replicactl peer invite"}, setup: func(w *errorWorld) func() {
			w.ctl("A", "peer", "invite", "--valid", "1m")
			return func() {}
		}},
		{id: "pairing-code-malformed", host: "B", args: addr("nonsense"), code: 2, words: []string{"mistyped", "replicactl peer invite"}},
		{id: "peer-shares-vms", args: []string{"peer", "remove", estate.Peer("B")}, code: 6, words: []string{"VMs are still shared with", "replicactl vm disable"}},
		{id: "peer-shares-vms-there", host: "B", args: []string{"peer", "remove", estate.Peer("A")}, code: 6, words: []string{"VMs are still shared with", "replicactl vm disable"}},
		{id: "peer-address-silent", args: []string{"peer", "address", estate.Peer("B"), "10.77.0.2:9"}, code: 6, words: []string{"does not answer at 10.77.0.2:9", "still looked for at 10.77.0.2:7878", "--force"}},
		{id: "peer-address-of-another", args: []string{"peer", "address", estate.Peer("B"), "10.77.0.1"}, code: 6, words: []string{"does not answer at 10.77.0.1:7878", "--force"}},
		{id: "peer-address-malformed", args: []string{"peer", "address", estate.Peer("B"), "kvm-b:http"}, code: 2, words: []string{"between 1 and 65535", "HOST:PORT"}},
		{id: "planned-peer-away", args: planned(), code: 6, words: []string{"Repli", "replicactl peer test"}, setup: stopped("B")},
		{id: "planned-primary-away", host: "B", args: planned(), code: 1, words: []string{"cannot reach", "when it is dead: replicactl failover unplanned " + keptVM}, setup: stopped("A")},
		{id: "planned-libvirt-down-there", args: planned(), code: 6, words: []string{"Hypervisor", "systemctl status libvirtd"}, setup: libvirtDown("B")},
		{id: "unplanned-on-primary", args: []string{"failover", "unplanned", keptVM, "--yes"}, code: 6, words: []string{"this host is the primary", "failover planned " + keptVM}},
		{id: "unplanned-primary-alive", host: "B", args: []string{"failover", "unplanned", keptVM, "--yes"}, code: 6, words: []string{"it answers and its guest runs", "failover planned " + keptVM}, setup: pausedAtStart},
		{id: "reverse-without-failover", args: []string{"failover", "reverse", keptVM, "--yes"}, code: 6, words: []string{"nothing to reverse", "replicactl vm status"}},
		{id: "pause-on-replica", host: "B", args: []string{"vm", "pause", keptVM}, code: 6, words: []string{"this host does not ship", "on the primary"}},
		{id: "sync-paused", args: []string{"vm", "sync", keptVM}, code: 6, words: []string{"replication is paused", "replicactl vm resume " + keptVM}, setup: func(w *errorWorld) func() {
			w.ctl("A", "vm", "pause", keptVM)
			return func() { w.ctl("A", "vm", "resume", keptVM); w.replicating("A", keptVM) }
		}},
		{id: "sync-peer-away", args: []string{"vm", "sync", keptVM}, code: 1, words: []string{"the cycle failed: ", "tried again by itself", "replicactl vm status " + keptVM}, setup: stopped("B")},
		{id: "start-on-replica", host: "B", args: []string{"vm", "start", keptVM}, code: 6, words: []string{"this host is replica", "failover"}},
		{id: "disable-on-replica", host: "B", args: []string{"vm", "disable", keptVM, "--yes"}, code: 6, words: []string{"this host is the replica", "on the primary"}},
		{id: "disable-peer-away", args: []string{"vm", "disable", keptVM, "--yes"}, code: 1, words: []string{"the replica host cannot be told", "--force"}, setup: stopped("B")},
		{id: "test-on-primary", args: []string{"failover", "test", keptVM, "--point", "oldest"}, code: 6, words: []string{"this host is the primary of kept", "its recovery points are on kvm-b", "on kvm-b: replicactl failover test kept --point oldest"}},
		{id: "test-stop-on-primary", args: []string{"failover", "test-stop", keptVM, "--all"}, code: 6, words: []string{"this host is the primary of kept", "on kvm-b: replicactl failover test-stop kept --all"}},
		{id: "drill-on-primary", args: []string{"drill", keptVM, "--proof", "tcp:22"}, code: 6, words: []string{"this host is the primary of kept", "on kvm-b: replicactl drill kept --proof tcp:22"}},
		{id: "no-plan-to-resume", args: []string{"failover", "resume", keptVM}, code: 6, words: []string{"no plan of this VM is interrupted", "replicactl vm status"}},
		{id: "pause-state-disk-full", args: []string{"vm", "pause", keptVM}, code: 1, words: []string{"no space left on device", "df -h /var/lib/replicad"}, setup: full("A", stateDir)},
	}
}
