package libvirt

import (
	"fmt"
	"strconv"
	"strings"
)

func (r *specReader) readDisk(x *xnode) {
	d := SpecDisk{Device: x.attr("device"), Serial: x.kidText("serial"), WWN: x.kidText("wwn"), Vendor: x.kidText("vendor"), Product: x.kidText("product")}
	if d.Device == "disk" {
		d.Device = ""
	}
	t := x.kid("target")
	if t == nil {
		return
	}
	d.Target, d.Bus = t.attr("dev"), t.attr("bus")
	where := "disk " + clip(d.Target)
	if d.Device != "" && d.Device != "cdrom" || !diskBuses()(d.Bus) || !validTarget(d.Target) {
		r.drop(fmt.Sprintf("%s (%s on %s)", where, clip(d.Device), clip(d.Bus)))
		return
	}
	if d.Device == "cdrom" && x.kid("source") != nil {
		r.drop(where + ": the medium in the drive")
	}
	d.ReadOnly = x.kid("readonly") != nil && d.Device != "cdrom"
	d.BootOrder = bootOrder(x)
	r.keepInto(&d.Attrs, where, t, diskAttrRules(), "dev", "bus")
	if b := x.kid("blockio"); b != nil {
		r.keepInto(&d.Attrs, where, b, diskAttrRules())
	}
	if v := x.kid("driver"); v != nil {
		r.keepInto(&d.Driver, where, v, diskDriverRules(), "name", "type", "error_policy", "rerror_policy", "io", "ioeventfd")
	}
	d.Address = r.address(where, x)
	for _, k := range x.kids {
		switch k.name {
		case "target", "driver", "source", "serial", "wwn", "vendor", "product", "boot", "address", "alias", "readonly", "blockio", "backingStore", "geometry":
		default:
			r.drop(where + "/" + clip(k.name))
		}
	}
	r.spec.Disks = append(r.spec.Disks, d)
}

// keepInto copies allowed attributes; those of ignore are not worth a word.
func (r *specReader) keepInto(dst *map[string]string, where string, x *xnode, rules map[string]valueRule, ignore ...string) {
	for _, a := range x.attrs {
		if ok := rules[a.Name.Local]; a.Name.Space == "" && ok != nil && ok(a.Value) {
			if *dst == nil {
				*dst = map[string]string{}
			}
			(*dst)[a.Name.Local] = a.Value
			continue
		}
		if !strings.Contains(" "+strings.Join(ignore, " ")+" ", " "+a.Name.Local+" ") {
			r.drop(where + "@" + clip(a.Name.Local))
		}
	}
}

func bootOrder(x *xnode) int {
	if b := x.kid("boot"); b != nil {
		n, _ := strconv.Atoi(b.attr("order"))
		return n
	}
	return 0
}

// address reads a device's own address.
func (r *specReader) address(where string, x *xnode) *SpecNode {
	a := x.kid("address")
	if a == nil {
		return nil
	}
	if !addressRule().attrs["type"](a.attr("type")) {
		r.drop(fmt.Sprintf("%s: address of type %q", where, clip(a.attr("type"))))
		return nil
	}
	n, ok := r.keep(where+"/address", a, addressRule())
	if !ok {
		return nil
	}
	return &n
}

func (r *specReader) readNIC(x *xnode) {
	n := SpecNIC{BootOrder: bootOrder(x)}
	if m := x.kid("mac"); m != nil {
		n.MAC = strings.ToLower(m.attr("address"))
	}
	where := "interface " + clip(n.MAC)
	if m := x.kid("model"); m != nil {
		n.Model = m.attr("type")
	}
	n.Network = logicalNetwork(x)
	if n.Network == "" || n.Model != "" && !nicModels()(n.Model) || !validMAC(n.MAC) || !plain(128)(n.Network) {
		r.drop(fmt.Sprintf("%s (type %s, model %s)", where, clip(x.attr("type")), clip(n.Model)))
		return
	}
	if m := x.kid("mtu"); m != nil {
		n.MTU, _ = strconv.Atoi(m.attr("size"))
	}
	if l := x.kid("link"); l != nil {
		n.LinkDown = l.attr("state") == "down"
	}
	if d := x.kid("driver"); d != nil {
		n.Queues, _ = strconv.Atoi(d.attr("queues"))
		n.RxSize, _ = strconv.Atoi(d.attr("rx_queue_size"))
		n.TxSize, _ = strconv.Atoi(d.attr("tx_queue_size"))
	}
	n.Address = r.address(where, x)
	for _, k := range x.kids {
		switch k.name {
		case "mac", "source", "model", "boot", "mtu", "link", "driver", "address", "alias", "target", "backend":
		default:
			r.drop(where + "/" + clip(k.name))
		}
	}
	r.spec.NICs = append(r.spec.NICs, n)
}

// logicalNetwork is the name another host's policy maps: a libvirt network as
// it is, others with their kind in front.
func logicalNetwork(x *xnode) string {
	src := x.kid("source")
	get := func(name string) string {
		if src == nil {
			return ""
		}
		return src.attr(name)
	}
	switch x.attr("type") {
	case "network":
		return get("network")
	case "bridge":
		return "bridge:" + get("bridge")
	case "direct":
		return "direct:" + get("dev")
	case "user":
		return "user"
	}
	return ""
}

func (r *specReader) readTPM(x *xnode) {
	t := &SpecTPM{Model: x.attr("model"), Version: "2.0"}
	b := x.kid("backend")
	switch {
	case b == nil || b.attr("type") != "emulator":
		r.drop("tpm (not emulated: it is this host's own)")
		return
	case !tpmModels()(t.Model):
		r.drop("tpm of model " + clip(t.Model))
		return
	}
	if v := b.attr("version"); v != "" {
		t.Version = v
	}
	if b.kid("encryption") != nil {
		r.drop("tpm/encryption (its state needs a secret of this host)")
	}
	r.spec.TPM = t
}
