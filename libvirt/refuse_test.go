package libvirt

import (
	"strings"
	"testing"
)

func TestEverythingUnprovenIsRefusedWithItsReason(t *testing.T) {
	const disk = "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/><source file='/a.raw'/><target dev='vda' bus='virtio'/></disk>"
	sub := func(old, now string) string { return strings.Replace(disk, old, now, 1) }
	scsi := sub("dev='vda' bus='virtio'/>", "dev='vda' bus='scsi'/><address type='drive' controller='0'/>")
	for name, c := range map[string]struct{ disk, code string }{
		"good":                {disk, ""},
		"good, empty chain":   {sub("<target", "<backingStore/><target"), ""},
		"good, iothread":      {sub("cache=", "iothread='1' cache="), ""},
		"good, scsi":          {scsi + "<controller type='scsi' index='0' model='virtio-scsi'/>", ""},
		"good, block":         {sub("type='file'", "type='block'"), RefuseSource}, // the source says file=
		"luks":                {sub("<source file='/a.raw'/>", "<source file='/a.raw'><encryption format='luks'><secret type='passphrase' uuid='x'/></encryption></source>"), RefuseLUKS},
		"old luks":            {sub("<target", "<encryption format='luks'/><target"), RefuseLUKS},
		"copy on read":        {sub("cache=", "copy_on_read='on' cache="), RefuseCopyOnRead},
		"iotune":              {sub("<target", "<iotune><total_iops_sec>5</total_iops_sec></iotune><target"), RefuseThrottle},
		"iothread mapping":    {sub("cache='none'/>", "cache='none'><iothreads><iothread id='1'/></iothreads></driver>"), RefuseIOThreadVQ},
		"backing chain":       {sub("<target", "<backingStore type='file'><format type='raw'/><source file='/b'/><backingStore/></backingStore><target"), RefuseBacking},
		"qcow2":               {sub("raw'", "qcow2'"), RefuseFormat},
		"probing":             {sub("type='raw' ", ""), RefuseFormat},
		"mirror":              {sub("<target", "<mirror type='file' file='/c' job='copy'/><target"), RefuseBlockJob},
		"shareable":           {sub("<target", "<shareable/><target"), RefuseShareable},
		"read-only":           {sub("<target", "<readonly/><target"), RefuseReadOnly},
		"cdrom":               {sub("device='disk'", "device='cdrom'"), RefuseReadOnly},
		"lun":                 {sub("device='disk'", "device='lun'"), RefuseReadOnly},
		"transient":           {sub("<target", "<transient/><target"), RefuseTransient},
		"slice":               {sub("<source file='/a.raw'/>", "<source file='/a.raw'><slices><slice type='storage' offset='0' size='1'/></slices></source>"), RefuseSlices},
		"ide":                 {sub("virtio", "ide"), RefuseBus},
		"scsi, old adapter":   {scsi + "<controller type='scsi' index='0' model='lsilogic'/>", RefuseBus},
		"scsi, with iothread": {scsi + "<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='1'/></controller>", RefuseBus},
		"another nbd":         {sub("<source file='/a.raw'/>", "<source protocol='nbd' name='x'><host transport='unix' socket='/x'/></source>"), RefuseSource},
		"no disk":             {"", RefuseSource},
	} {
		if name == "another nbd" {
			c.disk = strings.Replace(c.disk, "type='file'", "type='network'", 1)
		}
		d, err := ParseDomain([]byte("<domain><devices>" + c.disk + "</devices></domain>"))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		why := Refuse(d, "vda")
		switch {
		case c.code == "" && len(why) > 0:
			t.Errorf("%s: refused: %v", name, why)
		case c.code != "" && (len(why) == 0 || why[0].Code != c.code && why[len(why)-1].Code != c.code):
			t.Errorf("%s: want %s, got %v", name, c.code, why)
		}
	}
	d, err := ParseDomain([]byte("<domain><launchSecurity type='sev'><policy>1</policy><cbitpos>1</cbitpos><reducedPhysBits>1</reducedPhysBits></launchSecurity></domain>"))
	must(t, err)
	if why := Refuse(d); len(why) != 1 || why[0].Code != RefuseDomain {
		t.Errorf("encrypted memory: %v", why)
	}
}

func TestGraphTellsTheThreePositions(t *testing.T) {
	src := NBDSource{Socket: "/s", Export: "e"}
	nbd := Node{Name: "n", Driver: "nbd", File: "nbd+unix:///e?socket=/s"}
	for name, c := range map[string]struct {
		nodes []Node
		edges map[string][]qChild
		want  Position
	}{
		"top":           {[]Node{nbd}, nil, PositionTop},
		"raw above":     {[]Node{{Name: "f", Driver: "raw"}, nbd}, map[string][]qChild{"f": {{"file", "n"}}}, PositionTop},
		"json name":     {[]Node{{Name: "f", Driver: "nbd", File: `json:{"server.path":"/s","export":"e"}`}}, nil, PositionTop},
		"filter":        {[]Node{{Name: "f", Driver: "mirror_top"}, nbd}, map[string][]qChild{"f": {{"backing", "n"}}}, PositionTop},
		"overlay":       {[]Node{{Name: "f", Driver: "qcow2", File: "/o"}, nbd}, map[string][]qChild{"f": {{"backing", "n"}}}, PositionBelowOverlay},
		"two overlays":  {[]Node{{Name: "f", Driver: "qcow2"}, {Name: "g", Driver: "qcow2"}, nbd}, map[string][]qChild{"f": {{"backing", "g"}}, "g": {{"backing", "n"}}}, PositionBelowOverlay},
		"mirror target": {[]Node{{Name: "f", Driver: "mirror_top"}, {Name: "x", Driver: "file"}, nbd}, map[string][]qChild{"f": {{"backing", "x"}, {"target", "n"}}}, PositionAbsent},
		"file":          {[]Node{{Name: "f", Driver: "file", File: "/a"}}, nil, PositionAbsent},
		"other export":  {[]Node{{Name: "f", Driver: "nbd", File: "nbd+unix:///e2?socket=/s"}}, nil, PositionAbsent},
		"other socket":  {[]Node{{Name: "f", Driver: "nbd", File: "nbd+unix:///e?socket=/s2"}}, nil, PositionAbsent},
		"not connected": {[]Node{{Name: "f", Driver: "raw"}, nbd}, nil, PositionAbsent},
		"loop":          {[]Node{{Name: "f", Driver: "raw"}}, map[string][]qChild{"f": {{"file", "f"}}}, PositionAbsent},
	} {
		v := &graphView{nodes: map[string]Node{}, edges: c.edges}
		for _, n := range c.nodes {
			v.nodes[n.Name] = n
		}
		g := DiskGraph{Top: c.nodes[0], Position: PositionAbsent}
		v.locate(&g, src)
		if g.Position != c.want {
			t.Errorf("%s: %s, want %s", name, g.Position, c.want)
		}
	}
}

func TestQMPErrorsInsideAnswersAreErrors(t *testing.T) {
	for _, ans := range []string{`{"error":{"class":"GenericError","desc":"no"}}`, `{}`, `[]`, `{"return":"x"}`, ``} {
		var out map[string]any
		if err := decodeReply("c", []byte(ans), &out); err == nil {
			t.Errorf("%q: taken for success", ans)
		}
	}
	if err := decodeReply("c", []byte(`{"return":{},"id":"libvirt-1"}`), nil); err != nil {
		t.Error(err)
	}
}
