package peer

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"

	"kvmreplica/internal/fsx"
	"kvmreplica/replicad/wire"
)

const (
	peersRoot   = "peers"
	maxRecord   = 64 << 10
	maxPeers    = 256
	recordExt   = ".json"
	maxAllowed  = 1024
	maxRootPath = 1024
)

// Record is one paired host.
type Record struct {
	Host    wire.HostID `json:"host"`
	Name    string      `json:"name"`
	Address string      `json:"address"` // host:port it listens on
	Pin     Pin         `json:"pin"`
	// Anchor is the certificate of the pinned authority, DER.
	Anchor []byte        `json:"anchor,omitempty"`
	Allow  Authorisation `json:"allow"`
	// Removed keeps the name of a host that was removed, so that its next call
	// gets a clear answer. It is trusted with nothing.
	Removed bool `json:"removed,omitempty"`
}

// Authorisation is what a peer may do on this host. The zero value allows nothing.
type Authorisation struct {
	// MaySend lets the peer keep replicas of its VMs here.
	MaySend bool `json:"may_send,omitempty"`
	// Group lets a VM move between the primaries of one group. Empty = none.
	Group string `json:"group,omitempty"`
	// StorageRoot is the directory its replicas live in.
	StorageRoot string `json:"storage_root,omitempty"`
	// VMs it may send; empty means any, up to MaxVMs.
	VMs       []wire.VMID `json:"vms,omitempty"`
	MaxVMs    int         `json:"max_vms,omitempty"`
	MaxDisks  int         `json:"max_disks,omitempty"`  // per VM
	MaxBytes  int64       `json:"max_bytes,omitempty"`  // disk sizes of all its VMs; 0 = not limited here
	MaxPoints int         `json:"max_points,omitempty"` // per VM; 0 = the replica's default
	// Bandwidth limits what it may send, in bytes per second; 0 = not limited.
	Bandwidth int64 `json:"bandwidth,omitempty"`
	// MayRequestReverse lets it ask this host to give a VM back.
	MayRequestReverse bool `json:"may_request_reverse,omitempty"`
}

// Validate refuses an entry that cannot be meant.
func (a Authorisation) Validate() error {
	switch {
	case a.MaySend && !path.IsAbs(a.StorageRoot):
		return errors.New("a peer that may send needs a storage root (an absolute directory)")
	case len(a.StorageRoot) > maxRootPath || strings.ContainsRune(a.StorageRoot, 0):
		return errors.New("the storage root is not a usable path")
	case a.StorageRoot != "" && path.Clean(a.StorageRoot) != a.StorageRoot:
		return fmt.Errorf("write the storage root as %s", path.Clean(a.StorageRoot))
	case a.MaxVMs < 0 || a.MaxDisks < 0 || a.MaxBytes < 0 || a.MaxPoints < 0 || a.Bandwidth < 0:
		return errors.New("a limit is negative")
	case len(a.VMs) > maxAllowed:
		return fmt.Errorf("%d VM ids, at most %d", len(a.VMs), maxAllowed)
	case !wire.ValidText(a.Group, wire.MaxName):
		return errors.New("the group is not printable text")
	case a.MaySend && a.MaxVMs == 0 && len(a.VMs) == 0:
		return errors.New("a peer that may send needs a number of VMs or a list of them")
	}
	for _, v := range a.VMs {
		if !v.Valid() {
			return fmt.Errorf("VM id %.48q is not a lower-case UUID", string(v))
		}
	}
	return nil
}

// Validate refuses a record that could not have been made by pairing.
func (r Record) Validate() error {
	switch {
	case !r.Host.Valid():
		return fmt.Errorf("host id %.48q is not a lower-case UUID", string(r.Host))
	case r.Name == "" || !wire.ValidText(r.Name, wire.MaxName):
		return errors.New("the host name is empty or not printable text")
	case r.Pin == Pin{}:
		return errors.New("no pinned key")
	}
	if a := r.anchor(); len(r.Anchor) > 0 && (a == nil || pinOf(a) != r.Pin) {
		return errors.New("the authority's certificate does not match the pinned key")
	}
	if r.Address != "" {
		if err := checkAddress(r.Address); err != nil {
			return err
		}
	}
	return r.Allow.Validate()
}

// Address is what a person calls a host (a name or an IP address, with a port or
// without) as host:port.
func Address(word string, defaultPort int) (string, error) {
	a := word
	if _, _, err := net.SplitHostPort(a); err != nil {
		a = net.JoinHostPort(strings.Trim(a, "[]"), strconv.Itoa(defaultPort))
	}
	if err := checkAddress(a); err != nil {
		return "", &wire.Error{Kind: wire.KindInvalid, Text: err.Error(), Hint: "give HOST or HOST:PORT"}
	}
	return a, nil
}

func checkAddress(a string) error {
	host, port, err := net.SplitHostPort(a)
	if err != nil || host == "" || !wire.ValidText(a, wire.MaxName) {
		return fmt.Errorf("address %.64q is not of the form host:port", a)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return fmt.Errorf("address %.64q: the port is not between 1 and 65535", a)
	}
	return nil
}

func (r Record) anchor() *x509.Certificate {
	if len(r.Anchor) == 0 {
		return nil
	}
	c, err := x509.ParseCertificate(r.Anchor)
	if err != nil {
		return nil
	}
	return c
}

// Store is the list of paired hosts, one file each. Safe for concurrent use.
type Store struct {
	dir fsx.FS

	// write serialises changes of files; it is taken before mu.
	write sync.Mutex

	mu      sync.Mutex
	records map[wire.HostID]Record    // guarded by mu
	watch   map[int]func(wire.HostID) // guarded by mu
	next    int                       // guarded by mu
}

// OpenStore reads the paired hosts from dir. A damaged record is an error that
// names its file: silently dropping one would change who is trusted.
func OpenStore(dir fsx.FS) (*Store, error) {
	if err := dir.MkdirAll(peersRoot); err != nil {
		return nil, fmt.Errorf("make peer directory: %w", err)
	}
	names, err := dir.List(peersRoot)
	if err != nil {
		return nil, fmt.Errorf("list peers: %w", err)
	}
	s := &Store{dir: dir, records: map[wire.HostID]Record{}, watch: map[int]func(wire.HostID){}}
	for _, n := range names {
		file := path.Join(peersRoot, n)
		if strings.HasSuffix(n, fsx.TempSuffix) {
			if err := dir.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("remove %s: %w", file, err)
			}
			continue
		}
		rec, err := readRecord(dir, file)
		if err != nil {
			return nil, fmt.Errorf("peer record %s: %w (mend it, or move it away to forget that host)", file, err)
		}
		s.records[rec.Host] = rec
	}
	return s, nil
}

func readRecord(dir fsx.FS, file string) (Record, error) {
	data, err := fsx.ReadFile(dir, file, maxRecord)
	if err != nil {
		return Record{}, err
	}
	if data, err = fsx.CheckJSON(data); err != nil {
		return Record{}, err
	}
	var rec Record
	if err := decodeStrict(bytes.NewReader(data), &rec); err != nil {
		return Record{}, err
	}
	if err := rec.Validate(); err != nil {
		return Record{}, err
	}
	if file != recordFile(rec.Host) {
		return Record{}, fmt.Errorf("it is about host %s", rec.Host)
	}
	return rec, nil
}

func recordFile(h wire.HostID) string { return path.Join(peersRoot, string(h)+recordExt) }

// decodeStrict reads exactly one JSON value without unknown fields.
func decodeStrict(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// Peers lists the paired hosts by name; removed ones are not in it.
func (s *Store) Peers() []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Record
	for _, r := range s.records {
		if !r.Removed {
			all = append(all, r.clone())
		}
	}
	slices.SortFunc(all, func(a, b Record) int {
		return strings.Compare(a.Name+"\x00"+string(a.Host), b.Name+"\x00"+string(b.Host))
	})
	return all
}

// Get returns a paired host by id; ok is false for unknown and removed ones.
func (s *Store) Get(h wire.HostID) (rec Record, ok bool) {
	rec, err := s.trusted(h)
	return rec, err == nil
}

// Find returns a paired host by id, name or address. Two hosts of one name are
// an error that lists their ids.
func (s *Store) Find(word string) (Record, error) {
	var hits []Record
	for _, r := range s.Peers() {
		if string(r.Host) == word || r.Name == word || r.Address == word {
			hits = append(hits, r)
		}
	}
	switch len(hits) {
	case 1:
		return hits[0], nil
	case 0:
		return Record{}, &wire.Error{
			Kind: wire.KindNotFound, Text: fmt.Sprintf("no paired host %.64q", word), Hint: "replicactl peer list",
		}
	}
	return Record{}, &wire.Error{
		Kind: wire.KindConflict, Text: fmt.Sprintf("%d paired hosts are called %.64q", len(hits), word),
		Hint: "name one by its id: " + string(hits[0].Host) + " or " + string(hits[1].Host),
	}
}

func (s *Store) trusted(h wire.HostID) (Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.records[h]
	switch {
	case !ok:
		return Record{}, &AuthError{Kind: ErrUnknownPeer, Host: h, Hint: "pair the hosts: replicactl peer invite"}
	case r.Removed:
		return Record{}, &AuthError{Kind: ErrRemovedPeer, Host: h, Hint: "pair the hosts again: replicactl peer invite"}
	}
	return r.clone(), nil
}

func (r Record) clone() Record {
	r.Anchor = slices.Clone(r.Anchor)
	r.Allow.VMs = slices.Clone(r.Allow.VMs)
	return r
}

// Put adds or replaces a paired host. A new entry takes the place of a removed
// one; the pinned key of a host that is still paired never changes: else
// whoever is invited once could take another host's name, and with it its VMs.
func (s *Store) Put(r Record) error {
	r = r.clone()
	if err := r.Validate(); err != nil {
		return fmt.Errorf("peer %.48s: %w", string(r.Host), err)
	}
	return s.change(r.Host, func(old Record, known bool) (Record, error) {
		if known && !old.Removed && old.Pin != r.Pin {
			return Record{}, &wire.Error{
				Kind: wire.KindConflict, Text: fmt.Sprintf("host %s is paired already, with another key, as %q", r.Host, old.Name),
				Hint: "if that host was really set up anew: replicactl peer remove, then pair again",
			}
		}
		if !known && s.count() >= maxPeers {
			return Record{}, fmt.Errorf("%d hosts are known already", maxPeers)
		}
		return r, nil
	})
}

func (s *Store) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.records)
}

// Allow replaces what a paired host may do. It takes effect with the next call.
func (s *Store) Allow(h wire.HostID, a Authorisation) error {
	return s.modify(h, func(r *Record) { r.Allow = a })
}

// SetAddress changes where a paired host is reached.
func (s *Store) SetAddress(h wire.HostID, address string) error {
	return s.modify(h, func(r *Record) { r.Address = address })
}

func (s *Store) modify(h wire.HostID, f func(*Record)) error {
	return s.change(h, func(r Record, known bool) (Record, error) {
		if !known || r.Removed {
			return Record{}, &wire.Error{Kind: wire.KindNotFound, Text: "no paired host " + string(h), Hint: "replicactl peer list"}
		}
		f(&r)
		return r, r.Validate()
	})
}

// Remove ends a pairing: the durable record loses every right first, then all
// live connections of the host are closed, before Remove returns.
func (s *Store) Remove(h wire.HostID) error {
	return s.modify(h, func(r *Record) { r.Removed, r.Allow = true, Authorisation{} })
}

// change makes a new record durable, shows it to readers, and tells watchers.
func (s *Store) change(h wire.HostID, f func(Record, bool) (Record, error)) error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.Lock()
	old, known := s.records[h]
	old = old.clone()
	s.mu.Unlock()
	rec, err := f(old, known)
	if err != nil {
		return err
	}
	data, err := fsx.EncodeJSON(rec)
	if err != nil {
		return fmt.Errorf("encode peer record: %w", err)
	}
	if rec.Removed {
		// Trust ends now, whatever the disk says about it.
		s.show(rec)
	}
	if err := fsx.WriteAtomic(s.dir, recordFile(h), data); err != nil {
		return fmt.Errorf("record peer %s: %w", h, err)
	}
	s.show(rec)
	return nil
}

func (s *Store) show(rec Record) {
	s.mu.Lock()
	s.records[rec.Host] = rec
	var tell []func(wire.HostID)
	for _, f := range s.watch {
		tell = append(tell, f)
	}
	s.mu.Unlock()
	for _, f := range tell {
		f(rec.Host)
	}
}

// Watch calls f after every change of a record, until stop is called. f must
// not block and must not change the Store.
func (s *Store) Watch(f func(wire.HostID)) (stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := s.next
	s.next++
	s.watch[id] = f
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watch, id)
	}
}
