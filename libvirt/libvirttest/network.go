package libvirttest

import (
	"context"
	"slices"

	"kvmreplica/libvirt"
)

// SetNetwork adds or replaces a network of the host.
func (f *Fake) SetNetwork(n libvirt.Network) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.networks == nil {
		f.networks = map[string]*network{}
	}
	f.networks[n.Name] = &network{Network: n}
}

// network is one network of a Fake.
type network struct {
	libvirt.Network
	hosts []libvirt.Reservation
}

// CreateIsolated makes a network.
func (f *Fake) CreateIsolated(ctx context.Context, name, bridge string) error {
	if _, err := f.begin(ctx, "CreateIsolated", "", name); err != nil {
		return err
	}
	f.SetNetwork(libvirt.Network{Name: name, Bridge: bridge, Active: true})
	return nil
}

// DestroyNetwork ends one.
func (f *Fake) DestroyNetwork(ctx context.Context, name string) error {
	if _, err := f.begin(ctx, "DestroyNetwork", "", name); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.networks, name)
	return nil
}

// Networks lists their names.
func (f *Fake) Networks(ctx context.Context) ([]string, error) {
	if _, err := f.begin(ctx, "Networks", "", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for n := range f.networks {
		out = append(out, n)
	}
	slices.Sort(out)
	return out, nil
}

// Network reads one.
func (f *Fake) Network(ctx context.Context, name string) (libvirt.Network, error) {
	if _, err := f.begin(ctx, "Network", "", name); err != nil {
		return libvirt.Network{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.networks[name]; n != nil {
		return n.Network, nil
	}
	return libvirt.Network{}, &libvirt.Error{Op: "Network", Kind: libvirt.KindNotFound, Msg: "no network " + name}
}

// Reserve remembers a reservation.
func (f *Fake) Reserve(ctx context.Context, name string, r libvirt.Reservation) error {
	if _, err := f.begin(ctx, "Reserve", "", name); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.networks[name]
	if n == nil {
		return &libvirt.Error{Op: "Reserve", Kind: libvirt.KindNotFound, Msg: "no network " + name}
	}
	if !slices.Contains(n.hosts, r) {
		n.hosts = append(n.hosts, r)
	}
	return nil
}

// Unreserve forgets it.
func (f *Fake) Unreserve(ctx context.Context, name string, r libvirt.Reservation) error {
	if _, err := f.begin(ctx, "Unreserve", "", name); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.networks[name]; n != nil {
		n.hosts = slices.DeleteFunc(n.hosts, func(h libvirt.Reservation) bool { return h == r })
	}
	return nil
}

// Reservations of a network.
func (f *Fake) Reservations(name string) []libvirt.Reservation {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := f.networks[name]; n != nil {
		return slices.Clone(n.hosts)
	}
	return nil
}
