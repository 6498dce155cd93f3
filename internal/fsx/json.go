package fsx

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"regexp"
)

// ErrSum: a byte of a file has changed since it was written.
var ErrSum = errors.New("its content does not match its sum: a byte has changed (restore the file; who edited it by hand removes the line \"sum\")")

// sumMember is the last member of a document: the CRC32C of all before it.
var sumMember = regexp.MustCompile(`,\n  "sum": "([0-9a-f]{8})"\n\}\n?$`)

// EncodeJSON is a JSON object for people, indented, that knows whether it was
// damaged: its last member "sum" covers every byte before it.
func EncodeJSON(v any) ([]byte, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return nil, err
	}
	body, ok := bytes.CutSuffix(b, []byte("\n}"))
	if !ok {
		return nil, fmt.Errorf("%T is not an object with members", v)
	}
	return fmt.Appendf(body, ",\n  \"sum\": \"%08x\"\n}\n", crc32.Checksum(body, castagnoli())), nil
}

// CheckJSON verifies the sum of a document of EncodeJSON and returns it without
// that. One without a sum is returned as it is: a person may have to edit a
// file in a disaster.
func CheckJSON(doc []byte) ([]byte, error) {
	at := sumMember.FindSubmatchIndex(doc)
	if at == nil {
		return doc, nil
	}
	body, want := doc[:at[0]], string(doc[at[2]:at[3]])
	if fmt.Sprintf("%08x", crc32.Checksum(body, castagnoli())) != want {
		return nil, ErrSum
	}
	return append(bytes.Clone(body), "\n}\n"...), nil
}

// WriteJSON replaces name by a document of EncodeJSON, as WriteAtomic does.
func WriteJSON(f FS, name string, v any) error {
	b, err := EncodeJSON(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return WriteAtomic(f, name, b)
}

// ReadJSON reads a document of WriteJSON of at most limit bytes into v.
func ReadJSON(f FS, name string, limit int64, v any) error {
	b, err := ReadFile(f, name, limit)
	if err != nil {
		return err
	}
	if b, err = CheckJSON(b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
