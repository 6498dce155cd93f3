package kvm_test

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"kvmreplica/integration/estate"
	"kvmreplica/replicad/status"
)

const policyTables = `[[policy]]
name = "web"
match = ["web-*"]
exclude = ["*-scratch"]
to = "kvm-b"
every = "1s"
app_every = "0s"
points = "2"
bandwidth = "100MiB/s"
shutdown_time = "7m"
on_silent_peer = "hold"
alarm = true
alarm_after = "1s"
[[policy]]
name = "gold"
tags = ["gold"]
to = "kvm-b"
every = "5s"
`

// domain is one line of policy list.
func (w *world) domain(name string) status.Domain {
	w.t.Helper()
	p := decode[status.Policies](w.t, w.ctl("A", "--json", "policy", "list"))
	i := slices.IndexFunc(p.Domains, func(d status.Domain) bool { return d.Name == name })
	if i < 0 {
		w.t.Fatalf("%s is not listed: %+v", name, p.Domains)
	}
	return p.Domains[i]
}

// alarms are the names of the domains that health complains of as not protected.
func (w *world) alarms() string {
	out, _ := w.Ctl(w.step(), "A", "--json", "health") // exit 4 with any
	var vms []status.VM
	w.must(json.NewDecoder(strings.NewReader(out)).Decode(&vms)) // what follows is the error's
	var names []string
	for _, v := range vms {
		for _, c := range v.Conditions {
			if c.Code == "not-protected" {
				names = append(names, v.Name)
			}
		}
	}
	return strings.Join(names, " ")
}

// Domains of all kinds under policies: one off, one that runs, one that is
// excluded, one with a tag, one that none fits. What should be protected and is
// not is an alarm, the plan is shown, apply does it without a stop of the guest,
// drift is seen and mended, and nothing is done twice or on its own.
func TestPoliciesListApplyMendAndAlarm(t *testing.T) {
	w := up(t, estate.Options{})
	running := w.guest("web-on", 61, 1, "")
	w.start(running)
	for i, name := range []string{"web-off", "web-scratch", "tagged", "other"} {
		w.must(w.Define(w.step(), "A", w.smallGuest(name, 70+i, 4<<20)))
	}
	w.virsh("A", "metadata", "tagged", "--uri", "urn:kvmreplica:tags:1", "--key", "kvmreplica-tags", "--set", "<tags><tag>gold</tag></tags>", "--config")
	if out := w.ctl("A", "vm", "list", "--all"); !strings.Contains(out, "Not protected: 5") || w.alarms() != "" {
		t.Fatalf("without a policy: %s", out)
	}
	file := w.Lab.Host("A").Path("/etc/replicad/replicad.toml")
	conf, err := os.ReadFile(file)
	w.must(err)
	w.must(os.WriteFile(file, append(append(slices.Clone(conf), '\n'), policyTables...), 0o644))
	if out := w.ctl("A", "reload"); !strings.Contains(out, "policy") {
		t.Fatalf("the reload says %q", out)
	}
	for name, want := range map[string]string{"web-on": "web", "web-off": "web", "web-scratch": "", "tagged": "gold", "other": ""} {
		if d := w.domain(name); d.Policy != want || d.Role != status.None || d.Bytes <= 0 {
			t.Errorf("%s: %+v", name, d)
		}
	}
	w.eventually("the alarm for both", func() bool { return w.alarms() == "web-off web-on" })

	plan := w.ctl("A", "policy", "apply", "--dry-run")
	for _, want := range []string{"web-on (policy web)", "web-off (policy web)", "tagged (policy gold)", "put the exports under the running guest", "Policy web: to kvm-b, every 1s."} {
		if !strings.Contains(plan, want) {
			t.Errorf("the plan does not say %q:\n%s", want, plan)
		}
	}
	if strings.Contains(plan, "scratch") || w.domain("web-on").Role != status.None {
		t.Fatalf("a dry run: %s", plan)
	}
	// One cannot be done and does not stop the others.
	image := w.Lab.Host("A").Path("/var/lib/libvirt/images/web-off.raw")
	w.must(os.Rename(image, image+".away"))
	out := w.refused("A", 3, "policy", "apply", "--yes")
	if !strings.Contains(out, "1 of 3 VMs") || w.domain("web-off").Role != status.None {
		t.Errorf("partly done: %s", out)
	}
	w.replicating("A", "web-on")
	w.noErrors("A", running, false)
	w.eventually("the alarm for the other one", func() bool { return w.alarms() == "web-off" })
	w.must(os.Rename(image+".away", image))
	if out := w.ctl("A", "vm", "enable", "web-off", "--every", "2s", "--yes"); !strings.Contains(out, "Policy web: to kvm-b, every 2s.") {
		t.Errorf("enable by the policy: %s", out)
	}
	if a := w.alarms(); a != "" {
		t.Errorf("alarms when all are protected: %s", a)
	}
	v := w.status("A", "web-on")
	if v.Interval.String() != "1s" || v.Shutdown.String() != "7m0s" || v.OnSilent != "hold" || v.Rate != 100<<20 {
		t.Errorf("the settings: %+v", v)
	}
	if d := w.domain("web-off"); len(d.Drift) != 1 || d.Drift[0] != "every 2s -> 1s" {
		t.Errorf("what was typed instead is not seen to differ: %+v", d)
	}
	w.ctl("A", "vm", "set", "web-on", "--on-silent-peer", "start")
	w.ctl("A", "vm", "limit", "web-on", "0")
	if d := w.domain("web-on"); len(d.Drift) != 2 {
		t.Errorf("drift: %+v", d)
	}
	w.ctl("A", "policy", "apply", "--yes")
	for _, name := range []string{"web-on", "web-off", "tagged"} {
		if d := w.domain(name); len(d.Drift) != 0 || d.Role != status.Primary || len(d.Fixed) != 0 {
			t.Errorf("after apply: %+v", d)
		}
	}
	if out := w.ctl("A", "policy", "apply", "--yes"); !strings.Contains(out, "is as it says") {
		t.Errorf("applied again: %s", out)
	}
	w.ctl("B", "point", "keep", "web-off", "3")
	if d := w.domain("web-off"); len(d.Drift) != 0 || len(d.Fixed) != 1 || d.Fixed[0] != "points 3 -> 2 (on kvm-b: replicactl point keep web-off 2)" {
		t.Errorf("other points are kept: %+v", d)
	}
	if out := w.ctl("A", "policy", "apply", "--yes"); strings.Contains(out, "is as it says") || !strings.Contains(out, "web-off (policy web) differs and cannot be set") {
		t.Errorf("applied to what cannot be set: %s", out)
	}
	if d := w.domain("web-scratch"); d.Role != status.None {
		t.Errorf("the excluded one: %+v", d)
	}
	w.replicating("A", "web-off")
}
