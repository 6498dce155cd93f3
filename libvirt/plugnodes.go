package libvirt

// The options of the nodes we add. Cache mode, discard and zero detection are
// the domain's own, so that the guest's disk behaves as before.

// nbdNode are the options of a node on the export. upper says that the guest's
// device or nothing stands on it, so it does the zero detection.
func (p *plug) nbdNode(name string, upper bool) map[string]any {
	o := map[string]any{
		"driver": "nbd", "node-name": name, "export": p.req.Source.Export,
		"server":          map[string]any{"type": "unix", "path": p.req.Source.Socket},
		"reconnect-delay": ReconnectDelay, "read-only": false,
	}
	p.common(o, upper)
	return o
}

// imageNode are the options of libvirt's storage node on the image itself.
func (p *plug) imageNode(name string, upper bool) map[string]any {
	k := p.req.Disk
	o := map[string]any{"driver": "file", "node-name": name, "filename": k.Path, "auto-read-only": true}
	if k.Kind == SourceBlock {
		o["driver"] = "host_device"
	}
	if k.IO != "" {
		o["aio"] = k.IO
	}
	p.common(o, upper)
	if !upper {
		o["discard"] = "unmap" // as libvirt does below a format node
	} else {
		o["read-only"] = false
		delete(o, "auto-read-only")
	}
	return o
}

// rawNode are the options of libvirt's format node.
func (p *plug) rawNode() map[string]any {
	o := map[string]any{"driver": "raw", "node-name": p.names.format(), "file": p.names.storage(), "read-only": false}
	p.common(o, true)
	return o
}

func (p *plug) common(o map[string]any, upper bool) {
	k := p.req.Disk
	direct, noFlush := cacheMode(k.Cache)
	if k.Cache != "" && k.Cache != "default" {
		o["cache"] = map[string]any{"direct": direct, "no-flush": noFlush}
	}
	if k.Discard != "" {
		o["discard"] = k.Discard
	}
	if upper && k.DetectZeroes != "" {
		o["detect-zeroes"] = k.DetectZeroes
		if k.DetectZeroes == "unmap" && k.Discard != "unmap" {
			o["detect-zeroes"] = "on" // as libvirt does
		}
	}
}

// cacheMode translates libvirt's cache mode; writethrough is a property of the
// device and stays with it.
func cacheMode(mode string) (direct, noFlush bool) {
	return mode == "none" || mode == "directsync", mode == "unsafe"
}
