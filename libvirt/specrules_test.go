package libvirt

import (
	"strings"
	"testing"
)

// TestNoRuleTakesAPath tries on every attribute and text of the rule table
// what must never reach libvirt. The few that take free text are named here.
func TestNoRuleTakesAPath(t *testing.T) {
	free := map[string]bool{
		"sysinfo/bios/entry": true, "sysinfo/system/entry": true, "sysinfo/baseBoard/entry": true, "sysinfo/chassis/entry": true, "sysinfo/oemStrings/entry": true,
		"cpu/model@vendor_id": true, "features/hyperv/vendor_id@value": true,
	}
	// Names that the guest sees and that select nothing on the host but a CPU
	// model or flag: any word will do, for libvirt knows its own list.
	words := map[string]bool{
		"cpu/model": true, "cpu/vendor": true, "cpu/feature@name": true, "devices/channel/target@name": true,
		"sysinfo/bios/entry@name": true, "sysinfo/system/entry@name": true, "sysinfo/baseBoard/entry@name": true, "sysinfo/chassis/entry@name": true,
	}
	evil := []string{"/etc/shadow", "../../x", "/dev/sda", "json:{}", "nbd://x/y", "file", "dev", "pipe", "host", "a b", "-x", "x,y=z", "0.0.0.0", "\x00", "a\nb", strings.Repeat("9", 300), ""}
	harmless := map[string]bool{"features/gic@version=host": true}
	rules := 0
	var walk func(path string, r specRule)
	try := func(where string, v valueRule) {
		rules++
		for _, e := range evil {
			if e == "" && strings.Contains(where, "@") || free[where] && !strings.ContainsAny(e, "\x00\n") && len(e) < 300 {
				continue
			}
			if words[where] && word(64)(e) {
				continue
			}
			if v(e) && e != "" && !harmless[where+"="+e] && !(strings.HasSuffix(where, "/address@port") && e == "0.0.0.0") {
				t.Errorf("%s takes %q", where, e)
			}
		}
	}
	walk = func(path string, r specRule) {
		for k, v := range r.attrs {
			try(path+"@"+k, v)
		}
		if r.text != nil {
			try(path, r.text)
		}
		for k, kr := range r.kids {
			walk(path+"/"+k, kr)
		}
	}
	for k, r := range specRules() {
		walk(k, r)
	}
	for name, attrs := range map[string]map[string]valueRule{"driver": diskDriverRules(), "target": diskAttrRules()} {
		for k, v := range attrs {
			try(name+"@"+k, v)
		}
	}
	for name, v := range map[string]valueRule{"bus": diskBuses(), "nic": nicModels(), "tpm": tpmModels()} {
		try(name, v)
	}
	if rules < 150 {
		t.Fatalf("only %d rules were tried", rules)
	}
}
