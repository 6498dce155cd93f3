package libvirt

// deviceRules are the elements of <devices> that are copied as they are.
// Disks, interfaces and TPMs have fields of their own in Spec.
func deviceRules() map[string]specRule {
	addr := addressRule()
	virtio := specRule{attrs: av{"iommu": onOff(), "ats": onOff(), "packed": onOff(), "page_per_vq": onOff()}}
	return map[string]specRule{
		"controller": controllerRule(),
		"input": {
			attrs: av{"type": enum("mouse", "tablet", "keyboard"), "bus": enum("ps2", "usb", "virtio"), "model": enum("virtio", "virtio-transitional", "virtio-non-transitional")},
			kids:  kv{"address": addr, "driver": virtio},
		},
		"hub":      {attrs: av{"type": enum("usb")}, kids: kv{"address": addr}},
		"graphics": {attrs: av{"type": enum("vnc", "spice")}},
		"video": {kids: kv{"address": addr, "model": {
			attrs: av{
				"type": enum("virtio", "vga", "cirrus", "qxl", "bochs", "none", "ramfb", "vmvga"),
				"ram":  upTo(1 << 22), "vram": upTo(1 << 22), "vram64": upTo(1 << 22), "vgamem": upTo(1 << 22), "heads": upTo(16), "primary": yesNo(),
			},
			kids: kv{"resolution": {attrs: av{"x": upTo(16384), "y": upTo(16384)}}},
		}}},
		"sound": {
			attrs: av{"model": enum("ich6", "ich7", "ich9", "ac97", "es1370", "sb16", "pcspk", "usb")},
			kids:  kv{"address": addr, "codec": {attrs: av{"type": enum("duplex", "micro", "output")}}},
		},
		"serial": {kids: kv{"address": addr, "target": {
			attrs: av{"type": enum("isa-serial", "usb-serial", "pci-serial", "system-serial", "spapr-vio-serial"), "port": upTo(16)},
			kids:  kv{"model": {attrs: av{"name": enum("isa-serial", "usb-serial", "pci-serial", "pl011", "16550a", "spapr-vty")}}},
		}}},
		"console": {kids: kv{"address": addr, "target": {attrs: av{"type": enum("virtio", "serial"), "port": upTo(64)}}}},
		"channel": {
			attrs: av{"type": enum("unix", "spicevmc")},
			kids:  kv{"address": addr, "target": {attrs: av{"type": enum("virtio"), "name": word(64)}}},
		},
		"rng": {
			attrs: av{"model": enum("virtio", "virtio-transitional", "virtio-non-transitional")},
			kids:  kv{"address": addr, "driver": virtio, "rate": {attrs: av{"bytes": upTo(1 << 31), "period": upTo(1 << 31)}}},
		},
		"memballoon": {
			attrs: av{"model": enum("virtio", "none", "virtio-transitional", "virtio-non-transitional"), "autodeflate": onOff(), "freePageReporting": onOff()},
			kids:  kv{"address": addr, "driver": virtio, "stats": {attrs: av{"period": upTo(86400)}}},
		},
		"watchdog": {
			attrs: av{"model": enum("i6300esb", "ib700", "itco", "diag288"), "action": enum("reset", "shutdown", "poweroff", "pause", "none", "inject-nmi")},
			kids:  kv{"address": addr},
		},
		"panic": {attrs: av{"model": enum("isa", "pseries", "hyperv", "s390", "pvpanic")}, kids: kv{"address": addr}},
		"iommu": {
			attrs: av{"model": enum("intel", "virtio", "smmuv3")},
			kids: kv{"address": addr, "driver": {attrs: av{
				"intremap": onOff(), "caching_mode": onOff(), "eim": onOff(), "iotlb": onOff(), "aw_bits": upTo(64),
			}}},
		},
		"vsock": {
			attrs: av{"model": enum("virtio", "virtio-transitional", "virtio-non-transitional")},
			kids:  kv{"address": addr, "cid": {attrs: av{"auto": enum("yes")}}},
		},
	}
}

func controllerRule() specRule {
	return specRule{
		attrs: av{
			"type": enum("ide", "fdc", "scsi", "sata", "usb", "ccid", "virtio-serial", "pci"), "index": upTo(255),
			"model": enum(
				// pci
				"pci-root", "pcie-root", "pci-bridge", "dmi-to-pci-bridge", "pcie-root-port", "pcie-switch-upstream-port",
				"pcie-switch-downstream-port", "pci-expander-bus", "pcie-expander-bus", "pcie-to-pci-bridge",
				// scsi
				"auto", "buslogic", "lsilogic", "lsisas1068", "lsisas1078", "virtio-scsi", "vmpvscsi", "ibmvscsi", "virtio-transitional",
				"virtio-non-transitional", "ncr53c90", "dc390", "am53c974",
				// usb
				"none", "piix3-uhci", "piix4-uhci", "ehci", "ich9-ehci1", "ich9-uhci1", "ich9-uhci2", "ich9-uhci3", "vt82c686b-uhci", "pci-ohci",
				"nec-xhci", "qemu-xhci", "qusb1", "qusb2", "virtio",
				// ide
				"piix3", "piix4", "ich6",
			),
			"ports": upTo(31), "vectors": upTo(255),
		},
		kids: kv{
			"address": addressRule(),
			"model": {attrs: av{"name": enum("none", "pcie-root-port", "ioh3420", "pci-bridge", "i82801b11-bridge", "x3130-upstream",
				"xio3130-downstream", "pxb", "pxb-pcie", "pcie-pci-bridge")}},
			"master": {attrs: av{"startport": upTo(16)}},
			"target": {
				attrs: av{"chassisNr": upTo(255), "chassis": upTo(255), "port": hexUpTo(255), "busNr": upTo(255), "index": upTo(255), "hotplug": onOff()},
				kids:  kv{"node": {text: upTo(255)}},
			},
			"pcihole64": {attrs: av{"unit": enum("KiB")}, text: upTo(1 << 40)},
			"driver": {attrs: av{
				"queues": upTo(256), "cmd_per_lun": upTo(1 << 16), "max_sectors": upTo(1 << 20), "event_idx": onOff(), "iothread": upTo(maxIOThreads),
				"iommu": onOff(), "ats": onOff(), "packed": onOff(), "page_per_vq": onOff(),
			}},
		},
	}
}

// diskDriverRules are the attributes of a disk's <driver> that are kept.
func diskDriverRules() map[string]valueRule {
	return av{
		"cache":   enum("default", "none", "writethrough", "writeback", "directsync", "unsafe"),
		"discard": enum("ignore", "unmap"), "detect_zeroes": enum("off", "on", "unmap"),
		"iothread": upTo(maxIOThreads), "queues": upTo(256), "queue_size": upTo(32768),
		"event_idx": onOff(), "iommu": onOff(), "ats": onOff(), "packed": onOff(), "page_per_vq": onOff(),
	}
}

// diskAttrRules are those of <target> and <blockio>.
func diskAttrRules() map[string]valueRule {
	return av{
		"removable": onOff(), "rotation_rate": upTo(65534), "tray": enum("open", "closed"),
		"logical_block_size": upTo(1 << 20), "physical_block_size": upTo(1 << 20), "discard_granularity": upTo(1 << 31),
	}
}

func diskBuses() valueRule { return enum("virtio", "scsi", "sata", "ide", "usb") }

func nicModels() valueRule {
	return enum("virtio", "virtio-transitional", "virtio-non-transitional", "e1000", "e1000e", "igb", "rtl8139", "vmxnet3", "pcnet", "ne2k_pci", "i82551", "i82557b", "i82559er", "usb-net")
}

func tpmModels() valueRule { return enum("tpm-tis", "tpm-crb", "tpm-spapr", "tpm-tis-device") }
