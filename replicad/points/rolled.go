package points

import (
	"encoding/binary"

	"kvmreplica/replicad/delta"
)

const (
	rolledMagic = "KRPB"
	rolledHead  = 96
)

// encodeRolled is the file that lists rolled-back granules.
func encodeRolled(store [16]byte, pos delta.Pos, keys []undoKey) []byte {
	b := append(make([]byte, 0, rolledHead+8*len(keys)+40), rolledMagic...)
	b = append(b, version, 0, 0, 0)
	b = append(b, store[:]...)
	b = delta.AppendPos(b, pos)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(keys)))
	b = b[:rolledHead]
	for _, k := range keys {
		b = binary.LittleEndian.AppendUint64(b, uint64(k))
	}
	b = append(b, make([]byte, 40)...)
	sealBlock(b)
	return b
}

func decodeRolled(b []byte, store [16]byte, pos delta.Pos) ([]undoKey, bool) {
	if len(b) < rolledHead+40 || !sealedBlock(b, rolledMagic) || string(b[8:24]) != string(store[:]) || delta.ParsePos(b[24:]) != pos {
		return nil, false
	}
	n := binary.LittleEndian.Uint64(b[80:])
	if n != uint64(len(b)-rolledHead-40)/8 {
		return nil, false
	}
	keys := make([]undoKey, n)
	for i := range keys {
		keys[i] = undoKey(binary.LittleEndian.Uint64(b[rolledHead+8*i:]))
	}
	return keys, true
}
