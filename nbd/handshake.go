package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// Bounds of the handshake. 256 options is more than any client sends; a whole
// set of meta-context queries is at most a few strings.
const (
	maxOptions    = 256
	maxOptionSize = 64 << 10
	maxSkip       = 1 << 20 // longer nonsense ends the connection
	maxQueries    = 64
)

// handshake negotiates one connection. Its methods return errBye when the
// client left in an orderly way.
type handshake struct {
	s          *Server
	c          *conn
	noZeroes   bool
	structured bool
	context    bool   // base:allocation was chosen
	contextFor string // for this export
	buf        []byte // option data, reused
	out        []byte // reply, reused
}

var errBye = errors.New("client left")

// negotiate returns the export the client chose, admitted.
func (s *Server) negotiate(ctx context.Context, c *conn) (*export, error) {
	_ = c.nc.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout))
	h := &handshake{s: s, c: c}
	if err := h.greet(); err != nil {
		return nil, err
	}
	for range maxOptions {
		e, err := h.option(ctx)
		if err != nil || e != nil {
			return e, err
		}
	}
	return nil, fmt.Errorf("client sent %d options without choosing an export", maxOptions)
}

func (h *handshake) greet() error {
	var p []byte
	p = binary.BigEndian.AppendUint64(p, magicInit)
	p = binary.BigEndian.AppendUint64(p, magicOption)
	p = binary.BigEndian.AppendUint16(p, flagFixedNewstyle|flagNoZeroes)
	if _, err := h.c.nc.Write(p); err != nil {
		return err
	}
	var in [4]byte
	if _, err := io.ReadFull(h.c.nc, in[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(in[:])
	if flags&^uint32(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("client set unknown handshake flags %#x", flags)
	}
	h.noZeroes = flags&uint32(flagNoZeroes) != 0
	return nil
}

// option reads one option and answers it.
func (h *handshake) option(ctx context.Context) (*export, error) {
	if h.c.draining.Load() {
		return nil, errDrained
	}
	var in [16]byte
	if _, err := io.ReadFull(h.c.nc, in[:]); err != nil {
		return nil, err
	}
	if m := binary.BigEndian.Uint64(in[:]); m != magicOption {
		return nil, fmt.Errorf("client sent %#x instead of an option", m)
	}
	opt, length := binary.BigEndian.Uint32(in[8:]), binary.BigEndian.Uint32(in[12:])
	if length > maxOptionSize {
		return nil, h.tooBig(opt, length)
	}
	if cap(h.buf) < int(length) {
		h.buf = make([]byte, length)
	}
	data := h.buf[:length]
	if _, err := io.ReadFull(h.c.nc, data); err != nil {
		return nil, err
	}
	switch opt {
	case optExportName:
		return h.exportName(ctx, string(data))
	case optAbort:
		_ = h.reply(opt, repAck, nil)
		return nil, errBye
	case optList:
		return nil, h.listExports(data)
	case optInfo, optGo:
		return h.infoOrGo(ctx, opt, data)
	case optStructuredReply:
		if length != 0 {
			return nil, h.refuse(opt, repErrInvalid, "option has no data")
		}
		h.structured = true
		return nil, h.reply(opt, repAck, nil)
	case optListMeta, optSetMeta:
		return nil, h.metaContext(opt, data)
	}
	return nil, h.refuse(opt, repErrUnsup, "option not supported")
}

// tooBig skips an option nobody needs and says so; beyond maxSkip, or when the
// option allows no reply, the connection ends.
func (h *handshake) tooBig(opt, length uint32) error {
	if length > maxSkip || opt == optExportName {
		return fmt.Errorf("client sent option %d with %d bytes", opt, length)
	}
	if _, err := io.CopyN(io.Discard, h.c.nc, int64(length)); err != nil {
		return err
	}
	return h.refuse(opt, repErrTooBig, "option too long")
}

func (h *handshake) reply(opt, typ uint32, data []byte) error {
	p := binary.BigEndian.AppendUint64(h.out[:0], magicOptionReply)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, typ)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	h.out = append(p, data...)
	_, err := h.c.nc.Write(h.out)
	return err
}

// refuse answers an option with an error and a text for a person.
func (h *handshake) refuse(opt, typ uint32, text string) error {
	return h.reply(opt, typ, []byte(text))
}

// exportName is the old way in: no way to refuse but to hang up.
func (h *handshake) exportName(ctx context.Context, name string) (*export, error) {
	e := h.s.lookup(name)
	if e == nil {
		return nil, fmt.Errorf("client asked for export %q: %w", name, ErrUnknownExport)
	}
	if err := h.admit(ctx, e); err != nil {
		return nil, err
	}
	p := binary.BigEndian.AppendUint64(nil, uint64(e.size.Load()))
	p = binary.BigEndian.AppendUint16(p, e.transmissionFlags(h.structured))
	if !h.noZeroes {
		p = append(p, make([]byte, 124)...)
	}
	if _, err := h.c.nc.Write(p); err != nil {
		return nil, h.abandon(e, err)
	}
	h.enter(e)
	return e, nil
}

// admit waits without the handshake's deadline: it may have to wait for
// requests of an ended connection.
func (h *handshake) admit(ctx context.Context, e *export) error {
	_ = h.c.nc.SetDeadline(time.Time{})
	h.c.admitted.Store(true)
	err := e.admit(ctx, h.c)
	h.c.admitted.Store(err == nil)
	return err
}

// abandon takes an admission back.
func (h *handshake) abandon(e *export, err error) error {
	e.leave(h.c)
	return err
}

// enter hands the negotiated state to the connection.
func (h *handshake) enter(e *export) {
	h.c.structured = h.structured
	h.c.blockStatus = h.structured && h.context && h.contextFor == e.Name
}

func (h *handshake) listExports(data []byte) error {
	if len(data) != 0 {
		return h.refuse(optList, repErrInvalid, "option has no data")
	}
	for _, e := range h.s.list() {
		p := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		p = append(p, e.Name...)
		p = append(p, e.Description...)
		if err := h.reply(optList, repServer, p); err != nil {
			return err
		}
	}
	return h.reply(optList, repAck, nil)
}

// cutString takes a string with its 32-bit length off p.
func cutString(p []byte) (s string, rest []byte, ok bool) {
	if len(p) < 4 {
		return "", nil, false
	}
	n := binary.BigEndian.Uint32(p)
	if p = p[4:]; uint64(n) > uint64(len(p)) {
		return "", nil, false
	}
	return string(p[:n]), p[n:], true
}

func (h *handshake) infoOrGo(ctx context.Context, opt uint32, data []byte) (*export, error) {
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 2 || len(rest) != 2+2*int(binary.BigEndian.Uint16(rest)) {
		return nil, h.refuse(opt, repErrInvalid, "lengths in the option do not fit")
	}
	if len(name) > maxName {
		return nil, h.refuse(opt, repErrTooBig, "export name too long")
	}
	e := h.s.lookup(name)
	if e == nil {
		return nil, h.refuse(opt, repErrUnknown, fmt.Sprintf("export %q is not offered here", name))
	}
	if opt == optInfo {
		return nil, h.describe(opt, e, rest[2:])
	}
	err := h.admit(ctx, e)
	switch {
	case errors.Is(err, errRefused):
		h.s.opts.Log.Warn("client refused", "export", name, "pid", h.c.pid, "reason", err)
		_ = h.c.nc.SetDeadline(time.Now().Add(h.s.opts.HandshakeTimeout))
		return nil, h.refuse(opt, repErrPolicy, err.Error())
	case errors.Is(err, errRemoved):
		_ = h.refuse(opt, repErrShut, err.Error())
		return nil, err
	case err != nil:
		return nil, err
	}
	if err := h.describe(opt, e, rest[2:]); err != nil {
		return nil, h.abandon(e, err)
	}
	h.enter(e)
	return e, nil
}

// describe answers INFO and GO.
func (h *handshake) describe(opt uint32, e *export, wanted []byte) error {
	p := binary.BigEndian.AppendUint16(nil, infoExport)
	p = binary.BigEndian.AppendUint64(p, uint64(e.size.Load()))
	p = binary.BigEndian.AppendUint16(p, e.transmissionFlags(h.structured))
	if err := h.reply(opt, repInfo, p); err != nil {
		return err
	}
	for ; len(wanted) >= 2; wanted = wanted[2:] {
		typ := binary.BigEndian.Uint16(wanted)
		p = binary.BigEndian.AppendUint16(p[:0], typ)
		switch typ {
		case infoName:
			p = append(p, e.Name...)
		case infoDescription:
			p = append(p, e.Description...)
		case infoBlockSize:
			p = binary.BigEndian.AppendUint32(p, 1)
			p = binary.BigEndian.AppendUint32(p, 4096)
			p = binary.BigEndian.AppendUint32(p, maxPayload)
		default:
			continue
		}
		if err := h.reply(opt, repInfo, p); err != nil {
			return err
		}
	}
	return h.reply(opt, repAck, nil)
}

// metaContext lists or chooses metadata contexts; we have exactly one.
func (h *handshake) metaContext(opt uint32, data []byte) error {
	if opt == optSetMeta {
		h.context = false
	}
	name, rest, ok := cutString(data)
	if !ok || len(rest) < 4 {
		return h.refuse(opt, repErrInvalid, "lengths in the option do not fit")
	}
	count := binary.BigEndian.Uint32(rest)
	if rest = rest[4:]; count > maxQueries {
		return h.refuse(opt, repErrTooBig, "too many queries")
	}
	match := opt == optListMeta && count == 0
	for range count {
		var q string
		if q, rest, ok = cutString(rest); !ok {
			return h.refuse(opt, repErrInvalid, "lengths in the option do not fit")
		}
		match = match || q == contextAllocation || opt == optListMeta && q == "base:"
	}
	switch {
	case len(rest) != 0:
		return h.refuse(opt, repErrInvalid, "lengths in the option do not fit")
	case !h.structured && opt == optSetMeta:
		return h.refuse(opt, repErrInvalid, "structured replies were not negotiated")
	case h.s.lookup(name) == nil:
		return h.refuse(opt, repErrUnknown, fmt.Sprintf("export %q is not offered here", name))
	}
	if match {
		id := contextAllocationID
		if opt == optSetMeta {
			h.context, h.contextFor = true, name
		} else {
			id = 0
		}
		p := binary.BigEndian.AppendUint32(nil, id)
		if err := h.reply(opt, repMeta, append(p, contextAllocation...)); err != nil {
			return err
		}
	}
	return h.reply(opt, repAck, nil)
}
