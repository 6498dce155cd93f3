package libvirt

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"

	lv "github.com/digitalocean/go-libvirt"
)

// State of a domain.
type State string

// The states of a domain.
const (
	StateRunning  State = "running"
	StatePaused   State = "paused"
	StateShutdown State = "shutting-down"
	StateOff      State = "off"
	StateCrashed  State = "crashed"
	StateAsleep   State = "suspended-by-guest"
	StateUnknown  State = "unknown"
)

// Reason refines a state, as far as we decide on it.
type Reason string

// The reasons we tell apart.
const (
	ReasonNone      Reason = ""
	ReasonUser      Reason = "user"
	ReasonIOError   Reason = "io-error"
	ReasonMigration Reason = "migration"
	ReasonStarting  Reason = "starting-up"
	ReasonSave      Reason = "save"
	ReasonShutdown  Reason = "guest-shutdown"
	ReasonDestroyed Reason = "destroyed"
	ReasonCrashed   Reason = "crashed"
	ReasonMigrated  Reason = "migrated"
	ReasonSaved     Reason = "saved" // a managed save image exists
	ReasonFailed    Reason = "failed"
	ReasonOther     Reason = "other"
)

// Summary is what List returns for each domain.
type Summary struct {
	Name, UUID string
	State      State
	Reason     Reason
}

// List returns all domains, defined or running.
func (h *Host) List(ctx context.Context) ([]Summary, error) {
	return call(ctx, h, "list domains", listDomains)
}

func listDomains(l *lv.Libvirt) ([]Summary, error) {
	ds, _, err := l.ConnectListAllDomains(1, lv.ConnectListDomainsActive|lv.ConnectListDomainsInactive)
	if err != nil {
		return nil, err
	}
	out := make([]Summary, 0, len(ds))
	for _, d := range ds {
		s, r, err := l.DomainGetState(d, 0)
		if lv.IsNotFound(err) {
			continue // gone between the two calls
		}
		if err != nil {
			return nil, err
		}
		st, re := stateOf(s, r)
		out = append(out, Summary{Name: d.Name, UUID: uuidString(d.UUID), State: st, Reason: re})
	}
	return out, nil
}

// LookupName finds a domain's UUID by its name.
func (h *Host) LookupName(ctx context.Context, name string) (uuid string, err error) {
	return call(ctx, h, fmt.Sprintf("find domain %q", name), func(l *lv.Libvirt) (string, error) {
		d, err := l.DomainLookupByName(name)
		return uuidString(d.UUID), err
	})
}

// Domain reads one domain: the live document while it runs, else the
// persistent one.
func (h *Host) Domain(ctx context.Context, uuid string) (Domain, error) {
	return onDomain(ctx, h, "read domain", uuid, func(l *lv.Libvirt, d lv.Domain) (Domain, error) {
		doc, err := l.DomainGetXMLDesc(d, 0)
		if err != nil {
			return Domain{}, err
		}
		v, err := ParseDomain([]byte(doc))
		if err != nil {
			return v, err
		}
		s, r, err := l.DomainGetState(d, 0)
		if err != nil {
			return v, err
		}
		v.State, v.Reason = stateOf(s, r)
		p, err := l.DomainIsPersistent(d)
		if err != nil {
			return v, err
		}
		v.Persistent = p == 1
		if v.Persistent {
			a, err := l.DomainGetAutostart(d)
			if err != nil {
				return v, err
			}
			v.Autostart = a == 1
		}
		return v, nil
	})
}

// DomainState is the cheap question: what is it doing?
func (h *Host) DomainState(ctx context.Context, uuid string) (State, Reason, error) {
	type sr struct {
		s State
		r Reason
	}
	v, err := onDomain(ctx, h, "read state", uuid, func(l *lv.Libvirt, d lv.Domain) (sr, error) {
		s, r, err := l.DomainGetState(d, 0)
		st, re := stateOf(s, r)
		return sr{st, re}, err
	})
	return v.s, v.r, err
}

// XMLKind selects a document.
type XMLKind int

// The documents of a domain. Both contain secrets' places, never secrets.
const (
	// XMLPersistent is what the next start uses.
	XMLPersistent XMLKind = iota
	// XMLLive is what runs now (the persistent one when nothing runs).
	XMLLive
)

// XML returns a domain's document, byte for byte as libvirt gives it.
func (h *Host) XML(ctx context.Context, uuid string, k XMLKind) ([]byte, error) {
	return onDomain(ctx, h, "read domain XML", uuid, func(l *lv.Libvirt, d lv.Domain) ([]byte, error) {
		flags := lv.DomainXMLSecure
		if k == XMLPersistent {
			flags |= lv.DomainXMLInactive
		}
		s, err := l.DomainGetXMLDesc(d, flags)
		return []byte(s), err
	})
}

// MetadataURI is the namespace of our element in a domain's metadata;
// MetadataPrefix its usual prefix. The element is one text value, see
// SetMetadata.
const (
	MetadataURI    = "urn:kvmreplica:domain:1"
	MetadataPrefix = "kvmreplica"
)

// Metadata returns the text kept in our element of the persistent definition;
// ErrNotFound when there is none.
func (h *Host) Metadata(ctx context.Context, uuid string) (string, error) {
	return onDomain(ctx, h, "read metadata", uuid, func(l *lv.Libvirt, d lv.Domain) (string, error) {
		doc, err := l.DomainGetMetadata(d, int32(lv.DomainMetadataElement), lv.OptString{MetadataURI}, lv.DomainAffectConfig)
		if err != nil {
			return "", err
		}
		return metadataText(doc)
	})
}

// SetMetadata keeps text in our element of the persistent definition, and of
// the live one while the domain runs. An empty text removes the element;
// removing what is not there is no error.
func (h *Host) SetMetadata(ctx context.Context, uuid, text string) error {
	return onDomainDo(ctx, h, "write metadata", uuid, func(l *lv.Libvirt, d lv.Domain) error {
		flags := lv.DomainAffectConfig
		if s, _, err := l.DomainGetState(d, 0); err != nil {
			return err
		} else if st, _ := stateOf(s, 0); st != StateOff && st != StateCrashed {
			flags |= lv.DomainAffectLive
		}
		val := lv.OptString{}
		if text != "" {
			val = lv.OptString{"<vm>" + esc(text) + "</vm>"} // libvirt adds the namespace
		}
		return l.DomainSetMetadata(d, int32(lv.DomainMetadataElement), val, lv.OptString{MetadataPrefix}, lv.OptString{MetadataURI}, flags)
	})
}

// onDomain looks a domain up and runs fn with it, all in one deadline.
func onDomain[T any](ctx context.Context, h *Host, op, uuid string, fn func(*lv.Libvirt, lv.Domain) (T, error)) (T, error) {
	op = fmt.Sprintf("%s of %s", op, uuid)
	id, err := parseUUID(uuid)
	if err != nil {
		var zero T
		return zero, &Error{Op: op, Kind: KindInvalid, Msg: err.Error()}
	}
	return call(ctx, h, op, func(l *lv.Libvirt) (T, error) {
		d, err := l.DomainLookupByUUID(id)
		if err != nil {
			var zero T
			return zero, err
		}
		return fn(l, d)
	})
}

func onDomainDo(ctx context.Context, h *Host, op, uuid string, fn func(*lv.Libvirt, lv.Domain) error) error {
	_, err := onDomain(ctx, h, op, uuid, func(l *lv.Libvirt, d lv.Domain) (struct{}, error) {
		return struct{}{}, fn(l, d)
	})
	return err
}

func uuidString(u lv.UUID) string {
	s := hex.EncodeToString(u[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

func parseUUID(s string) (lv.UUID, error) {
	var u lv.UUID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, fmt.Errorf("%q is not a UUID", s)
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(u) {
		return u, fmt.Errorf("%q is not a UUID", s)
	}
	copy(u[:], b)
	return u, nil
}

func stateOf(s, r int32) (State, Reason) {
	switch lv.DomainState(s) {
	case lv.DomainRunning, lv.DomainBlocked:
		return StateRunning, ReasonNone
	case lv.DomainPaused:
		return StatePaused, pausedReason(lv.DomainPausedReason(r))
	case lv.DomainShutdown:
		return StateShutdown, ReasonNone
	case lv.DomainShutoff:
		return StateOff, offReason(lv.DomainShutoffReason(r))
	case lv.DomainCrashed:
		return StateCrashed, ReasonCrashed
	case lv.DomainPmsuspended:
		return StateAsleep, ReasonNone
	}
	return StateUnknown, ReasonNone
}

func pausedReason(r lv.DomainPausedReason) Reason {
	switch r {
	case lv.DomainPausedUser:
		return ReasonUser
	case lv.DomainPausedIoerror:
		return ReasonIOError
	case lv.DomainPausedMigration, lv.DomainPausedPostcopy, lv.DomainPausedPostcopyFailed:
		return ReasonMigration
	case lv.DomainPausedStartingUp:
		return ReasonStarting
	case lv.DomainPausedSave:
		return ReasonSave
	case lv.DomainPausedCrashed:
		return ReasonCrashed
	case lv.DomainPausedShuttingDown:
		return ReasonShutdown
	}
	return ReasonOther
}

func offReason(r lv.DomainShutoffReason) Reason {
	switch r {
	case lv.DomainShutoffShutdown:
		return ReasonShutdown
	case lv.DomainShutoffDestroyed:
		return ReasonDestroyed
	case lv.DomainShutoffCrashed:
		return ReasonCrashed
	case lv.DomainShutoffMigrated:
		return ReasonMigrated
	case lv.DomainShutoffSaved:
		return ReasonSaved
	case lv.DomainShutoffFailed:
		return ReasonFailed
	}
	return ReasonOther
}
