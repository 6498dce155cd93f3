package kvm_test

import "os"

// configured has a host's configuration with a line added to it, for the daemon
// that runs.
func configured(host, line string) func(w *errorWorld) func() {
	const file = "/etc/replicad/replicad.toml"
	return func(w *errorWorld) func() {
		h := w.Lab.Host(host)
		was, err := os.ReadFile(h.Path(file))
		w.must(err)
		w.must(h.PutFile(file, []byte(line+"\n"+string(was)), 0o600))
		return func() { w.must(h.PutFile(file, was, 0o600)) }
	}
}

// setErrors are the refusals of what changes a protected VM's disks, and of
// reading the configuration again.
func setErrors() []errorCase {
	resize := func(more ...string) []string { return append([]string{"vm", "resize", keptVM}, more...) }
	add := func(disk string) []string { return []string{"vm", "add-disk", keptVM, disk} }
	remove := func(disk string) []string { return []string{"vm", "remove-disk", keptVM, disk, "--yes"} }
	return []errorCase{
		{id: "resize-shorter", args: resize("vda", "1M"), code: 6, words: []string{"bytes would be cut off", "to cut them off: --shrink, with the guest off"}},
		{id: "resize-odd", args: resize("vda", "5000001"), code: 2, words: []string{"SIZE takes a number of bytes above 0 in whole sectors of 512", "replicactl vm resize --help"}},
		{id: "resize-disk-unknown", args: resize("vdz", "1G"), code: 1, words: []string{`has no protected disk "vdz"`, "replicactl vm status kept"}},
		{id: "resize-on-replica", host: "B", args: resize("vda", "1G"), code: 6, words: []string{"this host is replica for the VM", "run the command on the host where the VM runs"}},
		{id: "add-disk-protected", args: add("vda"), code: 6, words: []string{"disk vda is protected already", "replicactl vm status kept"}},
		{id: "add-disk-unknown", args: add("vdz"), code: 1, words: []string{`the domain has no disk "vdz"`, "virsh domblklist kept", "attach it first: virsh attach-disk"}},
		{id: "add-disk-on-replica", host: "B", args: add("vdb"), code: 6, words: []string{"this host is replica for the VM", "run the command on the host where the VM runs"}},
		{id: "remove-disk-only", args: remove("vda"), code: 6, words: []string{"vda is the only protected disk", "to end the protection: replicactl vm disable kept"}},
		{id: "remove-disk-unknown", args: remove("vdz"), code: 1, words: []string{`has no protected disk "vdz"`, "replicactl vm status kept"}},
		{id: "reload-bad-file", args: []string{"reload"}, code: 2, words: []string{"nothing was changed", "replicad --check --config"}, setup: configured("A", `nonsense = "1"`)},
		{id: "reload-needs-restart", args: []string{"reload"}, code: 6, words: []string{"only a restart takes it over: shipping_slots", "systemctl restart replicad"}, setup: configured("A", "shipping_slots = 7")},
	}
}
