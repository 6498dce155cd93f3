package libvirt

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"kvmreplica/internal/boundtest"
)

func readDoc(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// localPolicy has a source, a network and files for everything s asks for. All
// its values are recognisable.
func localPolicy(s Spec) Policy {
	p := Policy{
		Type: "qemu", Emulator: "/local/qemu", Loader: "/local/code.fd", SecureLoader: "/local/code.secure.fd", NVRAM: "/local/vars.fd",
		NVRAMTemplate: "/local/template.fd", ConsoleLog: "/local/console.log", Disks: map[string]PolicySource{}, Networks: map[string]PolicyNetwork{}, AllowKernel: map[string]PolicyKernel{},
	}
	for i, d := range s.Disks {
		switch {
		case d.Device == "cdrom":
		case i%3 == 0:
			p.Disks[d.Target] = PolicySource{NBD: &NBDSource{Socket: "/local/nbd.sock", Export: d.Target, Reconnect: 5}}
		case i%3 == 1:
			p.Disks[d.Target] = PolicySource{File: "/local/disk.raw"}
		default:
			p.Disks[d.Target] = PolicySource{Block: "/local/dev"}
		}
	}
	for _, n := range s.NICs {
		p.Networks[n.Network] = PolicyNetwork{Network: "local-net"}
	}
	if s.Kernel != nil {
		p.AllowKernel[s.Kernel.Label] = PolicyKernel{Kernel: "/local/vmlinuz", Initrd: "/local/initrd"}
	}
	return p
}

func TestADescriptionCarriesWhatTheGuestSees(t *testing.T) {
	for _, name := range []string{"q35-windows", "pc-plain"} {
		s, dropped, err := SpecFromXML(readDoc(t, "testdata/"+name+".xml"))
		if err != nil {
			t.Fatal(err)
		}
		js, err := json.MarshalIndent(s, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseSpec(js)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(s, again); diff != "" {
			t.Fatalf("%s through JSON (-want +got):\n%s", name, diff)
		}
		doc, err := Render(s, localPolicy(s))
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "testdata/"+name+".rendered", string(doc)+"<!-- dropped:\n"+strings.Join(dropped, "\n")+"\n-->\n")
		onlyAllowed(t, doc)
		// What was rendered describes the same machine again.
		s2, dropped2, err := SpecFromXML(doc)
		if err != nil {
			t.Fatal(err)
		}
		if len(dropped2) != 0 {
			t.Errorf("%s: we rendered what we do not read: %v", name, dropped2)
		}
		for i := range s.NICs {
			s2.NICs[i].Network = s.NICs[i].Network // mapped by policy
		}
		if diff := cmp.Diff(s, s2); diff != "" {
			t.Errorf("%s rendered and read again (-want +got):\n%s", name, diff)
		}
	}
}

// golden compares with a file; UPDATE_GOLDEN=1 rewrites it, for review.
func golden(t *testing.T, name, got string) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(string(readDoc(t, name)), got); diff != "" {
		t.Fatalf("%s (-want +got); UPDATE_GOLDEN=1 rewrites it:\n%s", name, diff)
	}
}

// onlyAllowed is written without the rule table: whatever a description said,
// every path in a rendered document is local policy's, every disk is raw, and
// none of the elements that reach outside the guest exists.
func onlyAllowed(t testing.TB, doc []byte) {
	t.Helper()
	root, err := readTree(doc)
	if err != nil {
		t.Fatalf("not well-formed: %v\n%s", err, doc)
	}
	forbidden := map[string]bool{
		"hostdev": true, "filesystem": true, "shmem": true, "lease": true, "seclabel": true, "backingStore": true, "script": true, "downscript": true, "redirdev": true, "smartcard": true,
		"commandline": true, "override": true, "dtb": true, "init": true, "shim": true, "encryption": true, "auth": true, "secret": true, "mirror": true, "launchSecurity": true, "cputune": true,
		"resource": true, "idmap": true, "virtualport": true, "hostname": true, "cookies": true, "reservations": true, "ssl": true, "acpi-table": true, "table": true, "bandwidth": true, "log": true,
	}
	local := map[string]bool{
		"/local/qemu": true, "/local/code.fd": true, "/local/code.secure.fd": true, "/local/vars.fd": true, "/local/template.fd": true, "/local/console.log": true,
		"/local/nbd.sock": true, "/local/disk.raw": true, "/local/dev": true, "/local/vmlinuz": true, "/local/initrd": true, "/dev/urandom": true,
	}
	// Text the guest may choose freely; QEMU hands it to the guest alone.
	free := map[string]bool{"title": true, "cmdline": true, "entry": true, "serial": true, "vendor": true, "product": true, "name": true, "kvmreplica:vm": true}
	var walk func(x *xnode, path string)
	walk = func(x *xnode, path string) {
		path += "/" + x.name
		if x.space != "" || forbidden[x.name] {
			t.Fatalf("%s (%q) is in\n%s", path, x.space, doc)
		}
		if strings.Contains(x.text, "/") && !local[x.text] && !free[x.name] {
			t.Fatalf("%s says %q in\n%s", path, x.text, doc)
		}
		for _, a := range x.attrs {
			freeAttr := a.Name.Local == "vendor_id" || path == "/domain/features/hyperv/vendor_id" || a.Name.Local == "timezone"
			if a.Name.Space != "" || strings.Contains(a.Value, "/") && !local[a.Value] && !freeAttr {
				t.Fatalf("%s@%s says %q in\n%s", path, a.Name.Local, a.Value, doc)
			}
			if a.Name.Local == "listen" || a.Name.Local == "passwd" || x.name == "listen" && a.Name.Local == "address" && a.Value != "127.0.0.1" {
				t.Fatalf("%s@%s says %q", path, a.Name.Local, a.Value)
			}
		}
		if path == "/domain/devices/disk" {
			if d := x.kid("driver"); d == nil || d.attr("type") != "raw" || d.attr("name") != "qemu" {
				t.Fatalf("a disk is not raw in\n%s", doc)
			}
		}
		for _, k := range x.kids {
			walk(k, path)
		}
	}
	walk(root, "")
}

func TestDangerousFeaturesNeverArrive(t *testing.T) {
	base := string(readDoc(t, "testdata/q35-windows.xml"))
	insert := func(at, what string) string { return strings.Replace(base, at, what+at, 1) }
	cases := map[string]string{
		"host device":       insert("</devices>", "<hostdev mode='subsystem' type='pci'><source><address domain='0' bus='1' slot='0' function='0'/></source></hostdev>"),
		"shared memory":     insert("</devices>", "<shmem name='../../etc'/>"),
		"lease":             insert("</devices>", "<lease><key>k</key><target path='/etc/shadow'/></lease>"),
		"serial to a file":  insert("</devices>", "<serial type='file'><source path='/etc/cron.d/x'/><target port='1'/></serial>"),
		"parallel to a dev": insert("</devices>", "<parallel type='dev'><source path='/dev/sda'/></parallel>"),
		"network script":    insert("</devices>", "<interface type='ethernet'><mac address='52:54:00:00:00:01'/><script path='/bin/sh'/></interface>"),
		"nested backing":    strings.Replace(base, "<target dev='vda'", "<backingStore type='file'><format type='qcow2'/><source file='/etc/shadow'/></backingStore><target dev='vda'", 1),
		"qcow2":             strings.Replace(base, "type='raw' cache", "type='qcow2' cache", 1),
		"emulator":          strings.Replace(base, "/usr/bin/qemu-system-x86_64", "/tmp/evil", 1),
		"direct kernel":     strings.Replace(base, "<bootmenu", "<kernel>/etc/shadow</kernel><initrd>/etc/shadow</initrd><cmdline>a</cmdline><dtb>/etc/shadow</dtb><bootmenu", 1),
		"default namespace": strings.Replace(base, "<features>", "<features><a xmlns='http://libvirt.org/schemas/domain/qemu/1.0'/>", 1),
		"prefix trick":      strings.Replace(base, "<devices>", "<devices><q:disk xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/>", 1),
		"xinclude":          insert("</devices>", "<xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='file:///etc/passwd'/>"),
		"second devices":    insert("</domain>", ""),
		"smbios from host":  strings.Replace(base, "mode='sysinfo'", "mode='host'", 1),
		"fw_cfg file":       insert("<features>", "<sysinfo type='fwcfg'><entry name='opt/x' file='/etc/shadow'/></sysinfo>"),
		"time zone":         strings.Replace(base, "offset='localtime'", "offset='timezone' timezone='../../etc/shadow'", 1),
		"odd name":          strings.Replace(base, "<name>win11</name>", "<name><![CDATA[win11]]></name>", 1),
	}
	for name, doc := range cases {
		s, dropped, err := SpecFromXML([]byte(doc))
		if err != nil {
			t.Logf("%s: refused: %v", name, err)
			continue
		}
		out, err := Render(s, localPolicy(s))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		onlyAllowed(t, out)
		if name == "host device" && !strings.Contains(strings.Join(dropped, " "), "devices/hostdev") {
			t.Errorf("%s: not listed in %v", name, dropped)
		}
	}
	for name, doc := range map[string]string{
		"entities":  "<!DOCTYPE d [<!ENTITY a 'b'>]>" + base,
		"billion":   strings.Replace(base, "win11", "&lol;", 1),
		"depth":     strings.Replace(base, "<devices>", strings.Repeat("<a>", 1_000_000), 1),
		"encoding":  `<?xml version="1.0" encoding="UTF-7"?>` + base,
		"utf-16":    "\xff\xfe<\x00d\x00",
		"huge":      "<domain><name>" + strings.Repeat("x", maxDocument) + "</name></domain>",
		"namespace": strings.Replace(base, "<domain ", "<domain xmlns='urn:x' ", 1),
		"path name": strings.Replace(base, "<name>win11", "<name>../win11", 1),
		"memory":    strings.Replace(base, ">8</memory>", ">99999999999999999999</memory>", 1),
	} {
		if _, _, err := SpecFromXML([]byte(doc)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestAPeersDescriptionIsReadStrictly(t *testing.T) {
	s, _, err := SpecFromXML(readDoc(t, "testdata/q35-windows.xml"))
	if err != nil {
		t.Fatal(err)
	}
	good, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(from, to string) string {
		out := strings.Replace(string(good), from, to, 1)
		if out == string(good) {
			t.Fatalf("the test replaces nothing: %q", from)
		}
		return out
	}
	for name, doc := range map[string]string{
		"unknown field":     edit(`"Name":`, `"Emulator":"/tmp/x","Name":`),
		"field twice":       edit(`"Name":`, `"UUID":"x","Name":`),
		"trailing":          string(good) + "{}",
		"huge":              edit(`"win11"`, `"`+strings.Repeat("x", maxSpecBytes)+`"`),
		"name":              edit(`"win11"`, `"../win11"`),
		"name option":       edit(`"win11"`, `"-rf"`),
		"name bidi":         edit(`"win11"`, `"win\u202e11"`),
		"name nul":          edit(`"win11"`, `"win\u000011"`),
		"uuid":              edit(`0b1d7d0a-`, `0B1D7D0A-`),
		"memory":            edit(`"MemoryKiB":8388608`, `"MemoryKiB":-1`),
		"memory overflow":   edit(`"MemoryKiB":8388608`, `"MemoryKiB":9223372036854775808`),
		"cpus":              edit(`"VCPUs":4`, `"VCPUs":100000`),
		"iothreads":         edit(`"IOThreads":2`, `"IOThreads":100000`),
		"iothread":          edit(`"iothread":"2"`, `"iothread":"3"`),
		"machine":           edit(`"pc-q35-7.2"`, `"pc-q35-7.2,firmware=/etc/shadow"`),
		"disk format":       edit(`"Driver":{`, `"Driver":{"type":"qcow2",`),
		"driver name":       edit(`"Driver":{`, `"Driver":{"name":"x",`),
		"bus":               edit(`"Bus":"sata"`, `"Bus":"fdc"`),
		"target":            edit(`"Target":"sda"`, `"Target":"../x"`),
		"target twice":      edit(`"Target":"sda"`, `"Target":"vda"`),
		"mac":               edit(`52:54:00:aa:bb:02`, `53:54:00:aa:bb:02`),
		"nic model":         edit(`"e1000e"`, `"vfio-pci"`),
		"element":           edit(`{"Name":"features"`, `{"Name":"qemu:commandline"`),
		"device":            edit(`"Name":"watchdog"`, `"Name":"hostdev"`),
		"attribute":         edit(`"action":"reset"`, `"action":"dump"`),
		"attribute value":   edit(`"model":"itco"`, `"model":"itco' path='/x"`),
		"text":              edit(`"Text":"ACME"`, `"Text":"A\nB"`),
		"kernel label":      edit(`"Version":1`, `"Version":1,"Kernel":{"Label":"../vmlinuz"}`),
		"version":           edit(`"Version":1`, `"Version":2`),
		"tpm":               edit(`"tpm-crb"`, `"tpm-spapr-proxy"`),
		"address":           edit(`"Address":{"Name":"address"`, `"Address":{"Name":"source"`),
		"address attribute": edit(`"function":"0x0"`, `"uuid":"x"`),
	} {
		if s, err := ParseSpec([]byte(doc)); err == nil {
			t.Errorf("%s: accepted as %+v", name, s)
		}
	}
	deep := strings.Repeat(`{"Name":"a","Kids":[`, 100000) + strings.Repeat(`]}`, 100000)
	if _, err := ParseSpec([]byte(`{"Hardware":[` + deep + `]}`)); err == nil {
		t.Error("deep nesting: accepted")
	}
	if _, err := ParseSpec([]byte(`{"Hardware":[` + deep[:50*20] + strings.Repeat(`]}`, 50) + `]}`)); err == nil || !strings.Contains(err.Error(), "deep") {
		t.Errorf("nesting of 50: %v", err)
	}
}

func TestAGuestWithAHostsKernelNeedsLocalPermission(t *testing.T) {
	doc := strings.Replace(string(readDoc(t, "testdata/pc-plain.xml")), "<boot dev='hd'/>", "<kernel>/boot/vmlinuz-6.1</kernel><initrd>/boot/initrd.gz</initrd><cmdline>console=ttyS0</cmdline>", 1)
	s, _, err := SpecFromXML([]byte(doc))
	if err != nil {
		t.Fatal(err)
	}
	if s.Kernel == nil || s.Kernel.Label != "vmlinuz-6.1+initrd.gz" {
		t.Fatalf("%+v", s.Kernel)
	}
	p := localPolicy(s)
	out, err := Render(s, p)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "<kernel>/local/vmlinuz</kernel>") || strings.Contains(string(out), "/boot/") {
		t.Fatalf("%s", out)
	}
	p.AllowKernel = nil
	if _, err := Render(s, p); err == nil {
		t.Fatal("rendered without permission")
	}
}

func TestRenderAsksPolicyForEveryPlace(t *testing.T) {
	s, _, err := SpecFromXML(readDoc(t, "testdata/q35-windows.xml"))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Policy){
		"no source":       func(p *Policy) { delete(p.Disks, "sda") },
		"relative source": func(p *Policy) { p.Disks["sda"] = PolicySource{File: "x"} },
		"no network":      func(p *Policy) { p.Networks = nil },
		"empty network":   func(p *Policy) { p.Networks["default"] = PolicyNetwork{} },
		"no firmware":     func(p *Policy) { p.SecureLoader = "" },
		"no type":         func(p *Policy) { p.Type = "" },
	} {
		p := localPolicy(s)
		change(&p)
		if _, err := Render(s, p); err == nil {
			t.Errorf("%s: rendered", name)
		}
	}
	p := localPolicy(s)
	p.Name, p.UUID, p.NewMACs, p.ReplaceCPU = "copy", "deadbeef-0000-4000-8000-00000000000c", true, "EPYC"
	p.DefaultNetwork, p.Networks = &PolicyNetwork{Bridge: "isolated", Down: true}, nil
	doc, err := Render(s, p)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"<name>copy</name>", "00000000000c</uuid>", "<source bridge='isolated'/>", "<link state='down'/>", ">EPYC</model>"} {
		if !strings.Contains(string(doc), want) {
			t.Errorf("%q is missing in\n%s", want, doc)
		}
	}
	if strings.Contains(string(doc), "52:54:00") {
		t.Error("the MAC address is still there")
	}
}

// anyNode draws hardware that may or may not be allowed.
func anyNode(t *rapid.T, depth int) SpecNode {
	name := rapid.SampledFrom([]string{
		"cpu", "features", "clock", "devices", "os", "controller", "serial", "console", "channel", "rng", "graphics", "video", "model", "target", "address", "timer", "hyperv", "spinlocks",
		"source", "hostdev", "qemu:commandline", "backend", "a b", "x/><hostdev", "sysinfo", "system", "entry", "memballoon",
	})
	val := rapid.SampledFrom([]string{"on", "yes", "1", "0x0", "virtio", "pci", "unix", "spicevmc", "vnc", "/etc/shadow", "' x='", "<x/>", "&amp;", "\x00", "a\nb", "file", "smbios", "custom", "utc", "qxl", "name"})
	n := SpecNode{Name: name.Draw(t, "name"), Attrs: rapid.MapOfN(rapid.SampledFrom([]string{"type", "model", "state", "name", "mode", "path", "file", "bus", "index", "port", "x' y='"}), val, 0, 3).Draw(t, "attrs")}
	if rapid.IntRange(0, 3).Draw(t, "hasText") == 0 {
		n.Text = val.Draw(t, "text")
	}
	if depth > 0 {
		for range rapid.IntRange(0, 3).Draw(t, "kids") {
			n.Kids = append(n.Kids, anyNode(t, depth-1))
		}
	}
	return n
}

func TestWhateverIsRenderedIsAllowed(t *testing.T) {
	s, _, err := SpecFromXML(readDoc(t, "testdata/q35-windows.xml"))
	if err != nil {
		t.Fatal(err)
	}
	accepted := 0
	rapid.Check(t, func(rt *rapid.T) {
		v := s
		v.Hardware = nil
		for range rapid.IntRange(0, 2).Draw(rt, "n") {
			v.Hardware = append(v.Hardware, anyNode(rt, 3))
		}
		doc, err := Render(v, localPolicy(v))
		if err != nil {
			return
		}
		accepted++
		onlyAllowed(t, doc)
	})
	if accepted == 0 {
		t.Fatal("nothing was ever rendered: the property is empty")
	}
}

func FuzzSpecFromXML(f *testing.F) {
	f.Add(readDoc(f, "testdata/q35-windows.xml"))
	f.Add(readDoc(f, "testdata/pc-plain.xml"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		defer boundtest.Input(t)()
		s, _, err := SpecFromXML(doc)
		if err != nil {
			return
		}
		out, err := Render(s, localPolicy(s))
		if err != nil {
			return // an empty network name, for example
		}
		onlyAllowed(t, out)
	})
}

func FuzzParseSpec(f *testing.F) {
	for _, n := range []string{"q35-windows", "pc-plain"} {
		s, _, err := SpecFromXML(readDoc(f, "testdata/"+n+".xml"))
		if err != nil {
			f.Fatal(err)
		}
		b, err := json.Marshal(s)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		defer boundtest.Input(t)()
		s, err := ParseSpec(doc)
		if err != nil {
			return
		}
		out, err := Render(s, localPolicy(s))
		if err != nil {
			return
		}
		onlyAllowed(t, out)
	})
}

func asJSON(t testing.TB, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
