package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

const (
	maxReplies   = 256     // to one option
	maxReplySize = 1 << 16 // of one reply
)

// negotiation is the client's side of the handshake.
type negotiation struct {
	nc   net.Conn
	info serverInfo
}

// optionError is a server's refusal of an option.
type optionError struct {
	typ  uint32
	text string
}

func (e *optionError) Error() string {
	why := map[uint32]string{
		repErrUnsup: "not supported", repErrPolicy: "forbidden by policy", repErrInvalid: "invalid",
		repErrUnknown: "no such export", repErrShut: "server is shutting down", repErrTooBig: "too big",
		repErrBit | 5: "server requires TLS", repErrBit | 8: "server requires block sizes",
	}[e.typ]
	if why == "" {
		why = fmt.Sprintf("error %d", e.typ&^repErrBit)
	}
	if e.text == "" {
		return "server refuses: " + why
	}
	return fmt.Sprintf("server refuses: %s (%q)", why, e.text)
}

// clientHandshake negotiates down to what the server can: structured replies
// and block status where offered, EXPORT_NAME where GO is unknown.
func clientHandshake(nc net.Conn, export string) (serverInfo, error) {
	n := &negotiation{nc: nc, info: serverInfo{minBlock: 1, maxPayload: maxPayload}}
	if len(export) > maxName {
		return n.info, fmt.Errorf("export name longer than %d bytes", maxName)
	}
	noZeroes, err := n.greet()
	if err != nil {
		return n.info, err
	}
	if n.info.structured, err = n.ask(optStructuredReply, nil, nil); err != nil {
		return n.info, err
	}
	if n.info.structured {
		if err := n.chooseContext(export); err != nil {
			return n.info, err
		}
	}
	data := appendString(nil, export)
	data = binary.BigEndian.AppendUint16(data, 1)
	data = binary.BigEndian.AppendUint16(data, infoBlockSize)
	haveExport := false
	err = n.option(optGo, data, func(typ uint32, p []byte) error { return n.readInfo(typ, p, &haveExport) })
	var refusal *optionError
	switch {
	case errors.As(err, &refusal) && refusal.typ == repErrUnsup:
		return n.info, n.exportName(export, noZeroes)
	case err != nil:
		return n.info, err
	case !haveExport:
		return n.info, fmt.Errorf("%w: no size in the answer to GO", ErrProtocol)
	}
	return n.info, nil
}

func appendString(p []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(p, uint32(len(s))), s...)
}

func (n *negotiation) greet() (noZeroes bool, err error) {
	var in [18]byte
	if _, err := io.ReadFull(n.nc, in[:]); err != nil {
		return false, fmt.Errorf("read greeting: %w", err)
	}
	if binary.BigEndian.Uint64(in[:]) != magicInit {
		return false, fmt.Errorf("%w: this is no nbd server", ErrProtocol)
	}
	flags := binary.BigEndian.Uint16(in[16:])
	if binary.BigEndian.Uint64(in[8:]) != magicOption || flags&flagFixedNewstyle == 0 {
		return false, fmt.Errorf("%w: server does not speak fixed newstyle", ErrProtocol)
	}
	answer := uint32(flagFixedNewstyle | flags&flagNoZeroes)
	_, err = n.nc.Write(binary.BigEndian.AppendUint32(nil, answer))
	return flags&flagNoZeroes != 0, err
}

// option sends one option and hands every reply but the last to fn.
func (n *negotiation) option(opt uint32, data []byte, fn func(typ uint32, p []byte) error) error {
	p := binary.BigEndian.AppendUint64(nil, magicOption)
	p = binary.BigEndian.AppendUint32(p, opt)
	p = binary.BigEndian.AppendUint32(p, uint32(len(data)))
	if _, err := n.nc.Write(append(p, data...)); err != nil {
		return err
	}
	for range maxReplies {
		var in [20]byte
		if _, err := io.ReadFull(n.nc, in[:]); err != nil {
			return fmt.Errorf("read answer to option %d: %w", opt, err)
		}
		typ, size := binary.BigEndian.Uint32(in[12:]), binary.BigEndian.Uint32(in[16:])
		if binary.BigEndian.Uint64(in[:]) != magicOptionReply || binary.BigEndian.Uint32(in[8:]) != opt || size > maxReplySize {
			return fmt.Errorf("%w: bad answer to option %d", ErrProtocol, opt)
		}
		body := make([]byte, size)
		if _, err := io.ReadFull(n.nc, body); err != nil {
			return fmt.Errorf("read answer to option %d: %w", opt, err)
		}
		switch {
		case typ == repAck:
			return nil
		case typ&repErrBit != 0:
			return &optionError{typ: typ, text: string(body)}
		case fn == nil:
			return fmt.Errorf("%w: unexpected answer %d to option %d", ErrProtocol, typ, opt)
		}
		if err := fn(typ, body); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d answers to option %d", ErrProtocol, maxReplies, opt)
}

// ask is option where a refusal is an answer.
func (n *negotiation) ask(opt uint32, data []byte, fn func(uint32, []byte) error) (bool, error) {
	err := n.option(opt, data, fn)
	var refusal *optionError
	if errors.As(err, &refusal) {
		return false, nil
	}
	return err == nil, err
}

func (n *negotiation) chooseContext(export string) error {
	data := appendString(nil, export)
	data = binary.BigEndian.AppendUint32(data, 1)
	data = appendString(data, contextAllocation)
	chosen := false
	_, err := n.ask(optSetMeta, data, func(typ uint32, p []byte) error {
		if typ != repMeta || len(p) < 4 {
			return fmt.Errorf("%w: bad answer about metadata contexts", ErrProtocol)
		}
		chosen = chosen || string(p[4:]) == contextAllocation
		return nil
	})
	n.info.context = chosen
	return err
}

func (n *negotiation) readInfo(typ uint32, p []byte, haveExport *bool) error {
	if typ != repInfo || len(p) < 2 {
		return fmt.Errorf("%w: bad answer to GO", ErrProtocol)
	}
	switch kind := binary.BigEndian.Uint16(p); {
	case kind == infoExport && len(p) == 12:
		n.info.size = int64(binary.BigEndian.Uint64(p[2:]))
		n.info.flags = binary.BigEndian.Uint16(p[10:])
		*haveExport = true
	case kind == infoBlockSize && len(p) == 14:
		n.info.minBlock = int64(binary.BigEndian.Uint32(p[2:]))
		n.info.maxPayload = max(n.info.minBlock, int64(binary.BigEndian.Uint32(p[10:])))
	case kind == infoExport || kind == infoBlockSize:
		return fmt.Errorf("%w: bad answer to GO", ErrProtocol)
	}
	return nil
}

// exportName is for servers that do not know GO.
func (n *negotiation) exportName(export string, noZeroes bool) error {
	p := binary.BigEndian.AppendUint64(nil, magicOption)
	p = binary.BigEndian.AppendUint32(p, optExportName)
	p = appendString(p, export)
	if _, err := n.nc.Write(p); err != nil {
		return err
	}
	in := make([]byte, 10, 134)
	if !noZeroes {
		in = in[:134]
	}
	if _, err := io.ReadFull(n.nc, in); err != nil {
		return fmt.Errorf("server hung up on export %q, it does not offer it: %w", export, err)
	}
	n.info.size = int64(binary.BigEndian.Uint64(in))
	n.info.flags = binary.BigEndian.Uint16(in[8:])
	return nil
}
