package libvirt

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// specRule says what may stand in one element of a description: its
// attributes with their values, its text, and its children. Whatever has no
// rule does not exist. This table is used three times: to read our own XML, to
// check a peer's description, and, by construction, for what Render writes.
type specRule struct {
	attrs map[string]valueRule
	text  valueRule // nil: no text
	kids  map[string]specRule
}

// valueRule accepts or refuses one value. An accepted value is short, printable
// and means the same on every host: no value of any rule can be a path, a
// program, an address to listen on or a reference to a host's device.
type valueRule func(string) bool

func enum(vals ...string) valueRule {
	return func(s string) bool { return slices.Contains(vals, s) }
}

func upTo(limit uint64) valueRule {
	return func(s string) bool {
		n, err := strconv.ParseUint(s, 10, 64)
		return err == nil && n <= limit && (s == "0" || s[0] != '0')
	}
}

func hexUpTo(limit uint64) valueRule {
	return func(s string) bool {
		n, err := strconv.ParseUint(s, 0, 64)
		return err == nil && n <= limit && len(s) <= 18
	}
}

// word: letters, digits and a few marks; never a slash, a blank or a colon.
func word(limit int) valueRule {
	return func(s string) bool {
		return len(s) <= limit && s != "" && s[0] != '-' && s[0] != '.' && only(s, "._+-")
	}
}

func only(s, marks string) bool {
	for _, r := range s {
		if r > 0x7f || !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune(marks, r) {
			return false
		}
	}
	return true
}

// plain: printable text without format characters.
func plain(limit int) valueRule {
	return func(s string) bool {
		if len(s) > limit || !printable(s) {
			return false
		}
		for _, r := range s {
			if !unicode.IsPrint(r) || unicode.Is(unicode.Cf, r) {
				return false
			}
		}
		return true
	}
}

func matching(limit int, marks string) valueRule {
	return func(s string) bool { return s != "" && len(s) <= limit && only(s, marks) }
}

// digitsAnd: digits and a few marks, a digit first.
func digitsAnd(limit int, marks string) valueRule {
	return func(s string) bool {
		return s != "" && len(s) <= limit && s[0] >= '0' && s[0] <= '9' && strings.Trim(s, "0123456789"+marks) == ""
	}
}

func signed(s string) bool {
	n, err := strconv.ParseInt(s, 10, 64)
	return err == nil && n > -1<<40 && n < 1<<40
}

func onOff() valueRule { return enum("on", "off") }
func yesNo() valueRule { return enum("yes", "no") }

type (
	av = map[string]valueRule
	kv = map[string]specRule
)

func addressRule() specRule {
	return specRule{attrs: av{
		"type":   enum("pci", "drive", "virtio-serial", "ccid", "usb", "isa", "virtio-mmio", "spapr-vio"),
		"domain": hexUpTo(0xffff), "bus": hexUpTo(0xff), "slot": hexUpTo(0x1f), "function": hexUpTo(7), "multifunction": onOff(),
		"controller": upTo(255), "target": upTo(255), "unit": upTo(16383),
		"port":   func(s string) bool { return hexUpTo(0xffff)(s) || digitsAnd(31, ".")(s) && strings.Count(s, ".") < 8 },
		"iobase": hexUpTo(0xffff), "irq": hexUpTo(255), "reg": hexUpTo(1 << 40),
	}}
}

// specRules are the elements of Spec.Hardware, as children of <domain>.
func specRules() map[string]specRule {
	end := enum("destroy", "restart", "preserve", "rename-restart")
	return map[string]specRule{
		"on_poweroff": {text: end},
		"on_reboot":   {text: end},
		"on_crash":    {text: enum("destroy", "restart", "preserve", "rename-restart")},
		"os": {kids: kv{
			"bootmenu": {attrs: av{"enable": yesNo(), "timeout": upTo(65535)}},
			"bios":     {attrs: av{"useserial": yesNo(), "rebootTimeout": upTo(65535)}},
			"smbios":   {attrs: av{"mode": enum("emulate", "sysinfo")}},
		}},
		"pm": {kids: kv{
			"suspend-to-mem": {attrs: av{"enabled": yesNo()}}, "suspend-to-disk": {attrs: av{"enabled": yesNo()}},
		}},
		"sysinfo":  sysinfoRule(),
		"cpu":      cpuRule(),
		"features": featuresRule(),
		"clock":    clockRule(),
		"devices":  {kids: deviceRules()},
	}
}

func sysinfoRule() specRule {
	entry := specRule{attrs: av{"name": word(32)}, text: plain(256)}
	block := specRule{kids: kv{"entry": entry}}
	return specRule{attrs: av{"type": enum("smbios")}, kids: kv{
		"bios": block, "system": block, "baseBoard": block, "chassis": block,
		"oemStrings": {kids: kv{"entry": {text: plain(256)}}},
	}}
}

func cpuRule() specRule {
	return specRule{
		attrs: av{
			"mode":  enum("custom", "host-model", "host-passthrough", "maximum"),
			"match": enum("exact", "minimum", "strict"), "check": enum("none", "partial", "full"), "migratable": onOff(),
		},
		kids: kv{
			"model":  {attrs: av{"fallback": enum("allow", "forbid"), "vendor_id": plain(12)}, text: word(64)},
			"vendor": {text: word(32)},
			"topology": {attrs: av{
				"sockets": upTo(maxVCPUs), "dies": upTo(maxVCPUs), "clusters": upTo(maxVCPUs), "cores": upTo(maxVCPUs), "threads": upTo(maxVCPUs),
			}},
			"cache":       {attrs: av{"level": upTo(3), "mode": enum("emulate", "passthrough", "disable")}},
			"maxphysaddr": {attrs: av{"mode": enum("emulate", "passthrough"), "bits": upTo(64), "limit": upTo(64)}},
			"feature":     {attrs: av{"policy": enum("force", "require", "optional", "disable", "forbid"), "name": word(64)}},
			"numa": {kids: kv{"cell": {
				attrs: av{"id": upTo(255), "cpus": digitsAnd(256, ",-^"), "memory": upTo(maxMemoryKiB), "unit": enum("KiB")},
				kids:  kv{"distances": {kids: kv{"sibling": {attrs: av{"id": upTo(255), "value": upTo(255)}}}}},
			}}},
		},
	}
}

func featuresRule() specRule {
	state := specRule{attrs: av{"state": onOff()}}
	hyperv := kv{}
	for _, n := range []string{
		"relaxed", "vapic", "vpindex", "runtime", "synic", "reset", "frequencies", "reenlightenment", "ipi", "evmcs", "avic", "emsr_bitmap", "xmm_input",
	} {
		hyperv[n] = state
	}
	hyperv["spinlocks"] = specRule{attrs: av{"state": onOff(), "retries": upTo(1<<32 - 1)}}
	hyperv["stimer"] = specRule{attrs: av{"state": onOff()}, kids: kv{"direct": state}}
	hyperv["tlbflush"] = specRule{attrs: av{"state": onOff()}, kids: kv{"direct": state, "extended": state}}
	hyperv["vendor_id"] = specRule{attrs: av{"state": onOff(), "value": plain(12)}}
	return specRule{kids: kv{
		"acpi": {}, "pae": {}, "viridian": {}, "privnet": {},
		"apic": {attrs: av{"eoi": onOff()}}, "hap": state, "pmu": state, "vmport": state, "vmcoreinfo": state, "ps2": state, "pvspinlock": state,
		"hyperv": {attrs: av{"mode": enum("custom")}, kids: hyperv},
		"kvm":    {kids: kv{"hidden": state, "hint-dedicated": state, "poll-control": state, "pv-ipi": state}},
		"smm":    {attrs: av{"state": onOff()}, kids: kv{"tseg": {attrs: av{"unit": enum("MiB", "KiB")}, text: upTo(1 << 20)}}},
		"ioapic": {attrs: av{"driver": enum("kvm", "qemu")}},
		"gic":    {attrs: av{"version": enum("2", "3", "host")}},
	}}
}

func clockRule() specRule {
	return specRule{
		attrs: av{
			"offset":     enum("utc", "localtime", "timezone", "variable", "absolute"),
			"basis":      enum("utc", "localtime"),
			"adjustment": func(s string) bool { return s == "reset" || signed(s) },
			"timezone":   func(s string) bool { return matching(64, "/_+-")(s) && s[0] >= 'A' && s[0] <= 'Z' },
			"start":      signed,
		},
		kids: kv{"timer": {
			attrs: av{
				"name":  enum("platform", "pit", "rtc", "hpet", "tsc", "kvmclock", "hypervclock", "armvtimer"),
				"track": enum("boot", "guest", "wall", "realtime"), "tickpolicy": enum("delay", "catchup", "merge", "discard"),
				"frequency": upTo(1 << 40), "mode": enum("auto", "native", "emulate", "paravirt", "smpsafe"), "present": yesNo(),
			},
			kids: kv{"catchup": {attrs: av{"threshold": upTo(1 << 31), "slew": upTo(1 << 31), "limit": upTo(1 << 31)}}},
		}},
	}
}

// validName refuses what could be mistaken for a path, an option or another
// name.
func validName(s string) error {
	switch {
	case s == "" || len(s) > 128:
		return fmt.Errorf("name %q must have 1 to 128 bytes", s)
	case !plain(128)(s):
		return fmt.Errorf("name %q holds characters that do not print", s)
	case strings.ContainsAny(s, "/\\"):
		return fmt.Errorf("name %q holds a slash", s)
	case s[0] == '.' || s[0] == '-' || s[0] == ' ' || strings.HasSuffix(s, " ") || strings.HasSuffix(s, "."):
		return fmt.Errorf("name %q begins or ends with a character that is not allowed there", s)
	}
	return nil
}
