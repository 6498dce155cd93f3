package libvirt

import (
	"context"
	"encoding/xml"
	"fmt"
	"strconv"
	"strings"

	lv "github.com/digitalocean/go-libvirt"
)

// HostInfo describes the hypervisor host.
type HostInfo struct {
	UUID     string // libvirt's host UUID
	Hostname string
	Libvirt  Version
	QEMU     Version
	Arch     string
	CPUModel string // libvirt's name of the host CPU
	CPUs     int
	MemoryKB int64
	// SecurityModels are the drivers in force: "dac", "apparmor", "selinux".
	SecurityModels []string
	labels         map[string]string // a domain type's "+uid:+gid"
}

// QEMUOwner is the user and group that QEMU runs as for domains of a type
// ("kvm", "qemu"), unless a domain says otherwise; ok is false when libvirt does
// not say.
func (i HostInfo) QEMUOwner(domainType string) (uid, gid int, ok bool) {
	u, g, cut := strings.Cut(i.labels[domainType], ":")
	uid, err1 := strconv.Atoi(strings.TrimPrefix(u, "+"))
	gid, err2 := strconv.Atoi(strings.TrimPrefix(g, "+"))
	return uid, gid, cut && err1 == nil && err2 == nil && uid >= 0 && gid >= 0
}

// Version is a version number libvirt's way: major*1000000+minor*1000+micro.
type Version uint64

// String is "9.0.0".
func (v Version) String() string {
	return fmt.Sprintf("%d.%d.%d", v/1000000, v/1000%1000, v%1000)
}

// capabilities is the part of libvirt's capabilities document we read.
type capabilities struct {
	Host struct {
		UUID string `xml:"uuid"`
		CPU  struct {
			Arch  string `xml:"arch"`
			Model string `xml:"model"`
		} `xml:"cpu"`
		Secmodels []struct {
			Model  string `xml:"model"`
			Labels []struct {
				Type string `xml:"type,attr"`
				Text string `xml:",chardata"`
			} `xml:"baselabel"`
		} `xml:"secmodel"`
	} `xml:"host"`
}

// Info reads who and what the host is.
func (h *Host) Info(ctx context.Context) (HostInfo, error) {
	return call(ctx, h, "read host information", func(l *lv.Libvirt) (HostInfo, error) {
		var i HostInfo
		var err error
		if i.Hostname, err = l.ConnectGetHostname(); err != nil {
			return i, err
		}
		v, err := l.ConnectGetLibVersion()
		if err != nil {
			return i, err
		}
		i.Libvirt = Version(v)
		if v, err = l.ConnectGetVersion(); err != nil {
			return i, err
		}
		i.QEMU = Version(v)
		_, mem, cpus, _, _, _, _, _, err := l.NodeGetInfo()
		if err != nil {
			return i, err
		}
		i.CPUs, i.MemoryKB = int(cpus), int64(mem)
		doc, err := l.ConnectGetCapabilities()
		if err != nil {
			return i, err
		}
		var c capabilities
		if err := xml.Unmarshal([]byte(doc), &c); err != nil {
			return i, fmt.Errorf("read capabilities: %w", err)
		}
		i.labels = map[string]string{}
		i.UUID, i.Arch, i.CPUModel = c.Host.UUID, c.Host.CPU.Arch, c.Host.CPU.Model
		for _, m := range c.Host.Secmodels {
			i.SecurityModels = append(i.SecurityModels, m.Model)
			for _, b := range m.Labels {
				if m.Model == "dac" {
					i.labels[b.Type] = strings.TrimSpace(b.Text)
				}
			}
		}
		return i, nil
	})
}

// KeepsReconnect reports whether this libvirt hands <reconnect delay=…> of NBD
// disks on to QEMU. Seen: 9.0 accepts the element and drops it silently, 11.3
// keeps it; those between were not tried and count as dropping it. Callers that
// must be sure read the defined XML back.
func (v Version) KeepsReconnect() bool { return v >= 11_000_000 }
