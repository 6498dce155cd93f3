package nbd

import (
	"encoding/binary"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// Magic numbers.
const (
	magicInit            = uint64(protocol.NEGOTIATION_MAGIC_OLDSTYLE)
	magicOption          = uint64(protocol.NEGOTIATION_MAGIC_OPTION)
	magicOptionReply     = uint64(protocol.NEGOTIATION_MAGIC_REPLY)
	magicRequest         = uint32(protocol.TRANSMISSION_MAGIC_REQUEST)
	magicSimpleReply     = uint32(protocol.TRANSMISSION_MAGIC_REPLY)
	magicStructuredReply = uint32(0x668e33ef)
)

// Handshake flags, the same bits in both directions.
const (
	flagFixedNewstyle = uint16(protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE)
	flagNoZeroes      = uint16(1 << 1)
)

// Options of the handshake.
const (
	optExportName      = uint32(1)
	optAbort           = uint32(protocol.NEGOTIATION_ID_OPTION_ABORT)
	optList            = uint32(protocol.NEGOTIATION_ID_OPTION_LIST)
	optStartTLS        = uint32(5)
	optInfo            = uint32(protocol.NEGOTIATION_ID_OPTION_INFO)
	optGo              = uint32(protocol.NEGOTIATION_ID_OPTION_GO)
	optStructuredReply = uint32(8)
	optListMeta        = uint32(9)
	optSetMeta         = uint32(10)
)

// Replies to options.
const (
	repAck        = uint32(protocol.NEGOTIATION_TYPE_REPLY_ACK)
	repServer     = uint32(protocol.NEGOTIATION_TYPE_REPLY_SERVER)
	repInfo       = uint32(protocol.NEGOTIATION_TYPE_REPLY_INFO)
	repMeta       = uint32(4)
	repErrBit     = uint32(1 << 31)
	repErrUnsup   = uint32(protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED)
	repErrPolicy  = repErrBit | 2
	repErrInvalid = repErrBit | 3
	repErrUnknown = uint32(protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN)
	repErrShut    = repErrBit | 7
	repErrTooBig  = repErrBit | 9
)

// Kinds of information in a reply to INFO and GO.
const (
	infoExport      = uint16(protocol.NEGOTIATION_TYPE_INFO_EXPORT)
	infoName        = uint16(protocol.NEGOTIATION_TYPE_INFO_NAME)
	infoDescription = uint16(protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION)
	infoBlockSize   = uint16(protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE)
)

// Transmission flags: what an export can do.
const (
	transHasFlags   = uint16(protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS)
	transReadOnly   = uint16(1 << 1)
	transFlush      = uint16(1 << 2)
	transFUA        = uint16(1 << 3)
	transRotational = uint16(1 << 4)
	transTrim       = uint16(1 << 5)
	transZeroes     = uint16(1 << 6)
	transDF         = uint16(1 << 7)
	transMultiConn  = uint16(protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN)
	transCache      = uint16(1 << 10)
	transFastZero   = uint16(1 << 11)
)

// Commands.
const (
	cmdRead        = uint16(protocol.TRANSMISSION_TYPE_REQUEST_READ)
	cmdWrite       = uint16(protocol.TRANSMISSION_TYPE_REQUEST_WRITE)
	cmdDisconnect  = uint16(protocol.TRANSMISSION_TYPE_REQUEST_DISC)
	cmdFlush       = uint16(3)
	cmdTrim        = uint16(4)
	cmdCache       = uint16(5)
	cmdZeroes      = uint16(6)
	cmdBlockStatus = uint16(7)
)

// Flags of commands.
const (
	cmdFUA      = uint16(1 << 0)
	cmdNoHole   = uint16(1 << 1)
	cmdDF       = uint16(1 << 2)
	cmdReqOne   = uint16(1 << 3)
	cmdFastZero = uint16(1 << 4)
)

// Structured replies.
const (
	chunkDone = uint16(1 << 0)

	chunkNone        = uint16(0)
	chunkData        = uint16(1)
	chunkHole        = uint16(2)
	chunkBlockStatus = uint16(5)
	chunkErrorBit    = uint16(1 << 15)
	chunkError       = chunkErrorBit | 1
	chunkErrorOffset = chunkErrorBit | 2
)

// The one metadata context we know, and its flags.
const (
	contextAllocation   = "base:allocation"
	contextAllocationID = uint32(1)
	statusHole          = uint32(1 << 0)
	statusZero          = uint32(1 << 1)
)

// Sizes on the wire.
const (
	requestSize    = 28
	simpleSize     = 16
	chunkSize      = 20
	chunkDataExtra = 8 // offset in front of the data
	maxPayload     = 32 << 20
	maxName        = 4096 // the protocol's limit of a string
)

// header is a request as it stands on the wire.
type header struct {
	cookie uint64
	off    uint64
	length uint32
	flags  uint16
	cmd    uint16
}

// parseHeader reads a request header of requestSize bytes; false: bad magic.
func parseHeader(p []byte) (header, bool) {
	_ = p[requestSize-1]
	h := header{
		flags:  binary.BigEndian.Uint16(p[4:]),
		cmd:    binary.BigEndian.Uint16(p[6:]),
		cookie: binary.BigEndian.Uint64(p[8:]),
		off:    binary.BigEndian.Uint64(p[16:]),
		length: binary.BigEndian.Uint32(p[24:]),
	}
	return h, binary.BigEndian.Uint32(p) == magicRequest
}

// appendHeader is the inverse of parseHeader.
func appendHeader(p []byte, h header) []byte {
	p = binary.BigEndian.AppendUint32(p, magicRequest)
	p = binary.BigEndian.AppendUint16(p, h.flags)
	p = binary.BigEndian.AppendUint16(p, h.cmd)
	p = binary.BigEndian.AppendUint64(p, h.cookie)
	p = binary.BigEndian.AppendUint64(p, h.off)
	return binary.BigEndian.AppendUint32(p, h.length)
}

func appendSimple(p []byte, cookie uint64, errno Errno) []byte {
	p = binary.BigEndian.AppendUint32(p, magicSimpleReply)
	p = binary.BigEndian.AppendUint32(p, uint32(errno))
	return binary.BigEndian.AppendUint64(p, cookie)
}

func appendChunk(p []byte, flags, typ uint16, cookie uint64, length uint32) []byte {
	p = binary.BigEndian.AppendUint32(p, magicStructuredReply)
	p = binary.BigEndian.AppendUint16(p, flags)
	p = binary.BigEndian.AppendUint16(p, typ)
	p = binary.BigEndian.AppendUint64(p, cookie)
	return binary.BigEndian.AppendUint32(p, length)
}
