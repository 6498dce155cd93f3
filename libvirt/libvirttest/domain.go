package libvirttest

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"kvmreplica/libvirt"
)

// move changes the state and returns the event of it.
func (d *domain) move(s libvirt.State, r libvirt.Reason) libvirt.Event {
	was := d.state
	d.state, d.reason = s, r
	e := libvirt.Event{Name: d.name, UUID: d.uuid, Detail: string(r)}
	switch {
	case s == libvirt.StateOff:
		e.Kind, d.frozen, d.live, d.inserted = libvirt.EventStopped, false, nil, map[string]libvirt.InsertState{}
	case s == libvirt.StateCrashed:
		e.Kind = libvirt.EventCrashed
	case was == libvirt.StateOff:
		e.Kind, e.Detail, d.live = libvirt.EventStarted, "booted", d.doc
	case s == libvirt.StatePaused:
		e.Kind = libvirt.EventSuspended
	default:
		e.Kind = libvirt.EventResumed
	}
	return e
}

// pending events of the call in progress.
func (d *domain) takeEvents() []libvirt.Event {
	e := d.events
	d.events = nil
	return e
}

func (d *domain) to(s libvirt.State, r libvirt.Reason) error {
	d.events = append(d.events, d.move(s, r))
	return nil
}

// Info describes the fake host.
func (f *Fake) Info(ctx context.Context) (libvirt.HostInfo, error) {
	if _, err := f.begin(ctx, "Info", "", ""); err != nil {
		return libvirt.HostInfo{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.info, nil
}

// SetInfo replaces what Info says.
func (f *Fake) SetInfo(i libvirt.HostInfo) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.info = i
}

// List returns all domains by name.
func (f *Fake) List(ctx context.Context) ([]libvirt.Summary, error) {
	if _, err := f.begin(ctx, "List", "", ""); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.list(), nil
}

// LookupName finds a UUID.
func (f *Fake) LookupName(ctx context.Context, name string) (string, error) {
	if _, err := f.begin(ctx, "LookupName", "", name); err != nil {
		return "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range f.domains {
		if d.name == name {
			return d.uuid, nil
		}
	}
	return "", &libvirt.Error{Op: "LookupName", Kind: libvirt.KindNotFound, Msg: "no domain " + name}
}

// Domain reads one domain.
func (f *Fake) Domain(ctx context.Context, uuid string) (v libvirt.Domain, err error) {
	err = f.on(ctx, "Domain", uuid, "", func(d *domain) error {
		doc := d.live
		if doc == nil {
			doc = d.doc
		}
		var e error
		v, e = libvirt.ParseDomain(doc)
		v.State, v.Reason, v.Persistent, v.Autostart, v.AgentConnected = d.state, d.reason, d.persistent, d.autostart, d.agent
		return e
	})
	return v, err
}

// DomainState is the state alone.
func (f *Fake) DomainState(ctx context.Context, uuid string) (s libvirt.State, r libvirt.Reason, err error) {
	err = f.on(ctx, "DomainState", uuid, "", func(d *domain) error { s, r = d.state, d.reason; return nil })
	return s, r, err
}

// XML is the document as it was defined, with metadata set since.
func (f *Fake) XML(ctx context.Context, uuid string, k libvirt.XMLKind) (doc []byte, err error) {
	err = f.on(ctx, "XML", uuid, "", func(d *domain) error {
		doc = d.doc
		if k == libvirt.XMLLive && d.live != nil {
			doc = d.live
		}
		if d.meta != "" {
			var e error
			doc, e = libvirt.InsertMetadata(doc, d.meta)
			return e
		}
		return nil
	})
	return doc, err
}

// Metadata reads our element.
func (f *Fake) Metadata(ctx context.Context, uuid string) (text string, err error) {
	err = f.on(ctx, "Metadata", uuid, "", func(d *domain) error {
		if d.meta == "" {
			return &libvirt.Error{Op: "Metadata", Kind: libvirt.KindNotFound, Code: 80, Msg: "none"}
		}
		text = d.meta
		return nil
	})
	return text, err
}

// SetMetadata writes it; "" removes it.
func (f *Fake) SetMetadata(ctx context.Context, uuid, text string) error {
	return f.on(ctx, "SetMetadata", uuid, text, func(d *domain) error { d.meta = text; return nil })
}

// Define makes or replaces a definition.
func (f *Fake) Define(ctx context.Context, doc []byte) (string, error) {
	v, perr := libvirt.ParseDomain(doc)
	late, err := f.begin(ctx, "Define", v.UUID, "")
	if err != nil && !late {
		return "", err
	}
	if perr != nil {
		return "", &libvirt.Error{Op: "Define", Kind: libvirt.KindInvalid, Msg: perr.Error()}
	}
	f.mu.Lock()
	d := f.domains[v.UUID]
	for _, o := range f.domains {
		if o.name == v.Name && o.uuid != v.UUID {
			f.mu.Unlock()
			return "", &libvirt.Error{Op: "Define", Kind: libvirt.KindExists, Msg: "name " + v.Name + " is taken"}
		}
	}
	if d == nil {
		d = &domain{uuid: v.UUID, state: libvirt.StateOff, graph: map[string]libvirt.DiskGraph{}, inserted: map[string]libvirt.InsertState{}}
		f.domains[v.UUID] = d
	}
	d.doc, d.name, d.persistent = append([]byte(nil), doc...), v.Name, true
	f.mu.Unlock()
	f.Emit(libvirt.Event{Kind: libvirt.EventDefined, Name: v.Name, UUID: v.UUID, Detail: "added"})
	return v.UUID, err
}

// Undefine removes a definition.
func (f *Fake) Undefine(ctx context.Context, uuid string, o libvirt.UndefineOptions) error {
	f.mu.Lock()
	d := f.domains[uuid]
	f.mu.Unlock()
	if d == nil {
		_, err := f.begin(ctx, "Undefine", uuid, "")
		return err
	}
	err := f.on(ctx, "Undefine", uuid, "", func(d *domain) error {
		if d.firmware.NVRAM != nil && !o.DropNVRAM && !o.KeepNVRAM || d.saved && !o.DropSaved {
			return wrongState("Undefine", d)
		}
		d.persistent = false
		if d.state == libvirt.StateOff {
			delete(f.domains, uuid)
		}
		return nil
	})
	if err == nil {
		f.Emit(libvirt.Event{Kind: libvirt.EventUndefined, Name: d.name, UUID: uuid, Detail: "removed"})
	}
	return err
}

// Start boots a domain.
func (f *Fake) Start(ctx context.Context, uuid string, o libvirt.StartOptions) error {
	return f.on(ctx, "Start", uuid, "", func(d *domain) error {
		if d.state != libvirt.StateOff && d.state != libvirt.StateCrashed {
			return wrongState("Start", d)
		}
		d.state, d.saved = libvirt.StateOff, false
		if o.Paused {
			return d.to(libvirt.StatePaused, libvirt.ReasonStarting)
		}
		return d.to(libvirt.StateRunning, libvirt.ReasonNone)
	})
}

// Shutdown ends a running guest cleanly.
func (f *Fake) Shutdown(ctx context.Context, uuid string, _ libvirt.ShutdownOptions) error {
	return f.on(ctx, "Shutdown", uuid, "", func(d *domain) error {
		switch d.state {
		case libvirt.StateOff:
			return nil
		case libvirt.StatePaused:
			return wrongState("Shutdown", d)
		}
		return d.to(libvirt.StateOff, libvirt.ReasonShutdown)
	})
}

// Destroy ends it at once.
func (f *Fake) Destroy(ctx context.Context, uuid string, _ bool) error {
	return f.on(ctx, "Destroy", uuid, "", func(d *domain) error {
		if d.state == libvirt.StateOff {
			return nil
		}
		return d.to(libvirt.StateOff, libvirt.ReasonDestroyed)
	})
}

// Suspend pauses.
func (f *Fake) Suspend(ctx context.Context, uuid string) error {
	return f.on(ctx, "Suspend", uuid, "", func(d *domain) error {
		if d.state != libvirt.StateRunning {
			return wrongState("Suspend", d)
		}
		return d.to(libvirt.StatePaused, libvirt.ReasonUser)
	})
}

// Resume runs on.
func (f *Fake) Resume(ctx context.Context, uuid string) error {
	return f.on(ctx, "Resume", uuid, "", func(d *domain) error {
		if d.state != libvirt.StatePaused {
			return wrongState("Resume", d)
		}
		return d.to(libvirt.StateRunning, libvirt.ReasonNone)
	})
}

// ResumeIOError resumes a guest paused by an I/O error.
func (f *Fake) ResumeIOError(ctx context.Context, uuid string) (n int, err error) {
	err = f.on(ctx, "ResumeIOError", uuid, "", func(d *domain) error {
		switch {
		case d.state == libvirt.StateRunning:
			return nil
		case d.state == libvirt.StatePaused && d.reason == libvirt.ReasonIOError:
			n = 1
			return d.to(libvirt.StateRunning, libvirt.ReasonNone)
		}
		return wrongState("ResumeIOError", d)
	})
	return n, err
}

// SetAutostart sets the flag.
func (f *Fake) SetAutostart(ctx context.Context, uuid string, on bool) error {
	return f.on(ctx, "SetAutostart", uuid, "", func(d *domain) error { d.autostart = on; return nil })
}

// Autostart reads it.
func (f *Fake) Autostart(ctx context.Context, uuid string) (on bool, err error) {
	err = f.on(ctx, "Autostart", uuid, "", func(d *domain) error { on = d.autostart; return nil })
	return on, err
}

// HasSaved reports a managed save image.
func (f *Fake) HasSaved(ctx context.Context, uuid string) (has bool, err error) {
	err = f.on(ctx, "HasSaved", uuid, "", func(d *domain) error { has = d.saved; return nil })
	return has, err
}

// AgentPing asks the guest agent.
func (f *Fake) AgentPing(ctx context.Context, uuid string) error {
	return f.on(ctx, "AgentPing", uuid, "", func(d *domain) error { return d.needAgent("AgentPing") })
}

func (d *domain) needAgent(op string) error {
	if d.state != libvirt.StateRunning {
		return wrongState(op, d)
	}
	if !d.agent {
		return &libvirt.Error{Op: op, Kind: libvirt.KindAgent, Code: 86, Msg: "the guest agent does not answer"}
	}
	return nil
}

// GuestInfo is a host name only.
func (f *Fake) GuestInfo(ctx context.Context, uuid string) (m map[string]string, err error) {
	err = f.on(ctx, "GuestInfo", uuid, "", func(d *domain) error {
		m = map[string]string{"hostname": d.name}
		return d.needAgent("GuestInfo")
	})
	return m, err
}

// Quiesce freezes; the thaw works once and by itself after holdFor.
func (f *Fake) Quiesce(ctx context.Context, uuid string, holdFor time.Duration) (int, func() (bool, error), error) {
	err := f.on(ctx, "Quiesce", uuid, "", func(d *domain) error {
		if err := d.needAgent("Quiesce"); err != nil {
			return err
		}
		d.frozen = true
		return nil
	})
	held := false
	thaw := sync.OnceValue(func() error {
		return f.on(context.WithoutCancel(ctx), "Thaw", uuid, "", func(d *domain) error {
			held, d.frozen = d.frozen, false
			return nil
		})
	})
	if err != nil {
		f.with(uuid, func(d *domain) { d.frozen = false })
		return 0, nil, err
	}
	var late atomic.Bool
	t := time.AfterFunc(holdFor, func() { late.Store(true); _ = thaw() })
	return 1, func() (bool, error) {
		t.Stop()
		err := thaw()
		return err == nil && held && !late.Load(), err
	}, nil
}

// Thaw thaws, once.
func (f *Fake) Thaw(ctx context.Context, uuid string) error {
	return f.on(ctx, "Thaw", uuid, "", func(d *domain) error {
		if d.state == libvirt.StateRunning && !d.agent {
			return d.needAgent("Thaw")
		}
		d.frozen = false
		return nil
	})
}

// Firmware returns what SetFirmware set.
func (f *Fake) Firmware(ctx context.Context, uuid, _ string) (s libvirt.FirmwareState, err error) {
	err = f.on(ctx, "Firmware", uuid, "", func(d *domain) error { s = d.firmware; return nil })
	return s, err
}

// Close does nothing.
func (f *Fake) Close() error { return nil }
