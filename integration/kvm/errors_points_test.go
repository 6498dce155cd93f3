package kvm_test

// pointErrors are the refusals of what is done with recovery points, test
// copies, drills, unplanned failovers and patches.
func pointErrors() []errorCase {
	on := func(verb ...string) []string { return append(verb, keptVM) }
	with := func(args []string, more ...string) []string { return append(args, more...) }
	unplanned := on("failover", "unplanned")
	return []errorCase{
		{id: "point-on-primary", args: with(on("point", "pin"), "latest"), code: 6, words: []string{"and looked after, on kvm-b", "there: replicactl point list kept"}},
		{id: "point-missing", host: "B", args: with(on("point", "mount"), "--point", "4711"), code: 1, words: []string{`"4711": no such recovery point`, "replicactl point list kept"}},
		{id: "point-unknown-text", host: "B", args: with(on("point", "pin"), "newest"), code: 2, words: []string{`"newest"`, "this does not name a recovery point", "replicactl point list kept"}},
		{id: "point-retention", host: "B", args: with(on("point", "keep"), "25"), code: 2, words: []string{"this is no retention of recovery points", "replicactl point keep --help"}},
		{id: "point-quota-read-only", host: "B", args: with(on("point", "mount"), "--quota", "5G"), code: 2, words: []string{"--quota takes a size above 0 and goes with --rw", "replicactl point mount --help"}},
		{id: "point-app-on-replica", host: "B", args: with(on("point", "app"), "1h"), code: 6, words: []string{"kept runs on kvm-a"}},
		{id: "point-export-exists", host: "B", args: with(on("point", "export"), "--to", "/etc/replicad/replicad.toml"), code: 2, words: []string{"the file exists", "--to a file that does not exist, or a directory"}},
		{id: "test-point-missing", host: "B", args: with(on("failover", "test"), "--point", "4711"), code: 1, words: []string{`"4711": no such recovery point`, "replicactl point list kept"}},
		{id: "test-quota", host: "B", args: with(on("failover", "test"), "--quota", "1K"), code: 2, words: []string{"a quota of 1024 bytes", "give the copy at least 1 MiB to write"}},
		{id: "test-room", host: "B", args: with(on("failover", "test"), "--quota", "1000T"), code: 6, words: []string{"Space for writes: ", "space there, or choose a smaller --quota"}},
		{id: "test-isolated-and-network", host: "B", args: with(on("failover", "test"), "--isolated", "--network", "default"), code: 2, words: []string{"either isolated or in a network of this host", "leave one of --network and --isolated out"}},
		{id: "test-name-taken", host: "B", args: with(on("failover", "test"), "--name", keptVM), code: 6, words: []string{`Name: a domain is called "kept" already`, "choose another one: --name"}},
		{id: "test-name-bad", host: "B", args: with(on("failover", "test"), "--name", "a/b"), code: 2, words: []string{`"a/b" cannot be a domain's name`, "use letters, digits"}},
		{id: "drill-proof", host: "B", args: with(on("drill"), "--proof", "hope"), code: 2, words: []string{`proof "hope"`, "say agent"}},
		{id: "drill-timeout", host: "B", args: with(on("drill"), "--timeout", "100ms"), code: 2, words: []string{"timeout 100ms", "from 1s to 24h"}},
		{id: "drill-tcp-isolated", host: "B", args: with(on("drill"), "--isolated", "--proof", "tcp:22"), code: 6, words: []string{"the copy is isolated: this host cannot connect to it", "put it into a test network (--network)"}},
		{id: "drill-no-such-report", host: "B", args: with([]string{"drill", "report"}, keptVM, "--when", "1999"), code: 1, words: []string{"no such drill of kept", "replicactl drill list kept"}},
		{id: "unplanned-primary-away", host: "B", args: with(unplanned, "--yes"), code: 6, words: []string{"Ask the primary: it does not answer", "make sure that it is off, then repeat with --force"}, setup: stopped("A")},
		{id: "unplanned-point-missing", host: "B", args: with(unplanned, "--point", "4711", "--force", "--yes"), code: 1, words: []string{`"4711": no such recovery point`, "replicactl point list kept"}},
		{id: "unplanned-two-ends", host: "B", args: with(unplanned, "--commit-within", "1h", "--cancel-within", "1h", "--yes"), code: 2, words: []string{"--commit-within and --cancel-within exclude each other"}},
		{id: "commit-without-failover", host: "B", args: with(on("failover", "commit"), "--yes"), code: 6, words: []string{"there is no failover to commit on this host", "replicactl vm status kept"}},
		{id: "cancel-without-failover", host: "B", args: with(on("failover", "cancel"), "--yes"), code: 6, words: []string{"there is no failover to cancel on this host", "replicactl vm status kept"}},
		{id: "patch-missing", args: []string{"failover", "patch", "export", keptVM, "x", "--out", "/tmp/x"}, code: 1, words: []string{`there is no patch "x" on this host; patches lie on the one that was the old primary`, "replicactl failover patch list kept"}},
		{id: "patch-mount-missing", host: "B", args: []string{"failover", "patch", "mount", keptVM, "x"}, code: 1, words: []string{`there is no patch "x" on this host`, "replicactl failover patch list kept"}},
	}
}
