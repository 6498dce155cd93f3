package vm

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"kvmreplica/internal/block"
	"kvmreplica/internal/count"
	"kvmreplica/libvirt"
	"kvmreplica/nbd"
	"kvmreplica/replicad/status"
	"kvmreplica/replicad/wire"
)

// The kinds of a Record's disks; they are the data plane's.
const (
	diskRaw   = "raw"
	diskBlock = "block"
	diskNBD   = "nbd"
)

// nbdTimeout bounds the first word of an NBD server.
const nbdTimeout = 10 * time.Second

// checkDisk judges one disk and, when it can be protected, takes it into the
// record.
func (p *EnablePlan) checkDisk(ctx context.Context, d libvirt.Domain, k libvirt.Disk) {
	name := "Disk " + k.Target
	bad := func(remedy, format string, a ...any) { p.check(name, wire.Failed, remedy, format, a...) }
	if p.run {
		if why := libvirt.Refuse(d, k.Target); len(why) > 0 {
			for _, w := range why {
				bad("shut the guest down and repeat the command, or change the disk", "%s", w)
			}
			return
		}
	}
	without := fmt.Sprintf("leave it out by naming the others: replicactl vm enable %s --disk …", d.Name)
	if p.adding {
		without = "leave it unprotected"
	}
	switch {
	case k.Device != "disk" || k.ReadOnly || k.Kind == libvirt.SourceNone:
		bad(without, "a %s that nothing writes to is not replicated", k.Device)
	case k.Shareable:
		bad(without+"; or remove <shareable/> from it: virsh edit "+d.Name, "it is shareable: another VM could write past the change tracking")
	case k.Encrypted:
		bad(without+"; encrypt inside the guest or below the image", "QEMU encrypts it")
	case k.Transient:
		bad(without, "it is transient: its changes are thrown away")
	case k.Backing > 0:
		bad("merge it: virsh blockpull "+d.Name+" "+k.Target, "it has a backing chain of %s", count.Of(k.Backing, "image"))
	case k.Kind == libvirt.SourceNBD:
		p.takeNBD(ctx, k)
	case k.Kind != libvirt.SourceFile && k.Kind != libvirt.SourceBlock:
		bad("use a raw file, a block device or an NBD server; or "+without, "its source is of a kind that cannot be protected")
	case k.Format != "raw" && (k.Format != "" || k.Kind == libvirt.SourceFile):
		bad("copy it to a raw image: qemu-img convert -O raw (guest off) or virsh blockcopy --format raw --pivot (guest on)", "its format is %q; only raw images are replicated", k.Format)
	default:
		p.takeFile(d, k)
	}
}

// takeFile opens a raw file or a block device to learn what it is.
func (p *EnablePlan) takeFile(d libvirt.Domain, k libvirt.Disk) {
	name := "Disk " + k.Target
	kind := map[libvirt.SourceKind]string{libvirt.SourceFile: diskRaw, libvirt.SourceBlock: diskBlock}[k.Kind]
	path, err := filepath.EvalSymlinks(k.Path)
	if errors.Is(err, os.ErrNotExist) {
		p.check(name, wire.Failed, "put the image there or correct the domain: virsh domblklist "+d.Name, "its image %s does not exist", k.Path)
		return
	}
	var f *block.File
	if err == nil {
		f, err = block.OpenFile(path, block.FileOptions{ReadOnly: true, NoLock: true})
	}
	if err != nil {
		p.check(name, wire.Failed, "virsh domblklist "+d.Name, "its image cannot be opened: %v", err)
		return
	}
	defer f.Close()
	if f.Size() == 0 {
		p.check(name, wire.Failed, "qemu-img resize it, or put the right image there", "its image %s is empty", path)
		return
	}
	p.rec.Disks = append(p.rec.Disks, Disk{Name: wire.DiskName(k.Target), Size: f.Size(), Kind: kind, Path: f.Path(), Live: k})
	p.check(name, wire.OK, "", "%s in %s", status.Bytes(f.Size()), f.Path())
}

// takeNBD asks the server of a network disk for its size.
func (p *EnablePlan) takeNBD(ctx context.Context, k libvirt.Disk) {
	name := "Disk " + k.Target
	uri, err := nbdURI(k)
	if err != nil {
		p.check(name, wire.Failed, "reach the server without TLS, through a unix socket or a private network", "%v", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, nbdTimeout)
	defer cancel()
	c, err := nbd.DialURI(ctx, uri, nbd.ClientOptions{})
	if err != nil {
		p.check(name, wire.Failed, "is the server up? nbdinfo '"+uri+"'", "its NBD server: %v", err)
		return
	}
	size := c.Size()
	if err := c.Close(); err != nil || size == 0 {
		p.check(name, wire.Failed, "nbdinfo '"+uri+"'", "its NBD server: %d bytes, %v", size, err)
		return
	}
	p.rec.Disks = append(p.rec.Disks, Disk{Name: wire.DiskName(k.Target), Size: size, Kind: diskNBD, URI: uri, Live: k})
	p.check(name, wire.OK, "", "%s at %s", status.Bytes(size), uri)
}

// nbdURI is the address of a network disk's server.
func nbdURI(k libvirt.Disk) (string, error) {
	u := url.URL{Scheme: "nbd", Host: k.Address, Path: "/" + k.Export}
	switch {
	case k.TLS:
		return "", errors.New("its NBD server is reached with TLS, which is not supported")
	case k.Socket != "":
		u.Scheme, u.Host, u.RawQuery = "nbd+unix", "", url.Values{"socket": {k.Socket}}.Encode()
	case k.Address == "":
		return "", errors.New("its NBD source names neither a socket nor a host")
	}
	_, err := nbd.ParseURI(u.String())
	return u.String(), err
}
